"""What a search did: one row a layer, every candidate's losses, and the settings."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from setar_peft.decomposition import tensor_digest
from setar_peft.objectives.loss import LossValues


class TraceRow(NamedTuple):
    """One step of a search, with the columns of the paper's Listing 1.

    Attributes:
        step: Number of the step, from 0.
        tower_type: "vision", "text", or "model" where there are no towers.
        weight_type: "W_up" and so on.
        layer_num: Index of the block, from the bottom; None for a layer after the blocks.
        best_ratio: The ratio chosen.
        total_loss: The best loss so far.
        id_loss: Its ID part.
        ood_loss: Its OOD part.
        val_acc: Accuracy on the search's images, in percent.
        ood_patch_percent: Share of patches that are OOD, in percent.
        module: Full name of the module.
    """

    step: int
    tower_type: str
    weight_type: str
    layer_num: int | None
    best_ratio: float
    total_loss: float
    id_loss: float
    ood_loss: float
    val_acc: float
    ood_patch_percent: float
    module: str


class TraceCandidate(NamedTuple):
    """One evaluated candidate: its step, module, ratio and losses (accuracy and patch share from 0 to 1)."""

    step: int
    module: str
    rank_ratio: float
    total_loss: float
    id_loss: float
    ood_loss: float
    accuracy: float
    ood_patch_share: float


@dataclass
class SearchTrace:
    """The course of a search.

    Attributes:
        initial: Losses of the base.
        rows: One row a step.
        candidates: Every candidate that was evaluated, in order.
        settings: The settings of the search.
    """

    initial: LossValues
    rows: list[TraceRow] = field(default_factory=list)
    candidates: list[TraceCandidate] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """The rows as a table in plain text, as in the paper's Listing 1."""
        cells = [["step", *TraceRow._fields[1:-1]]]
        for row in self.rows:
            numbers = [f"{value:.6f}" for value in row[5:10]]
            layer = "-" if row.layer_num is None else str(row.layer_num)
            cells.append([str(row.step), row.tower_type, row.weight_type, layer, f"{row.best_ratio:.2f}", *numbers])
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
        )

    def to_csv(self) -> str:
        """The rows as comma-separated values with a header."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(TraceRow._fields)
        writer.writerows(self.rows)
        return text.getvalue()

    def to_json(self) -> str:
        """The whole trace as JSON; numbers that are not finite, which JSON has none of, as "nan", "inf" and "-inf"."""
        return json.dumps(_plain(asdict(self)), indent=1, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON, whole or not at all: a reader never sees half a file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> SearchTrace:
        """Read a trace that `save` wrote.

        Raises:
            ValueError: If the file is no trace.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                LossValues(*map(_number, data["initial"])),
                _rows(TraceRow, data["rows"]),
                _rows(TraceCandidate, data["candidates"]),
                data["settings"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no trace of a search ({error}). Give a file that SearchTrace.save wrote."
            ) from error


def _rows(kind: Any, values: Iterable[Iterable[Any]]) -> list[Any]:
    return [kind(*map(_number, row)) for row in values]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


_Item = TypeVar("_Item")

_MODULUS = 2**128


def model_fingerprint(model: nn.Module) -> str:
    """A digest of every parameter and buffer: names, shapes, dtypes and values."""
    state = model.state_dict()
    digests = in_threads(tensor_digest, state.values())
    return _combined(f"{name} {digest}" for name, digest in zip(state, digests, strict=True))


class SetFingerprint:
    """A digest of a set of labelled examples; neither their order nor how they are batched or sharded changes it."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, inputs: Mapping[str, Tensor], labels: Tensor) -> None:
        """Add a batch.

        Args:
            inputs: Tensors with one row an example.
            labels: (examples,).
        """

        def digest_of(index: int) -> str:
            return _combined(
                [str(int(labels[index])), *(tensor_digest(inputs[name][index]) for name in sorted(inputs))]
            )

        for digest in in_threads(digest_of, range(len(labels))):
            self.value = (self.value + int(digest, 16)) % _MODULUS

    @staticmethod
    def combined(values: list[int]) -> str:
        """The digest of the union of several processes' shards."""
        return f"{sum(values) % _MODULUS:032x}"


def in_threads(digest: Callable[[_Item], str], items: Iterable[_Item]) -> list[str]:
    """Digests of many things, in their order; hashing large buffers leaves other threads room to run."""
    with ThreadPoolExecutor(thread_name_prefix="setar_peft-digest") as pool:
        return list(pool.map(digest, items))


def _combined(parts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

"""What a search did: one row a layer, every candidate's losses, and the settings."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from setar_peft.objectives.loss import LossValues
from setar_peft.search.fingerprints import plain_values
from setar_peft.writing import whole_file


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
    """One evaluated candidate: its step, module, ratio and losses (accuracy and patch share from 0 to 1).

    Attributes:
        trial: Number of the evaluation in which it was one of several changes at once (order "joint"); None for one
            that was alone.
    """

    step: int
    module: str
    rank_ratio: float
    total_loss: float
    id_loss: float
    ood_loss: float
    accuracy: float
    ood_patch_share: float
    trial: int | None = None


class TracePrediction(NamedTuple):
    """What a gradient predicted of one candidate of a screened search (see `decisions.Prediction`).

    Attributes:
        step: The first step that went by it.
        module: Full name of the module.
        rank_ratio: Its ratio; 0 for the whole weight.
        change: Change of what is minimised against the module's ratio at that step, to first order.
        energy: Share of the weight's squared singular values that is removed or put back, 0 to 1.
    """

    step: int
    module: str
    rank_ratio: float
    change: float
    energy: float


class Compared(NamedTuple):
    """An evaluation beside its prediction: the changes of what is minimised.

    Attributes:
        step: The step; of several changes at once, that of the first.
        layers: How many layers changed at once.
        predicted: To first order, summed over them.
        exact: As evaluated.
        module: Full name of the module; of several changes at once, that of the first.
    """

    step: int
    layers: int
    predicted: float
    exact: float
    module: str


# The columns that a screened search has besides.
_CHANGES = ("predicted_change", "exact_change")


@dataclass
class SearchTrace:
    """The course of a search.

    Attributes:
        initial: Losses of the base.
        rows: One row a step.
        candidates: Every candidate that was evaluated, in order.
        settings: The settings of the search.
        predictions: What was predicted, in a screened search.
    """

    initial: LossValues
    rows: list[TraceRow] = field(default_factory=list)
    candidates: list[TraceCandidate] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    predictions: list[TracePrediction] = field(default_factory=list)

    def table(self) -> str:
        """The rows as a table in plain text, as in the paper's Listing 1; of a screened search with both changes."""
        changes = self._changes()
        cells = [["step", *TraceRow._fields[1:-1], *(_CHANGES if self.predictions else ())]]
        for row, pair in zip(self.rows, changes, strict=True):
            numbers = [f"{value:.6f}" for value in (*row[5:10], *pair)]
            layer = "-" if row.layer_num is None else str(row.layer_num)
            cells.append([str(row.step), row.tower_type, row.weight_type, layer, f"{row.best_ratio:.2f}", *numbers])
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
        )

    def to_csv(self) -> str:
        """The rows as comma-separated values with a header; of a screened search with both changes."""
        text, changes = io.StringIO(), self._changes()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow((*TraceRow._fields, *(_CHANGES if self.predictions else ())))
        writer.writerows((*row, *pair) for row, pair in zip(self.rows, changes, strict=True))
        return text.getvalue()

    def compared(self) -> list[Compared]:
        """Every evaluation of a screened search beside what was predicted of it, in order."""
        if not self.predictions:
            return []
        evaluations: dict[Any, list[TraceCandidate]] = {}
        for candidate in self.candidates:
            key = candidate[:3] if candidate.trial is None else candidate.trial
            evaluations.setdefault(key, []).append(candidate)
        compared, told = [], _Told(self.predictions)
        for changes in evaluations.values():
            first = changes[0]
            before = self._before(first.step if first.trial is None else told.start(first.step))
            predicted = sum(told.change(change.step, change.module, change.rank_ratio) for change in changes)
            exact = self.minimised(first) - before
            compared.append(Compared(first.step, len(changes), predicted, exact, first.module))
        return compared

    def changed(self) -> list[TraceRow]:
        """The rows that gave their module another ratio than it had."""
        ratios: dict[str, float] = {}
        changed = []
        for row in self.rows:
            if row.best_ratio != ratios.get(row.module, 0.0):
                changed.append(row)
            ratios[row.module] = row.best_ratio
        return changed

    def minimised(self, row: TraceRow | TraceCandidate) -> float:
        """What the search minimises, of a row or a candidate."""
        return {"total": row.total_loss, "id": row.id_loss, "ood": row.ood_loss}[self.criterion]

    @property
    def is_joint(self) -> bool:
        """Whether all layers were decided at once, in rounds of one row a layer (order "joint")."""
        return self.settings.get("order") == "joint"

    @property
    def criterion(self) -> str:
        """Which part of the loss the search minimises: "total", "id" or "ood"."""
        return str(self.settings.get("criterion", "total"))

    def _changes(self) -> list[tuple[float, ...]]:
        """What each row's decision was predicted to change, and what it changed; in the order "joint" its round's.

        Nothing, where nothing was predicted.
        """
        if not self.predictions:
            return [()] * len(self.rows)
        changed, told = {row.step for row in self.changed()}, _Told(self.predictions)
        totals: dict[int, list[float]] = {}
        for row in self.rows:
            start = told.start(row.step) if self.is_joint else row.step
            exact = self.minimised(row) - self._before(start)
            predicted, _ = totals.setdefault(start, [0.0, exact])
            if row.step in changed:
                totals[start][0] = predicted + told.change(row.step, row.module, row.best_ratio)
        return [tuple(totals[told.start(row.step) if self.is_joint else row.step]) for row in self.rows]

    def _before(self, step: int) -> float:
        """What is minimised, before a step."""
        return self.minimised(self.rows[step - 1]) if step else self.initial.part(self.criterion)

    def to_json(self) -> str:
        """The whole trace as JSON; numbers that are not finite, which JSON has none of, as "nan", "inf" and "-inf"."""
        return json.dumps(plain_values(asdict(self)), indent=1, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON, whole or not at all: a reader never sees half a file.

        Raises:
            OSError: If it cannot be written; what stood there before still does.
        """
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                error.errno,
                f"The trace could not be written to {target} ({error.strerror}); what it held before is still there. "
                "Make room, and go on with resume (--resume).",
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> SearchTrace:
        """Read a trace that `save` wrote.

        Raises:
            ValueError: If the file is no trace, or a damaged one; the message names the place.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            parts = [_part(data, *wanted) for wanted in (("initial", list), ("rows", list), ("candidates", list))]
            initial = _row(LossValues, parts[0], "initial")
            rows = [_row(TraceRow, row, f"rows[{index}]") for index, row in enumerate(parts[1])]
            candidates = [_row(TraceCandidate, row, f"candidates[{index}]") for index, row in enumerate(parts[2])]
            # Traces from before there were screened searches have neither.
            settings = {"search": "greedy", **_part(data, "settings", dict)}
            predicted = _part(data, "predictions", list) if "predictions" in data else []
            predictions = [_row(TracePrediction, row, f"predictions[{index}]") for index, row in enumerate(predicted)]
            _check_course(initial, rows, candidates, predictions)
            return cls(initial, rows, candidates, settings, predictions)
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"{path} is no trace of a search, or a damaged one: {error}. Give a file that SearchTrace.save wrote, "
                "or start anew with overwrite (--overwrite)."
            ) from error

    def check_settings(self, settings: dict[str, Any], path: str | Path) -> None:
        """Check that a search with these settings may continue this trace.

        Args:
            settings: As `search_settings` gives them.
            path: Where the trace is, for the error.

        Raises:
            ValueError: If a setting other than a version differs; each is named with both values.
        """
        before, now = _flat(self.settings), _flat(settings)
        differences = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if differences:
            raise ValueError(
                f"{path} is the trace of another search: {'; '.join(differences)}. Search with what it was made with, "
                "or start anew with another trace_path (--output)."
            )


class _Told:
    """Finds what was predicted, of which a search in rounds over all layers has tens of thousands."""

    def __init__(self, predictions: Sequence[TracePrediction]) -> None:
        self._starts = sorted({one.step for one in predictions})
        self._changes = {one[:3]: one.change for one in predictions}

    def start(self, step: int) -> int:
        """The first step that goes by the same gradient as this one."""
        return self._starts[max(0, bisect_right(self._starts, step) - 1)]

    def change(self, step: int, module: str, ratio: float) -> float:
        """What was predicted of a module's ratio in a step; NaN for nothing."""
        return self._changes.get((self.start(step), module, ratio), math.nan)


def trace_to_continue(path: str | Path, *, resume: bool, overwrite: bool) -> SearchTrace | None:
    """The trace that a search continues, None if it starts anew; whether it can be written there is seen at once.

    Args:
        path: Where the trace is or will be.
        resume: Continue what is there, if there is something.
        overwrite: Start anew whatever is there.

    Raises:
        ValueError: If a trace is there and neither was asked for, both were, or what is to be continued is damaged.
        OSError: If nothing can be written there.
    """
    target = Path(path)
    if resume and overwrite:
        raise ValueError("resume (--resume) and overwrite (--overwrite) exclude each other; give one of them.")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give the name of a file for the trace.")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"Nothing can be written to {folder} ({error.strerror}); give another place for {target}."
        ) from error
    if not target.exists() or overwrite:
        return None
    if not resume:
        raise ValueError(
            f"{target} is there already. Go on with it with resume (--resume), start anew with overwrite "
            "(--overwrite), or write to another place (trace_path, --output)."
        )
    return SearchTrace.load(target)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that a resumed search must share, nested ones by their names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if prefix + name == "versions":
            continue
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def _part(data: Any, name: str, kind: type) -> Any:
    if not isinstance(data, dict) or name not in data:
        raise ValueError(f"it has no {name!r}")
    if not isinstance(data[name], kind):
        raise ValueError(f"{name} is a {type(data[name]).__name__} and no {kind.__name__}")
    return data[name]


# What JSON holds for a column of a type.
_COLUMNS: dict[Any, Any] = {int: (int,), int | None: (int, type(None)), float: (float, int), str: (str,)}


def _row(kind: Any, values: Any, where: str) -> Any:
    """One row as a named tuple: as many columns as it has, each of its type; what has a default may be missing."""
    least = len(kind._fields) - (len(kind._field_defaults) if kind is TraceCandidate else 0)
    if not isinstance(values, list) or not least <= len(values) <= len(kind._fields):
        count = f"{len(values)} columns" if isinstance(values, list) else f"{values!r}"
        raise ValueError(f"{where} has {count}, where there are {len(kind._fields)}")
    columns: list[Any] = []
    for (name, wanted), value in zip(get_type_hints(kind).items(), values, strict=False):
        column: Any = float(str(value)) if wanted is float and value in ("nan", "inf", "-inf") else value
        if not isinstance(column, _COLUMNS[wanted]) or isinstance(column, bool):
            raise ValueError(f"{name} of {where} is {column!r} and no {getattr(wanted, '__name__', wanted)}")
        columns.append(float(column) if wanted is float else column)
    return kind(*columns)


def _check_course(
    initial: LossValues,
    rows: Sequence[TraceRow],
    candidates: Sequence[TraceCandidate],
    predictions: Sequence[TracePrediction],
) -> None:
    for where, losses in (("initial", initial.total), *((f"rows[{row.step}]", row.total_loss) for row in rows)):
        if not math.isfinite(losses):
            raise ValueError(f"the loss of {where} is {losses}")
    for index, row in enumerate(rows):
        if row.step != index:
            raise ValueError(f"rows[{index}] is of step {row.step}")
    for index, candidate in enumerate(candidates):
        if not 0 <= candidate.step < len(rows):
            raise ValueError(f"candidates[{index}] is of step {candidate.step}, of {len(rows)} steps")
    for index, prediction in enumerate(predictions):
        if not 0 <= prediction.step <= len(rows):
            raise ValueError(f"predictions[{index}] is of step {prediction.step}, after {len(rows)} steps")
        if not (math.isfinite(prediction.change) and math.isfinite(prediction.energy)):
            raise ValueError(f"predictions[{index}] is of a change of {prediction.change} and {prediction.energy}")

"""What a detector says: a record an input, and a list of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN = 40


@dataclass(frozen=True)
class Detection:
    """What a detector says of one input.

    Attributes:
        id: Its path or URL, or its number.
        label: The likeliest class; None for an input that could not be read or scored, as the other figures.
        probability: Softmax of the model's own logits at that class, in [0, 1].
        score: The score; higher means more in-distribution.
        is_id: Whether it is taken for in-distribution: score >= threshold.
        threshold: The threshold.
        top: The likeliest classes with their probabilities, the likeliest first; as many as were asked for.
        error: Why it could not be read or scored; None otherwise.
    """

    id: str
    label: str | None
    probability: float | None
    score: float | None
    is_id: bool | None
    threshold: float
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values for JSON; `top` is a list of {"label", "probability"}."""
        return {**vars(self), "top": [{"label": label, "probability": value} for label, value in self.top]}


class Detections(Sequence[Detection]):
    """Records of several inputs, in their order; `print` shows them as a table."""

    def __init__(self, records: Sequence[Detection]) -> None:
        self._records = list(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        found = self._records[index]
        return Detections(found) if isinstance(index, slice) else found

    def __iter__(self) -> Iterator[Detection]:
        return iter(self._records)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Detections) and self._records == other._records

    __hash__ = None  # type: ignore[assignment] # equal by content

    def __repr__(self) -> str:
        return self.table(_SHOWN)

    def table(self, rows: int | None = None) -> str:
        """The records as a table in plain text, with the number of each verdict below it.

        Args:
            rows: Records shown at most; by default all.
        """
        cells = [["id", "verdict", "score", "label", "probability"]]
        for record in self._records[:rows]:
            if record.error is not None:
                cells.append([record.id, "error", "-", record.error, "-"])
            else:
                verdict = "ID" if record.is_id else "OOD"
                cells.append(
                    [record.id, verdict, f"{record.score:.4f}", str(record.label), f"{record.probability:.2f}"]
                )
        widths = [max(len(line[column]) for line in cells if line[1] != "error" or column != 3) for column in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        left = len(self._records) - len(cells) + 1
        return "\n".join([*lines, *([f"... and {left} more"] if left else []), self.summary()])

    def summary(self) -> str:
        """How many inputs got which verdict, and at which threshold, in a line."""
        errors = sum(record.error is not None for record in self._records)
        known = sum(record.is_id is True for record in self._records)
        counts = f"{known} ID, {len(self._records) - errors - known} OOD" + (f", {errors} errors" if errors else "")
        return counts + (f"; ID at a score of {self._records[0].threshold:.6g} or more" if self._records else "")

    def to_dicts(self) -> list[dict[str, Any]]:
        """The records as plain values for JSON."""
        return [record.to_dict() for record in self._records]

"""A detector on a column of a table, batch by batch: for `datasets.Dataset.map` and its like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class _Decides(Protocol):
    def __call__(self, data: Any) -> Any: ...


class Batched:
    """Takes a batch of columns and gives a detector's verdicts as columns; see `OODDetector.on`."""

    def __init__(self, detector: _Decides, column: str) -> None:
        self._detector, self._column = detector, column

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The columns "label", "probability", "score", "is_id", "threshold" and "error" of a batch.

        Raises:
            ValueError: If the batch has no such column.
        """
        if self._column not in batch:
            raise ValueError(f"The batch has the columns {', '.join(batch)}, and no {self._column!r}.")
        records = self._detector(list(batch[self._column]))
        names = ("label", "probability", "score", "is_id", "threshold", "error")
        return {name: [getattr(record, name) for record in records] for name in names}

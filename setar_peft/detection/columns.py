"""What a detector gives of whole sets: columns with ids, for notebooks and tools that watch for drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from setar_peft.writing import whole_file


@dataclass(frozen=True)
class Columns:
    """Figures of many inputs as columns.

    Attributes:
        ids: Path, URL or number of each input.
        values: Name of a column -> one value an input, (n, ...). An input that could not be read has NaN, -1, or "".
        errors: Id -> why the input could not be read.
    """

    ids: list[str]
    values: Mapping[str, NDArray[Any]]
    errors: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, column: str) -> NDArray[Any]:
        if column not in self.values:
            raise KeyError(f"There is no column {column!r}; there are {', '.join(map(repr, self.values))}.")
        return self.values[column]

    def to_parquet(self, path: str | Path) -> None:
        """Write the columns, with the ids first and the errors last, to a Parquet file; whole or not at all.

        Raises:
            ValueError: If its folder does not exist.
            OSError: If it cannot be written.
        """
        import datasets

        columns = {name: list(value) if value.ndim > 1 else value for name, value in self.values.items()}
        errors = [self.errors.get(name, "") for name in self.ids]
        table = datasets.Dataset.from_dict({"id": self.ids, **columns, "error": errors})
        with whole_file(path) as temporary:
            table.to_parquet(str(temporary))


def nan_filled(count: int, width: int | None = None) -> NDArray[np.float32]:
    """An array of NaN, (count,) or (count, width), for inputs that could not be read."""
    return np.full(count if width is None else (count, width), np.nan, dtype=np.float32)

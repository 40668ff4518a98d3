"""The scores of every image as a columnar file, for notebooks and tools that watch for drift."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from setar_peft.detection.figures import ModelScores, SetScores
from setar_peft.writing import whole_file

_COLUMNS = {
    "model": "string",
    "set": "string",
    "id": "string",
    "label": "int64",
    "prediction": "int64",
    "confidence": "float32",
}


def write_parquet(path: str | os.PathLike[str], models: Mapping[str, ModelScores]) -> Path:
    """Write model, set, id, label, prediction, confidence, and a column a score; whole or not at all.

    Args:
        path: The file, which is replaced if it is there.
        models: The models' scores, all of the same names. Unknown labels and predictions are null.

    Returns:
        The path.

    Raises:
        ValueError: If its folder does not exist, or a score is called like another column.
    """
    import datasets
    import pyarrow.parquet

    scores = list(next(iter(models.values())).settings)
    taken = sorted(set(scores) & set(_COLUMNS))
    if taken:
        raise ValueError(f"A score is called {taken[0]!r}, as a column of its own is; give it another name.")
    features = datasets.Features(
        {name: datasets.Value(kind) for name, kind in (_COLUMNS | dict.fromkeys(scores, "float32")).items()}
    )
    with (
        whole_file(path) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, features.arrow_schema) as writer,
    ):
        for model, scored in models.items():
            for name, images in scored.sets.items():
                part = datasets.Dataset.from_dict(_columns(model, name, images), features=features)
                writer.write_table(part.data.table)
    return Path(path)


def _columns(model: str, name: str, images: SetScores) -> dict[str, Any]:
    return {
        "model": [model] * len(images),
        "set": [name] * len(images),
        "id": list(images.ids),
        "label": _known(images.labels),
        "prediction": _known(images.predictions),
        "confidence": images.confidence,
        **images.scores,
    }


def _known(indices: NDArray[Any]) -> list[int | None]:
    return [None if index < 0 else index for index in indices.tolist()]

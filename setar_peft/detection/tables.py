"""Figures of an evaluation as the cells of tables, and its scores as the columns of a file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from setar_peft.detection.bootstrap import Interval
from setar_peft.detection.figures import Conventions, Difference, EvaluationRow, ModelScores, SetScores
from setar_peft.detection.scores import SCORES
from setar_peft.writing import whole_file

_COLUMNS = {
    "model": "string",
    "set": "string",
    "id": "string",
    "label": "int64",
    "prediction": "int64",
    "confidence": "float32",
}


def figure_cells(
    models: Mapping[str, ModelScores], rows: Sequence[EvaluationRow], conventions: Conventions, *, whole: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the figures, in percent; models have a column where there are several.

    Args:
        models: The models.
        rows: Their figures.
        conventions: How they were taken.
        whole: With accuracies and detection accuracies, for which a terminal has no room.
    """
    headings = ["OOD set", "score", "model", conventions.fpr_name, "AUROC", "AUPR-in", "AUPR-out"]
    headings += ["detection accuracy", "at the threshold", "accuracy"] if whole else []
    cells = []
    for row in rows:
        figures = row.metrics
        line = [
            row.ood_set,
            row.score,
            row.model,
            _with_interval(figures.fpr, row.fpr_interval),
            _with_interval(figures.auroc, row.auroc_interval),
            _percent(figures.aupr_in),
            _percent(figures.aupr_out),
        ]
        if whole:
            accuracy = models[row.model].id_set.accuracy
            line += map(_percent, (figures.detection_accuracy, figures.accuracy_at_threshold, accuracy))
        cells.append(line)
    if len(models) == 1:
        del headings[2]
        for line in cells:
            del line[2]
    return headings, cells


def difference_cells(differences: Sequence[Difference], conventions: Conventions) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the differences, in percentage points, and whether they are more than chance.

    Without a bootstrap nothing is said about that.
    """
    headings = ["OOD set", "score", "difference", conventions.fpr_name, "", "AUROC", ""]
    return headings, [
        [
            row.ood_set,
            row.score,
            f"{row.model} - {row.baseline}",
            _with_interval(row.fpr, row.fpr_interval, signed=True),
            _verdict(row.fpr_interval, more_is_better=False),
            _with_interval(row.auroc, row.auroc_interval, signed=True),
            _verdict(row.auroc_interval, more_is_better=True),
        ]
        for row in differences
    ]


def in_columns(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text: words to the left, numbers to the right."""
    cells = [list(headings), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(headings))]
    is_number = [
        any(row[column][:1] in "+-0123456789" and row[column] for row in rows) for column in range(len(widths))
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in cells
    )


def score_label(score: str, models: Mapping[str, ModelScores]) -> str:
    """A score with its settings, for each model where they differ."""
    labels = {name: _settings_label(score, model.settings[score]) for name, model in models.items()}
    if len(set(labels.values())) == 1:
        said = next(iter(labels.values()))
    else:
        said = "; ".join(f"{name}: {label}" for name, label in labels.items())
    return f"{score} ({said})" if said else score


def row_values(row: EvaluationRow) -> dict[str, Any]:
    """The figures of a row by name, as plain values; what is not known is None."""
    figures = {name: known(value) if isinstance(value, float) else value for name, value in vars(row.metrics).items()}
    intervals = _ends("fpr", row.fpr_interval) | _ends("auroc", row.auroc_interval)
    return {"model": row.model, "ood_set": row.ood_set, "score": row.score, **figures, **intervals}


def difference_values(row: Difference) -> dict[str, Any]:
    """A difference by name, as plain values; what is not known is None."""
    return {
        "model": row.model,
        "baseline": row.baseline,
        "ood_set": row.ood_set,
        "score": row.score,
        "fpr": row.fpr,
        "auroc": row.auroc,
        **_ends("fpr", row.fpr_interval),
        **_ends("auroc", row.auroc_interval),
    }


def known(value: float) -> float | None:
    """A figure, or None where there is none, which JSON can say."""
    return value if math.isfinite(value) else None


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


def _ends(figure: str, interval: Interval | None) -> dict[str, float | None]:
    low, high = (None, None) if interval is None else interval
    return {f"{figure}_low": low, f"{figure}_high": high}


def _settings_label(score: str, settings: Mapping[str, Any]) -> str:
    usual: Mapping[str, Any] = {}
    if score in SCORES:
        # A score of the user's own may have settings without a default.
        with suppress(ValueError):
            usual = SCORES[score].settings(1.0, {})
    return ", ".join(
        f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in settings.items()
        if name == "temperature" or name not in usual or value != usual[name]
    )


def _with_interval(share: float, interval: Interval | None, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if interval is None:
        return _percent(share, sign)
    digits = 2 if signed else 1
    return f"{_percent(share, sign)} [{100 * interval.low:{sign}.{digits}f}, {100 * interval.high:{sign}.{digits}f}]"


def _verdict(interval: Interval | None, *, more_is_better: bool) -> str:
    if interval is None:
        return ""
    if interval.low <= 0 <= interval.high:
        return "no difference" if interval.low == interval.high else "within chance"
    return "better" if (interval.low > 0) is more_is_better else "worse"


def _percent(share: float, sign: str = "") -> str:
    return "-" if math.isnan(share) else f"{100 * share:{sign}.2f}"


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

"""Tables 1 and 15 of the paper from the scores that its authors published, as far as those go.

    SETAR_DATA=<folder with scores/> python -m benchmarks.published_scores

Prints our figures, the paper's, and the differences, in percentage points. The published scores are lower for ID, so
their sign is turned; ID is the positive class, and the threshold's recall is the closest to 95 %.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from setar_peft.detection.result import Evaluation

Figures = tuple[float, float]


class PublishedRow(NamedTuple):
    """A row of the paper's tables, and where its scores are.

    Attributes:
        id_set: The ID set.
        method: As Table 1 and, after the stroke, Table 15 call it.
        file: Name of the file of scores.
        score: The score's name in it.
        figures: OOD set, or "mean" -> FPR95 and AUROC in percent, as printed.
    """

    id_set: str
    method: str
    file: str
    score: str
    figures: dict[str, Figures]


_SETS = ("iNaturalist", "Sun", "Places", "Texture", "ImageNet22K", "COCO")


def _row(id_set: str, method: str, file: str, score: str, *figures: Figures) -> PublishedRow:
    return PublishedRow(
        id_set, method, file, score, dict(zip((*_SETS[: len(figures) - 1], "mean"), figures, strict=True))
    )


TABLES_1_AND_15 = [
    _row(
        "ImageNet1K", "SeTAR / SeTAR+MCM", "clip_base_imagenet1k_setar", "mcm_score",
        (26.92, 94.67), (35.57, 92.79), (42.64, 90.16), (55.83, 86.58), (40.24, 91.05),
    ),
    _row(
        "ImageNet1K", "Vanilla GL-MCM*", "clip_base_imagenet1k_vanilla_gl_mcm", "gl_mcm_score",
        (15.34, 96.62), (30.65, 93.01), (37.76, 90.07), (57.41, 83.73), (35.29, 90.86),
    ),
    _row(
        "ImageNet1K", "SeTAR / SeTAR+GL-MCM", "clip_base_imagenet1k_setar", "gl_mcm_score",
        (13.36, 96.92), (28.17, 93.36), (36.80, 90.40), (54.17, 84.59), (33.12, 91.32),
    ),
    _row(
        "VOC", "SeTAR / SeTAR+MCM", "clip_base_voc_setar", "mcm_score",
        (4.59, 98.71), (24.91, 95.15), (28.46, 93.21), (40.44, 93.58), (48.25, 92.08), (48.10, 89.70), (32.46, 93.74),
    ),
    _row(
        "VOC", "SeTAR / SeTAR+GL-MCM", "clip_base_voc_setar", "gl_mcm_score",
        (3.66, 98.96), (21.93, 94.81), (25.04, 93.62), (20.35, 96.36), (31.47, 94.31), (40.70, 91.19), (23.86, 94.87),
    ),
]  # fmt: skip


def evaluated(row: PublishedRow, folder: Path) -> dict[str, Figures]:
    """OOD set, or "mean" -> FPR95 and AUROC in percent, from the files of scores in a folder."""
    with np.load(folder / f"{row.file}.npz") as published:
        evaluation = Evaluation.of_scores(
            -published[f"ID_{row.id_set}/{row.score}"],
            {name: -published[f"OOD_{name}/{row.score}"] for name in row.figures if name != "mean"},
            threshold="closest",
            resamples=0,
        )
    return {found.ood_set: (100 * found.metrics.fpr, 100 * found.metrics.auroc) for found in evaluation.rows}


def main() -> None:
    """Print the tables."""
    folder = os.environ.get("SETAR_DATA")
    if not folder:
        raise SystemExit("Set SETAR_DATA to the folder that has the published scores in scores/.")
    print(f"{'ID set':11}{'method':22}{'OOD set':12}{'':6}{'ours':>8}{'paper':>8}{'difference':>12}")
    worst = 0.0
    for row in TABLES_1_AND_15:
        ours = evaluated(row, Path(folder) / "scores")
        for ood_set, printed in row.figures.items():
            for figure, found, paper in zip(("FPR95", "AUROC"), ours[ood_set], printed, strict=True):
                worst = max(worst, abs(found - paper))
                where = f"{row.id_set:11}{row.method:22}{ood_set:12}{figure:6}"
                print(f"{where}{found:8.2f}{paper:8.2f}{found - paper:+12.4f}")
    print(f"Largest difference: {worst:.4f} percentage points; the paper's figures are rounded to 0.01.")


if __name__ == "__main__":
    main()

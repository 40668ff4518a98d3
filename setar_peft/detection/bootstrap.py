"""How far FPR and AUROC would move with other images: the bootstrap, over one model or paired over several.

The images of either side are drawn anew with replacement, as many as there are, and every figure is taken again, its
threshold included. All models, scores and OOD sets see the same draw of the ID images, all models and scores the same
draw of an OOD set's: what makes an image hard for every model then falls out of the difference of two.

How often an image is drawn is its weight: scores are ranked once, and a draw costs sums over ranks.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13 (two samples, percentiles).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from setar_peft.detection.metrics import Positive, ThresholdRule, as_scores

_Counts = NDArray[np.int64]


class Interval(NamedTuple):
    """Where a figure lies, or the difference of two.

    Attributes:
        low: The lower end, in the figure's units.
        high: The upper end.
    """

    low: float
    high: float

    @classmethod
    def of(cls, resampled: NDArray[np.float64], level: float = 0.95) -> Interval:
        """The percentile interval that holds that share of the resampled figures, (resamples,)."""
        low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
        return cls(float(low), float(high))


class Resampled(NamedTuple):
    """Figures of every resample.

    Attributes:
        fpr: False-positive rates, (resamples, OOD sets, columns).
        auroc: Areas under the ROC curve, (resamples, OOD sets, columns).
    """

    fpr: NDArray[np.float64]
    auroc: NDArray[np.float64]


class _Ranked:
    """The scores of one pair of sets, by their rank among the distinct values, the highest first."""

    def __init__(self, id_scores: NDArray[np.float64], ood_scores: NDArray[np.float64]) -> None:
        values, ranks = np.unique(-np.concatenate([id_scores, ood_scores]), return_inverse=True)
        self._size = len(values)
        self._id_ranks, self._ood_ranks = ranks[: len(id_scores)], ranks[len(id_scores) :]

    def figures(
        self, id_draws: _Counts, ood_draws: _Counts, positive: Positive, rule: ThresholdRule, tpr: float
    ) -> tuple[float, float]:
        """FPR and AUROC where each image counts as often as it was drawn: (n,) and (m,)."""
        at_id = np.bincount(self._id_ranks, id_draws, self._size)
        at_ood = np.bincount(self._ood_ranks, ood_draws, self._size)
        # Counts of images from the most ID-like score down to each, as float64, which holds them exactly.
        id_found, ood_found = at_id.cumsum(), at_ood.cumsum()
        n, m = id_found[-1], ood_found[-1]
        auroc = float(at_id @ (m - ood_found + at_ood / 2) / (n * m))
        if positive == "id":
            found, wrong = id_found / n, ood_found / m
        else:
            # From the most OOD-like score up, that score included.
            found, wrong = ((m - ood_found + at_ood) / m)[::-1], ((n - id_found + at_id) / n)[::-1]
        return _fpr(found, wrong, rule, tpr), auroc


def _fpr(found: NDArray[np.float64], wrong: NDArray[np.float64], rule: ThresholdRule, tpr: float) -> float:
    """The false-positive rate by the rules of `fpr_at_tpr`.

    Args:
        found: Share of the positive class found at each distinct score, the strictest threshold first.
        wrong: Share of the negative class taken for positive there. Scores that were not drawn repeat the one before.
        rule: How the threshold is chosen.
        tpr: The level.
    """
    if rule == "at_least":
        return float(wrong[np.searchsorted(found, tpr)])
    # Scores above the first that was drawn are no candidates, nor those below the first that finds everything.
    strictest = int(np.argmax((found > 0) | (wrong > 0)))
    candidates = np.arange(np.searchsorted(found, 1.0), strictest - 1, -1)
    return float(wrong[candidates[np.argmin(np.abs(found[candidates] - tpr))]])


def resample(
    id_scores: Sequence[NDArray[np.floating]],
    ood_scores: Mapping[str, Sequence[NDArray[np.floating]]],
    *,
    positive: Positive = "id",
    threshold: ThresholdRule = "at_least",
    tpr: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Resampled:
    """FPR and AUROC over resamples of the images, paired over all columns: every model and score.

    Args:
        id_scores: Scores of the same ID images, (n,) each, one array a column.
        ood_scores: Name of an OOD set -> scores of its images, (m,) each, in the same columns.
        positive: The positive class of the false-positive rate; see `setar_peft.detection.metrics.fpr_at_tpr`.
        threshold: How its threshold is chosen in each resample.
        tpr: Its level, 0 < tpr <= 1.
        resamples: How many times, at least 1.
        seed: Of the draws. Those of a set do not depend on the sets after it.

    Raises:
        ValueError: If a column is missing or of another length, or holds NaN or infinity, or the number of resamples is
            not positive.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples!r}; give a positive number, such as 1000.")
    columns = [as_scores("id_scores", scores) for scores in id_scores]
    sets = [[as_scores(f"scores of {name}", scores) for scores in side] for name, side in ood_scores.items()]
    for name, side in zip(["id_scores", *ood_scores], [columns, *sets], strict=True):
        lengths = [len(scores) for scores in side]
        if len(side) != len(columns) or len(set(lengths)) != 1:
            raise ValueError(
                f"{name} has columns of {lengths} scores, for {len(columns)} columns; give each column's scores of the "
                "same images, so that they can be paired."
            )
    ranked = [[_Ranked(*pair) for pair in zip(columns, side, strict=True)] for side in sets]
    generators = [np.random.default_rng([seed, place]) for place in range(1 + len(sets))]
    sizes = [len(columns[0]), *(len(side[0]) for side in sets)]
    figures = np.empty((resamples, len(sets), len(columns), 2))
    for figures_of_one in figures:
        id_draws, *ood_draws = (drawn(generator, size) for generator, size in zip(generators, sizes, strict=True))
        for row, draws, pairs in zip(figures_of_one, ood_draws, ranked, strict=True):
            for cell, pair in zip(row, pairs, strict=True):
                cell[:] = pair.figures(id_draws, draws, positive, threshold, tpr)
    return Resampled(figures[..., 0], figures[..., 1])


def drawn(generator: np.random.Generator, size: int) -> _Counts:
    """How often each of so many images is drawn when as many are drawn with replacement, (size,)."""
    return np.bincount(generator.integers(size, size=size), minlength=size)

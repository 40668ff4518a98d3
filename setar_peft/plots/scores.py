"""Figures of scores, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from setar_peft.detection.metrics import fpr_at_tpr
from setar_peft.plots.figure import ID_COLOUR, OOD_COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


ScoresBySet: TypeAlias = Mapping[str, NDArray[Any]]

_BINS = 30


def score_figure(before: ScoresBySet, after: ScoresBySet, score: str = "score", id_set: str = "ID") -> Figure:
    """Histograms of a score before and after, ID against each OOD set, with the threshold that keeps 95 % of ID.

    The shares are on a logarithmic axis: the tails decide.

    Args:
        before: Name of a set -> the base model's scores, (n,).
        after: The same sets -> the scores with the adapter.
        score: Name of the score, for the axes, with its temperature: see `Evaluation.score_label`.
        id_set: Which set is in-distribution; every other is an OOD set and gets a column.

    Raises:
        ValueError: If the sets do not fit each other, or matplotlib is missing.
    """
    ood_sets = ood_sets_of(before, after, id_set)
    figure = new_figure(width=max(6.4, 3.4 * len(ood_sets)), height=4.6)
    axes = figure.subplots(2, len(ood_sets), sharex=True, sharey=True, squeeze=False)
    draw_scores(axes, before, after, ood_sets, score, id_set)
    return figure


def ood_sets_of(before: ScoresBySet, after: ScoresBySet, id_set: str) -> list[str]:
    """The sets that are not in-distribution, in order.

    Raises:
        ValueError: If the sets before and after are not the same, or there is no OOD set.
    """
    if set(before) != set(after) or id_set not in before or len(before) < 2:
        raise ValueError(
            f"before has the sets {list(before)} and after {list(after)}; give both the set {id_set!r} and the same "
            "OOD sets, at least one."
        )
    return [name for name in before if name != id_set]


def draw_scores(
    axes: NDArray[Any], before: ScoresBySet, after: ScoresBySet, ood_sets: list[str], score: str, id_set: str
) -> None:
    """Draw histograms before and after, one column an OOD set, with the threshold that keeps 95 % of ID."""
    everything = np.concatenate([np.asarray(scores) for group in (before, after) for scores in group.values()])
    low, high = float(everything.min()), float(everything.max())
    # Equal scores everywhere still need a bin of some width.
    bins = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    for line, (title, group) in zip(axes, (("before", before), ("after", after)), strict=True):
        for column, (axis, name) in enumerate(zip(line, ood_sets, strict=True)):
            for label, colour in ((id_set, ID_COLOUR), (name, OOD_COLOURS[column % len(OOD_COLOURS)])):
                values = np.asarray(group[label])
                shares = np.full(len(values), 100 / len(values))
                axis.hist(values, bins=bins, weights=shares, color=colour, alpha=0.6, label=label)
            point = fpr_at_tpr(group[id_set], group[name])
            axis.axvline(point.threshold, color="black", linestyle="--", linewidth=1, label="95 % of ID above")
            axis.set_title(f"{title}: FPR95 {100 * point.fpr:.1f} %", fontsize=10)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("share of images (%)")
    for column, axis in enumerate(axes[0]):
        axis.legend(frameon=False, loc="upper left", fontsize=8)
        axes[1][column].set_xlabel(score)

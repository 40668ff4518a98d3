"""A search and what it did to the scores, in one figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from setar_peft.plots.figure import new_figure
from setar_peft.plots.scores import Convention, ScoresBySet, draw_scores, ood_sets_of
from setar_peft.plots.search import draw_ratios, towers_of
from setar_peft.search.trace import SearchTrace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def summary_figure(
    trace: SearchTrace,
    models: Mapping[str, ScoresBySet],
    score: str = "score",
    id_set: str = "ID",
    convention: Convention = Convention(),  # noqa: B008 - it cannot be changed
) -> Figure:
    """`rank_ratio_figure` above `score_figure`, in one picture.

    Args:
        trace: A search.
        models: "before" and "after" -> name of a set -> scores, (n,); or other models by name.
        score: Name of the score, for the axes, with its temperature.
        id_set: Which set is in-distribution.
        convention: Which threshold is drawn.

    Raises:
        ValueError: As `rank_ratio_figure` and `score_figure`.
    """
    towers, ood_sets = towers_of(trace), ood_sets_of(models, id_set)
    figure = new_figure(width=max(8.0, 3.4 * len(ood_sets)), height=8.0)
    halves: Any = figure.subfigures(2, 1, height_ratios=(2, 3))
    upper, lower = halves
    upper.suptitle("Chosen rank ratios", fontweight="bold")
    draw_ratios(list(upper.subplots(1, len(towers), sharey=True, squeeze=False)[0]), towers)
    lower.suptitle(f"{score} of in-distribution (ID) and OOD images", fontweight="bold")
    axes = lower.subplots(len(models), len(ood_sets), sharex=True, sharey=True, squeeze=False)
    draw_scores(axes, models, ood_sets, score, id_set, convention)
    return figure

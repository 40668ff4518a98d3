"""Figures of a search and of scores, with matplotlib (`pip install setar-peft[demo]`).

Each function returns a `matplotlib.figure.Figure` and touches no global state: save it with `savefig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from setar_peft.metrics import fpr_at_tpr
from setar_peft.search.trace import SearchTrace, TraceRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ScoresBySet: TypeAlias = Mapping[str, NDArray[Any]]

# Okabe and Ito's colours, which colour-blind readers tell apart; grey-blue for ID, warm ones first for OOD.
_ID_COLOUR = "#0072B2"
_OOD_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_WEIGHT_COLOURS = (_ID_COLOUR, *_OOD_COLOURS)
_BINS = 30


def rank_ratio_figure(trace: SearchTrace) -> Figure:
    """The chosen ratios by layer, one panel a tower (like the paper's Figure 7).

    Args:
        trace: A search; of several rows for one module the last counts.

    Raises:
        ValueError: If the trace has no row, or matplotlib is missing.
    """
    towers = _towers(trace)
    figure = _figure(width=max(6.4, 4.0 * len(towers)), height=3.2)
    axes = figure.subplots(1, len(towers), sharey=True, squeeze=False)[0]
    _draw_ratios(list(axes), towers)
    return figure


def search_figure(trace: SearchTrace) -> Figure:
    """A search at a glance: the chosen ratios by layer, the loss by step, and every candidate's loss as a heat map.

    Args:
        trace: A search.

    Raises:
        ValueError: If the trace has no row, or matplotlib is missing.
    """
    towers = _towers(trace)
    figure = _figure(width=max(8.0, 0.32 * len(trace.rows) + 3), height=8.4)
    halves: Any = figure.subfigures(2, 1, height_ratios=(2, 3))
    upper, lower = halves
    _draw_ratios(list(upper.subplots(1, len(towers), sharey=True, squeeze=False)[0]), towers)
    losses, candidates = lower.subplots(2, 1, sharex=True)
    _draw_losses(losses, trace)
    _draw_candidates(candidates, trace, lower)
    return figure


def score_figure(before: ScoresBySet, after: ScoresBySet, score: str = "score", id_set: str = "ID") -> Figure:
    """Histograms of a score before and after, ID against each OOD set, with the threshold that keeps 95 % of ID.

    The shares are on a logarithmic axis: a confident model's scores crowd at the top, and the tails decide.

    Args:
        before: Name of a set -> the base model's scores, (n,).
        after: The same sets -> the scores with the adapter.
        score: Name of the score, for the axes.
        id_set: Which set is in-distribution; every other is an OOD set and gets a column.

    Raises:
        ValueError: If the sets do not fit each other, or matplotlib is missing.
    """
    ood_sets = _ood_sets(before, after, id_set)
    figure = _figure(width=max(6.4, 3.4 * len(ood_sets)), height=4.6)
    axes = figure.subplots(2, len(ood_sets), sharex=True, sharey=True, squeeze=False)
    _draw_scores(axes, before, after, ood_sets, score, id_set)
    return figure


def summary_figure(
    trace: SearchTrace, before: ScoresBySet, after: ScoresBySet, score: str = "score", id_set: str = "ID"
) -> Figure:
    """`rank_ratio_figure` above `score_figure`, in one picture.

    Args:
        trace: A search.
        before: Name of a set -> the base model's scores, (n,).
        after: The same sets -> the scores with the adapter.
        score: Name of the score, for the axes.
        id_set: Which set is in-distribution.

    Raises:
        ValueError: As `rank_ratio_figure` and `score_figure`.
    """
    towers, ood_sets = _towers(trace), _ood_sets(before, after, id_set)
    figure = _figure(width=max(8.0, 3.4 * len(ood_sets)), height=8.0)
    halves: Any = figure.subfigures(2, 1, height_ratios=(2, 3))
    upper, lower = halves
    upper.suptitle("Chosen rank ratios", fontweight="bold")
    _draw_ratios(list(upper.subplots(1, len(towers), sharey=True, squeeze=False)[0]), towers)
    lower.suptitle(f"{score} of in-distribution (ID) and OOD images", fontweight="bold")
    axes = lower.subplots(2, len(ood_sets), sharex=True, sharey=True, squeeze=False)
    _draw_scores(axes, before, after, ood_sets, score, id_set)
    return figure


def check_matplotlib() -> None:
    """Raise a `ValueError` where matplotlib is missing, before anything long has run."""
    try:
        import matplotlib.figure  # noqa: F401 - only asked for
    except ImportError as error:
        raise ValueError("Figures need matplotlib, which is not installed: pip install setar-peft[demo]") from error


def _figure(width: float, height: float) -> Figure:
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _towers(trace: SearchTrace) -> dict[str, list[TraceRow]]:
    """The last row of every module by tower, from the bottom up."""
    if not trace.rows:
        raise ValueError("The trace has no row, so there is nothing to draw; give the trace of a search that ran.")
    latest = {row.module: row for row in trace.rows}
    towers: dict[str, list[TraceRow]] = {}
    for row in latest.values():
        towers.setdefault(row.tower_type, []).append(row)
    return {tower: sorted(rows, key=_height) for tower, rows in towers.items()}


def _height(row: TraceRow) -> tuple[bool, int]:
    return row.layer_num is None, row.layer_num or 0


def _ood_sets(before: ScoresBySet, after: ScoresBySet, id_set: str) -> list[str]:
    if set(before) != set(after) or id_set not in before or len(before) < 2:
        raise ValueError(
            f"before has the sets {list(before)} and after {list(after)}; give both the set {id_set!r} and the same "
            "OOD sets, at least one."
        )
    return [name for name in before if name != id_set]


def _draw_ratios(axes: list[Axes], towers: Mapping[str, list[TraceRow]]) -> None:
    weight_types = list(dict.fromkeys(row.weight_type for rows in towers.values() for row in rows))
    colours = {name: _WEIGHT_COLOURS[index % len(_WEIGHT_COLOURS)] for index, name in enumerate(weight_types)}
    for axis, (tower, rows) in zip(axes, towers.items(), strict=True):
        layers = list(dict.fromkeys(row.layer_num for row in rows))
        shown = list(dict.fromkeys(row.weight_type for row in rows))
        width = 0.8 / len(shown)
        for index, weight_type in enumerate(shown):
            bars = [row for row in rows if row.weight_type == weight_type]
            places = [layers.index(row.layer_num) + (index - (len(shown) - 1) / 2) * width for row in bars]
            drawn = axis.bar(
                places, [row.best_ratio for row in bars], width, color=colours[weight_type], label=weight_type
            )
            if len(rows) <= 24:
                axis.bar_label(drawn, [f"{row.best_ratio:g}" for row in bars], fontsize=8, padding=1)
        axis.set_xticks(range(len(layers)), ["head" if layer is None else str(layer) for layer in layers])
        axis.set(title=f"{tower} tower" if tower != "model" else "", xlabel="layer, from the bottom")
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of components removed")
    if len(weight_types) > 1:
        axes[-1].legend(frameon=False)
    elif weight_types:
        axes[0].set_ylabel(f"share of {weight_types[0]} removed")


def _draw_losses(axis: Axes, trace: SearchTrace) -> None:
    steps = [-1, *(row.step for row in trace.rows)]
    axis.step(steps, [trace.initial.total, *(row.total_loss for row in trace.rows)], where="post", color=_ID_COLOUR)
    chosen = [row for row in trace.rows if row.best_ratio > 0]
    axis.plot(
        [row.step for row in chosen], [row.total_loss for row in chosen], "o", color=_OOD_COLOURS[0], markersize=4
    )
    axis.set(ylabel="loss", title="best loss after each step (dots: a layer was truncated)")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_candidates(axis: Axes, trace: SearchTrace, figure: Any) -> None:
    ratios = sorted({candidate.rank_ratio for candidate in trace.candidates} | {row.best_ratio for row in trace.rows})
    # In the layer-exhaustive order several layers stand in one step: the best of them is shown.
    grid = np.full((len(ratios), len(trace.rows)), np.nan)
    for candidate in trace.candidates:
        place = ratios.index(candidate.rank_ratio), candidate.step
        grid[place] = np.nanmin([grid[place], candidate.total_loss])
    best = np.array([trace.initial.total, *(row.total_loss for row in trace.rows[:-1])])
    change = grid - best
    reach = float(np.nanmax(np.abs(change))) or 1.0 if np.isfinite(change).any() else 1.0
    image = axis.imshow(
        change, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto", origin="lower", interpolation="nearest"
    )
    axis.plot(
        [row.step for row in trace.rows], [ratios.index(row.best_ratio) for row in trace.rows], "k.", markersize=4
    )
    axis.set_yticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    axis.set_xticks(range(len(trace.rows)), [_label(row) for row in trace.rows], rotation=90, fontsize=8)
    axis.set(ylabel="ratio", title="each candidate's loss against the best before it (dots: chosen)")
    figure.colorbar(image, ax=axis, label="change of the loss")


def _label(row: TraceRow) -> str:
    layer = "" if row.layer_num is None else f" {row.layer_num}"
    return f"{row.tower_type}{layer} {row.weight_type}"


def _draw_scores(
    axes: NDArray[Any], before: ScoresBySet, after: ScoresBySet, ood_sets: list[str], score: str, id_set: str
) -> None:
    everything = np.concatenate([np.asarray(scores) for group in (before, after) for scores in group.values()])
    low, high = float(everything.min()), float(everything.max())
    # Equal scores everywhere still need a bin of some width.
    bins = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    for line, (title, group) in zip(axes, (("before", before), ("after", after)), strict=True):
        for column, (axis, name) in enumerate(zip(line, ood_sets, strict=True)):
            for label, colour in ((id_set, _ID_COLOUR), (name, _OOD_COLOURS[column % len(_OOD_COLOURS)])):
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

"""Figures of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from setar_peft.plots.figure import ID_COLOUR, OOD_COLOURS, new_figure
from setar_peft.search.trace import SearchTrace, TraceRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_WEIGHT_COLOURS = (ID_COLOUR, *OOD_COLOURS)


def rank_ratio_figure(trace: SearchTrace) -> Figure:
    """The chosen ratios by layer, one panel a tower (like the paper's Figure 7).

    Args:
        trace: A search; of several rows for one module the last counts.

    Raises:
        ValueError: If the trace has no row, or matplotlib is missing.
    """
    towers = towers_of(trace)
    figure = new_figure(width=max(6.4, 4.0 * len(towers)), height=3.2)
    axes = figure.subplots(1, len(towers), sharey=True, squeeze=False)[0]
    draw_ratios(list(axes), towers)
    return figure


def search_figure(trace: SearchTrace) -> Figure:
    """A search at a glance: the chosen ratios by layer, the loss by step, and every candidate's loss as a heat map.

    Args:
        trace: A search.

    Raises:
        ValueError: If the trace has no row, or matplotlib is missing.
    """
    towers = towers_of(trace)
    figure = new_figure(width=max(8.0, 0.32 * len(trace.rows) + 3), height=8.4)
    halves: Any = figure.subfigures(2, 1, height_ratios=(2, 3))
    upper, lower = halves
    draw_ratios(list(upper.subplots(1, len(towers), sharey=True, squeeze=False)[0]), towers)
    losses, candidates = lower.subplots(2, 1, sharex=True)
    _draw_losses(losses, trace)
    _draw_candidates(candidates, trace, lower)
    return figure


def towers_of(trace: SearchTrace) -> dict[str, list[TraceRow]]:
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


def draw_ratios(axes: list[Axes], towers: Mapping[str, list[TraceRow]]) -> None:
    """Draw the chosen ratios, one panel a tower, as `towers_of` gives them."""
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
    axis.step(steps, [trace.initial.total, *(row.total_loss for row in trace.rows)], where="post", color=ID_COLOUR)
    chosen = [row for row in trace.rows if row.best_ratio > 0]
    axis.plot([row.step for row in chosen], [row.total_loss for row in chosen], "o", color=OOD_COLOURS[0], markersize=4)
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

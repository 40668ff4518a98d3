"""Figures of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from setar_peft.plots.figure import ID_COLOUR, OOD_COLOURS, new_figure
from setar_peft.search.trace import Compared, SearchTrace, TraceRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


_PALETTE = (ID_COLOUR, *OOD_COLOURS)

_WEIGHT_TYPES = ("W_q", "W_k", "W_v", "W_o", "W_up", "W_down", "W_p")

# Evaluations that have no colour of their own: of a layer that another one was preferred to so far, and of several.
_UNDECIDED, _TOGETHER = "layers without a decision", "several layers at once"

# What is minimised, by criterion.
_LOSSES = {"total": "loss", "id": "ID loss", "ood": "OOD loss"}


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


def prediction_figure(trace: SearchTrace) -> Figure:
    """What a screened search predicted against what it then evaluated, one point an evaluation.

    Args:
        trace: A screened search.

    Raises:
        ValueError: If the trace has no row, is of a search that predicts nothing, or matplotlib is missing.
    """
    towers = towers_of(trace)
    if not trace.predictions:
        raise ValueError(
            "The trace is of a search that evaluates every candidate and predicts none, so there is nothing to "
            "compare; give the trace of one with search='screened' (--search screened)."
        )
    figure = new_figure(width=6.4, height=5.6)
    _draw_predictions(figure.subplots(), trace, towers)
    return figure


def search_figure(trace: SearchTrace) -> Figure:
    """A search at a glance: the chosen ratios by layer, the loss by step, and the candidates as heat maps.

    There is a heat map for each time that the search went through the layers. It shows how far each candidate's loss
    is from the best before it; of a screened search, how far it was predicted to be, and predicted against exact
    changes (`prediction_figure`) beside the ratios. The loss of the order "joint" is by evaluation.

    Args:
        trace: A search.

    Raises:
        ValueError: If the trace has no row, or matplotlib is missing.
    """
    towers, sweeps = towers_of(trace), _sweeps(trace)
    labels = [[_label(row) for row in rows] for rows in sweeps]
    # Names of layers stand below the last of those heat maps that have the same ones.
    is_labelled = [index == len(sweeps) - 1 or here != labels[index + 1] for index, here in enumerate(labels)]
    heights = [2.2, *(2.5 if below else 1.7 for below in is_labelled)]
    width = max(8.0, 0.18 * max(map(len, sweeps)) + 3)
    figure = new_figure(width=width + (4.5 if trace.predictions else 0.0), height=3.4 + sum(heights))
    halves: Any = figure.subfigures(2, 1, height_ratios=(3.4, sum(heights)))
    upper, lower = halves
    if trace.predictions:
        upper, right = upper.subfigures(1, 2, width_ratios=(width, 4.5))
        _draw_predictions(right.subplots(), trace, towers)
    draw_ratios(list(upper.subplots(1, len(towers), sharey=True, squeeze=False)[0]), towers)
    losses, *candidates = lower.subplots(len(heights), 1, height_ratios=heights)
    _draw_losses(losses, trace, sweeps)
    _draw_candidates(candidates, trace, sweeps, lower)
    for axis, names, below in zip(candidates, labels, is_labelled, strict=True):
        axis.set_xticks(range(len(names)), names if below else [""] * len(names), rotation=90, fontsize=8)
    if len(sweeps) == 1 and not trace.is_joint:
        losses.sharex(candidates[0])
        losses.tick_params(labelbottom=False)
    return figure


def towers_of(trace: SearchTrace) -> dict[str, list[TraceRow]]:
    """The last row of every module by tower, from the bottom up; the vision tower is the first."""
    if not trace.rows:
        raise ValueError("The trace has no row, so there is nothing to draw; give the trace of a search that ran.")
    latest = {row.module: row for row in trace.rows}
    towers: dict[str, list[TraceRow]] = {}
    for row in latest.values():
        towers.setdefault(row.tower_type, []).append(row)
    return {tower: sorted(towers[tower], key=_height) for tower in sorted(towers, key="text".__eq__)}


def _height(row: TraceRow) -> tuple[bool, int]:
    return row.layer_num is None, row.layer_num or 0


def draw_ratios(axes: list[Axes], towers: Mapping[str, list[TraceRow]]) -> None:
    """Draw the chosen ratios, one panel a tower, as `towers_of` gives them."""
    colours = _colours(towers)
    handles: dict[str, Any] = {}
    for axis, (tower, rows) in zip(axes, towers.items(), strict=True):
        layers = list(dict.fromkeys(row.layer_num for row in rows))
        shown = [weight_type for weight_type in colours if any(row.weight_type == weight_type for row in rows)]
        width = 0.8 / len(shown)
        for index, weight_type in enumerate(shown):
            bars = [row for row in rows if row.weight_type == weight_type]
            places = [layers.index(row.layer_num) + (index - (len(shown) - 1) / 2) * width for row in bars]
            drawn = axis.bar(
                places, [row.best_ratio for row in bars], width, color=colours[weight_type], label=weight_type
            )
            handles.setdefault(weight_type, drawn)
            if len(axes) * max(map(len, towers.values())) <= 24:
                axis.bar_label(drawn, [f"{row.best_ratio:g}" for row in bars], fontsize=8, padding=1)
        axis.set_xticks(range(len(layers)), ["head" if layer is None else str(layer) for layer in layers])
        axis.set(title=f"{tower} tower" if tower != "model" else "", xlabel="layer, from the bottom")
        axis.margins(y=0.15)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of components removed")
    if len(colours) > 1:
        axes[-1].legend(handles.values(), handles, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    else:
        axes[0].set_ylabel(f"share of {next(iter(colours))} removed")


def _colours(towers: Mapping[str, list[TraceRow]]) -> dict[str, str]:
    """A colour for each weight type, in the order in which they run within a block."""
    there = dict.fromkeys(row.weight_type for rows in towers.values() for row in rows)
    weight_types = [*filter(there.__contains__, _WEIGHT_TYPES), *(name for name in there if name not in _WEIGHT_TYPES)]
    return dict(zip(weight_types, cycle(_PALETTE), strict=False))


def _sweeps(trace: SearchTrace) -> list[list[TraceRow]]:
    """The rows of each time that the search went through the layers: a pass, or a round of the order "joint"."""
    sweeps: list[list[TraceRow]] = [[]]
    for row in trace.rows:
        if any(row.module == one.module for one in sweeps[-1]):
            sweeps.append([])
        sweeps[-1].append(row)
    return sweeps


def _draw_losses(axis: Axes, trace: SearchTrace, sweeps: list[list[TraceRow]]) -> None:
    base, what = trace.initial.part(trace.criterion), _LOSSES[trace.criterion]
    if trace.is_joint:
        tried = list({candidate.trial: trace.minimised(candidate) for candidate in trace.candidates}.values())
        best = list(accumulate((value if math.isfinite(value) else math.inf for value in tried), min, initial=base))
        axis.step(range(len(best)), best, where="post", color=ID_COLOUR)
        taken = [place for place in range(1, len(best)) if best[place] < best[place - 1]]
        others = [place for place in range(1, len(best)) if place not in taken]
        axis.plot(taken, [best[place] for place in taken], "o", color=OOD_COLOURS[0], markersize=4)
        axis.plot(others, [tried[place - 1] for place in others], "x", color="0.4", markersize=5)
        title = f"{what} of each evaluation of several layers (dots: taken; crosses: not)"
        axis.set(ylabel=what, xlabel="evaluation", title=title)
        axis.locator_params(axis="x", integer=True)
    else:
        steps = [-1, *(row.step for row in trace.rows)]
        axis.step(steps, [base, *map(trace.minimised, trace.rows)], where="post", color=ID_COLOUR)
        changed = trace.changed()
        axis.plot(
            [row.step for row in changed], list(map(trace.minimised, changed)), "o", color=OOD_COLOURS[0], markersize=4
        )
        for rows in sweeps[1:]:
            axis.axvline(rows[0].step - 0.5, color="0.8", linewidth=1, zorder=0)
        axis.set(ylabel=what, title=f"best {what} after each step (dots: a layer's ratio changed)")
        axis.locator_params(axis="x", integer=True)
        if len(sweeps) > 1:
            axis.set_xlabel("step")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_candidates(axes: list[Axes], trace: SearchTrace, sweeps: list[list[TraceRow]], figure: Any) -> None:
    """A heat map a sweep: of a screened search what its gradient predicted, of others what was evaluated."""
    ratios = sorted(
        {one.rank_ratio for one in trace.candidates}
        | {one.rank_ratio for one in trace.predictions}
        | {row.best_ratio for row in trace.rows}
    )
    grids = [_grid(trace, rows, ratios) for rows in sweeps]
    finite = np.abs(np.concatenate([grid[np.isfinite(grid)] for grid in grids]))
    # The darkest colours are left out: dots and rings are to be seen on the others.
    reach = 1.25 * float(finite.max(initial=0.0)) or 1.0
    sweep = "round" if trace.is_joint else "pass"
    what = (
        "each candidate's predicted change (rings: evaluated; dots: chosen)"
        if trace.predictions
        else f"each candidate's {_LOSSES[trace.criterion]} against the best before it (dots: chosen)"
    )
    for number, (axis, rows, grid) in enumerate(zip(axes, sweeps, grids, strict=True), 1):
        image = axis.imshow(
            grid, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto", origin="lower", interpolation="nearest"
        )
        if trace.predictions:
            columns = {row.module: column for column, row in enumerate(rows)}
            steps = {row.step for row in rows}
            rings = {
                (columns[one.module], ratios.index(one.rank_ratio))
                for one in trace.candidates
                if one.step in steps and one.module in columns
            }
            axis.plot(*_both(sorted(rings)), "ko", markersize=5, markerfacecolor="none")
        axis.plot(
            *_both([(column, ratios.index(row.best_ratio)) for column, row in enumerate(rows)]), "k.", markersize=4
        )
        axis.set_yticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios], fontsize=8)
        named = [f"{sweep} {number}"] if len(sweeps) > 1 else []
        axis.set(ylabel="ratio", title=": ".join([*named, *([what] if number == 1 else [])]))
    figure.colorbar(image, ax=axes, label=f"change of the {_LOSSES[trace.criterion]}")


def _grid(trace: SearchTrace, rows: list[TraceRow], ratios: list[float]) -> NDArray[np.float64]:
    """Changes of what is minimised, (ratios, rows of a sweep); NaN where nothing is known."""
    grid = np.full((len(ratios), len(rows)), np.nan)
    first = rows[0].step
    if trace.predictions:
        changes = {(one.module, one.rank_ratio): one.change for one in trace.predictions if one.step == first}
        return np.array([[changes.get((row.module, ratio), np.nan) for row in rows] for ratio in ratios])
    before = [trace.initial.part(trace.criterion), *map(trace.minimised, trace.rows)]
    for candidate in trace.candidates:
        column = candidate.step - first
        if 0 <= column < len(rows):
            # In the layer-exhaustive order several layers stand in one step: the best of them is shown.
            place = ratios.index(candidate.rank_ratio), column
            grid[place] = np.nanmin([grid[place], trace.minimised(candidate) - before[candidate.step]])
    return grid


def _both(places: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [x for x, _ in places], [y for _, y in places]


def _draw_predictions(axis: Axes, trace: SearchTrace, towers: Mapping[str, list[TraceRow]]) -> None:
    what, compared = _LOSSES[trace.criterion], trace.compared()
    points = [one for one in compared if math.isfinite(one.predicted) and math.isfinite(one.exact)]
    colours = _colours(towers)
    if by_tower := len(colours) == 1:
        colours = {
            f"{tower} tower" if tower != "model" else tower: colour
            for tower, colour in zip(towers, _PALETTE, strict=False)
        }
    rows = {row.module: row for row in trace.rows}
    groups: dict[str, list[Compared]] = {kind: [] for kind in (*colours, _UNDECIDED, _TOGETHER)}
    for one in points:
        row = rows.get(one.module)
        if one.layers > 1 or row is None:
            groups[_TOGETHER if one.layers > 1 else _UNDECIDED].append(one)
        elif by_tower:
            groups[f"{row.tower_type} tower" if row.tower_type != "model" else "model"].append(one)
        else:
            groups[row.weight_type].append(one)
    for kind, group in groups.items():
        looks = {"marker": "D", "markerfacecolor": "none"} if kind == _TOGETHER else {"marker": "o", "alpha": 0.8}
        if group:
            axis.plot(*_changes(group), color=colours.get(kind, "k"), markersize=5, linewidth=0, label=kind, **looks)
    axis.axline((0, 0), slope=1, color="0.5", linewidth=1, linestyle="--", zorder=0, label="as predicted")
    axis.axhline(0, color="0.85", linewidth=1, zorder=-1)
    axis.axvline(0, color="0.85", linewidth=1, zorder=-1)
    axis.margins(0.08)
    title = f"{len(points) or 'no'} evaluation{'s' if len(points) > 1 else ''}"
    predicted, exact = _changes(points)
    if len(points) >= 3 and len(set(predicted)) > 1 and len(set(exact)) > 1:
        title += f", rank correlation {spearmanr(predicted, exact).statistic:.2f}"
    if len(points) < len(compared):
        title += f"\n({len(compared) - len(points)} not finite, left out)"
    axis.set(xlabel=f"predicted change of the {what}", ylabel=f"exact change of the {what}", title=title)
    axis.spines[["top", "right"]].set_visible(False)
    axis.locator_params(nbins=5)
    axis.legend(fontsize=8, loc="best", framealpha=0.7, edgecolor="none")


def _changes(points: Sequence[Compared]) -> tuple[list[float], list[float]]:
    return [one.predicted for one in points], [one.exact for one in points]


def _label(row: TraceRow) -> str:
    layer = "" if row.layer_num is None else f" {row.layer_num}"
    return f"{row.tower_type}{layer} {row.weight_type}"

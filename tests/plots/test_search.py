"""Figures of searches: what they show is read back from what is drawn, and compared with the trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from setar_peft import SeTARConfig, plots, search_rank_ratios
from setar_peft.objectives.loss import LossValues
from setar_peft.search.trace import SearchTrace, TraceCandidate, TracePrediction, TraceRow

_W_Q_AND_W_UP = ["mlp.fc1", "self_attn.q_proj"]
_TRACES: dict[str, SearchTrace] = {}


@pytest.fixture
def searched(load_clip: Callable[..., Any], clip_objective: Callable[..., Any]) -> Callable[..., SearchTrace]:
    """The trace of a search on the golden CLIP; the same settings are searched once."""

    def search(**settings: Any) -> SearchTrace:
        key = repr(sorted(settings.items()))
        if key not in _TRACES:
            config = SeTARConfig(candidate_ratios=[0.1, 0.2, 0.4], **settings)
            _TRACES[key] = search_rank_ratios(load_clip(), clip_objective(), config, progress=False).trace
        return _TRACES[key]

    return search


def _marked(axis: Any) -> dict[str, list[tuple[float, float]]]:
    """The points of an axis by their label, and what marks them for those without one."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in axis.lines:
        label = line.get_label()
        if line.get_marker() not in ("", "None"):
            name = line.get_marker() if label.startswith("_") else label
            points.setdefault(name, []).extend(zip(*map(np.ndarray.tolist, line.get_data(orig=False)), strict=True))
    return points


def _scatter(figure: Any) -> Any:
    (axis,) = [axis for axis in figure.axes if axis.get_xlabel().startswith("predicted change")]
    return axis


def _heat_maps(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.images]


def _losses(figure: Any) -> Any:
    (axis,) = [axis for axis in figure.axes if axis.get_ylabel() in ("loss", "ID loss")]
    return axis


def _best_before(trace: SearchTrace, step: int, column: str = "total_loss") -> float:
    return getattr(trace.rows[step - 1], column) if step else trace.initial.part(trace.criterion)


@pytest.mark.parametrize("order", ["vision_text", "best_first"])
def test_a_point_is_what_was_predicted_and_what_came_of_it(searched: Callable[..., SearchTrace], order: str) -> None:
    trace = searched(search="screened", order=order)
    axis = plots.prediction_figure(trace).axes[0]
    predicted = {(one.module, one.rank_ratio): one.change for one in trace.predictions}
    expected: dict[str, list[tuple[float, float]]] = {"vision tower": [], "text tower": []}
    for one in trace.candidates:
        point = predicted[one.module, one.rank_ratio], one.total_loss - _best_before(trace, one.step)
        expected[f"{trace.rows[one.step].tower_type} tower"].append(point)
    drawn = _marked(axis)
    assert drawn.keys() == expected.keys()
    for tower, points in expected.items():
        assert drawn[tower] == [pytest.approx(point, abs=1e-12) for point in points]
    ranks = np.argsort(np.argsort([point for points in expected.values() for point in points], axis=0), axis=0)
    correlation = np.corrcoef(ranks.T)[0, 1]
    assert axis.get_title() == f"{len(trace.candidates)} evaluations, rank correlation {correlation:.2f}"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted change of the loss", "exact change of the loss")
    diagonal = next(line for line in axis.lines if line.get_label() == "as predicted")
    assert (diagonal.get_xy1(), diagonal.get_slope()) == ((0, 0), 1)


def test_layers_that_changed_at_once_are_one_point_of_another_kind(searched: Callable[..., SearchTrace]) -> None:
    trace = searched(search="screened", order="joint", target_modules=_W_Q_AND_W_UP)
    axis = plots.prediction_figure(trace).axes[0]
    trials: dict[int, list[TraceCandidate]] = {}
    for one in trace.candidates:
        assert one.trial is not None
        trials.setdefault(one.trial, []).append(one)
    starts = sorted({one.step for one in trace.predictions})
    expected: dict[str, list[tuple[float, float]]] = {}
    for changes in trials.values():
        start = max(step for step in starts if step <= changes[0].step)
        of_round = {(one.module, one.rank_ratio): one.change for one in trace.predictions if one.step == start}
        point = (
            sum(of_round[one.module, one.rank_ratio] for one in changes),
            changes[0].total_loss - _best_before(trace, start),
        )
        is_alone = len(changes) == 1
        kind = trace.rows[changes[0].step].weight_type if is_alone else "several layers at once"
        expected.setdefault(kind, []).append(point)
    drawn = _marked(axis)
    assert len(drawn["several layers at once"]) >= 2
    assert drawn == {kind: [pytest.approx(point, abs=1e-12) for point in points] for kind, points in expected.items()}
    diamonds = next(line for line in axis.lines if line.get_label() == "several layers at once")
    assert (diamonds.get_marker(), diamonds.get_markerfacecolor()) == ("D", "none")


def test_weight_types_have_the_same_colours_in_both_panels(searched: Callable[..., SearchTrace]) -> None:
    trace = searched(search="screened", order="best_first", target_modules=_W_Q_AND_W_UP)
    figure = plots.search_figure(trace)
    vision, text = figure.axes[1:3]
    # Best first may begin with either: the vision tower stands first, and what runs first within a block.
    assert (vision.get_title(), text.get_title()) == ("vision tower", "text tower")
    legend = text.get_legend()
    assert [label.get_text() for label in legend.get_texts()] == ["W_q", "W_up"]
    bars = {
        label.get_text(): bar.get_facecolor() for label, bar in zip(legend.texts, legend.get_patches(), strict=True)
    }
    points = {line.get_label(): line.get_color() for line in _scatter(figure).lines if line.get_marker() == "o"}
    assert points.keys() == bars.keys()
    assert {name: to_rgba(colour) for name, colour in points.items()} == bars


@pytest.mark.parametrize("order", ["vision_text", "best_first"])
def test_a_heat_map_shows_every_prediction_and_what_became_of_it(
    searched: Callable[..., SearchTrace], order: str
) -> None:
    trace = searched(search="screened", order=order)
    figure = plots.search_figure(trace)
    (axis,) = _heat_maps(figure)
    predicted = {(one.module, one.rank_ratio): one.change for one in trace.predictions}
    ratios, modules = [0.0, 0.1, 0.2, 0.4], [row.module for row in trace.rows]
    expected = [[predicted[module, ratio] for module in modules] for ratio in ratios]
    np.testing.assert_allclose(axis.images[0].get_array(), expected, atol=1e-12)
    marked = _marked(axis)
    assert set(marked["o"]) == {(modules.index(one.module), ratios.index(one.rank_ratio)) for one in trace.candidates}
    assert marked["."] == [(column, ratios.index(row.best_ratio)) for column, row in enumerate(trace.rows)]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "0.1", "0.2", "0.4"]
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == [f"{row.tower_type} {row.layer_num} {row.weight_type}" for row in trace.rows]
    assert axis.get_title() == "each candidate's predicted change (rings: evaluated; dots: chosen)"
    losses = _losses(figure)
    assert losses.lines[0].get_ydata().tolist() == [trace.initial.total, *(row.total_loss for row in trace.rows)]
    assert losses.get_xlim() == axis.get_xlim()


def test_rounds_have_a_heat_map_each_and_evaluations_a_loss(searched: Callable[..., SearchTrace]) -> None:
    trace = searched(search="screened", order="joint", target_modules=_W_Q_AND_W_UP)
    figure = plots.search_figure(trace)
    layers = len({row.module for row in trace.rows})
    maps = _heat_maps(figure)
    assert len(maps) == len(trace.rows) // layers >= 2
    for number, axis in enumerate(maps):
        assert axis.get_title().startswith(f"round {number + 1}")
        rows = trace.rows[number * layers : (number + 1) * layers]
        of_round = {(one.module, one.rank_ratio): one.change for one in trace.predictions if one.step == rows[0].step}
        expected = [[of_round[row.module, ratio] for row in rows] for ratio in (0.0, 0.1, 0.2, 0.4)]
        np.testing.assert_allclose(axis.images[0].get_array(), expected, atol=1e-12)
        rings = {
            (one.step - rows[0].step, [0.0, 0.1, 0.2, 0.4].index(one.rank_ratio))
            for one in trace.candidates
            if rows[0].step <= one.step <= rows[-1].step
        }
        assert set(_marked(axis).get("o", [])) == rings
        # The same layers in the same places: their names stand below the last.
        names = [label.get_text() for label in axis.get_xticklabels()]
        assert any(names) is (number == len(maps) - 1)
    tried = {one.trial: one.total_loss for one in trace.candidates}
    best = np.minimum.accumulate([trace.initial.total, *tried.values()])
    losses = _losses(figure)
    assert losses.get_xlabel() == "evaluation"
    np.testing.assert_allclose(losses.lines[0].get_data(), [range(len(best)), best])
    marked = _marked(losses)
    assert len(marked["o"]) == len({row.total_loss for row in trace.rows} - {trace.initial.total})
    assert sorted(marked["o"] + marked["x"]) == [
        (place, pytest.approx(loss)) for place, loss in enumerate(tried.values(), 1)
    ]


def test_passes_have_a_heat_map_each_and_a_dot_is_a_change(searched: Callable[..., SearchTrace]) -> None:
    trace = searched(passes=2, criterion="id")
    figure = plots.search_figure(trace)
    maps, layers = _heat_maps(figure), len({row.module for row in trace.rows})
    assert len(trace.rows) == 2 * layers
    assert [axis.get_title() for axis in maps] == [
        "pass 1: each candidate's ID loss against the best before it (dots: chosen)",
        "pass 2",
    ]
    for number, axis in enumerate(maps):
        grid = np.full((4, layers), np.nan)
        for one in trace.candidates:
            if one.step // layers == number:
                place = [0.0, 0.1, 0.2, 0.4].index(one.rank_ratio), one.step % layers
                grid[place] = one.id_loss - _best_before(trace, one.step, "id_loss")
        np.testing.assert_allclose(axis.images[0].get_array().filled(np.nan), grid, atol=1e-12)
    losses = _losses(figure)
    assert losses.get_ylabel() == "ID loss"
    assert losses.lines[0].get_ydata().tolist() == [trace.initial.id_loss, *(row.id_loss for row in trace.rows)]
    ratios = dict.fromkeys((row.module for row in trace.rows), 0.0)
    changes = []
    for row in trace.rows:
        if row.best_ratio != ratios[row.module]:
            changes.append((row.step, row.id_loss))
        ratios[row.module] = row.best_ratio
    assert _marked(losses)["o"] == changes
    assert len(changes) < sum(row.best_ratio > 0 for row in trace.rows)


def test_in_the_exhaustive_order_the_best_of_a_step_is_shown(searched: Callable[..., SearchTrace]) -> None:
    trace = searched(order="exhaustive")
    (axis,) = _heat_maps(plots.search_figure(trace))
    grid = np.full((4, len(trace.rows)), np.inf)
    for one in trace.candidates:
        place = [0.0, 0.1, 0.2, 0.4].index(one.rank_ratio), one.step
        grid[place] = min(grid[place], one.total_loss - _best_before(trace, one.step))
    np.testing.assert_allclose(axis.images[0].get_array().filled(np.inf), grid, atol=1e-12)


def test_layers_that_were_evaluated_and_not_decided_yet_are_shown(searched: Callable[..., SearchTrace]) -> None:
    """As an interrupted search in the exhaustive order has them."""
    whole = searched(search="screened", order="exhaustive")
    candidates = [one for one in whole.candidates if one.step == 0]
    trace = SearchTrace(whole.initial, whole.rows[:1], candidates, whole.settings, whole.predictions)
    drawn = _marked(_scatter(plots.search_figure(trace)))
    tower = f"{trace.rows[0].tower_type} tower"
    assert {kind: len(points) for kind, points in drawn.items()} == {
        tower: sum(one.module == trace.rows[0].module for one in candidates),
        "layers without a decision": sum(one.module != trace.rows[0].module for one in candidates),
    }


def _made(losses: list[float], changes: list[float]) -> SearchTrace:
    """A trace by hand: a layer a candidate."""
    rows = [
        TraceRow(step, "vision", "W_up", step, 0.0, 1.0, 1.0, 0.0, 50.0, 10.0, f"layer{step}")
        for step in range(len(losses))
    ]
    candidates = [
        TraceCandidate(step, f"layer{step}", 0.1, loss, loss, 0.0, 0.5, 0.1) for step, loss in enumerate(losses)
    ]
    predictions = [TracePrediction(0, f"layer{step}", 0.1, change, 0.1) for step, change in enumerate(changes)]
    return SearchTrace(LossValues(1.0), rows, candidates, {}, predictions)


@pytest.mark.parametrize(
    ("losses", "changes", "title"),
    [
        ([1.5, 2.0], [0.1, 0.2], "2 evaluations"),
        ([1.5], [0.1], "1 evaluation"),
        ([1.5, 2.0, 3.0], [0.1, 0.1, 0.1], "3 evaluations"),
        ([1.5, 2.0, 3.0], [0.3, 0.2, 0.1], "3 evaluations, rank correlation -1.00"),
        (
            [1.5, math.inf, 3.0, 4.0],
            [0.1, 0.2, 0.3, 0.4],
            "3 evaluations, rank correlation 1.00\n(1 not finite, left out)",
        ),
    ],
)
def test_a_correlation_is_told_of_three_points_that_differ(
    losses: list[float], changes: list[float], title: str
) -> None:
    figure = plots.search_figure(_made(losses, changes))
    axis = _scatter(figure)
    assert axis.get_title() == title
    points = [
        (change, pytest.approx(loss - 1)) for change, loss in zip(changes, losses, strict=True) if math.isfinite(loss)
    ]
    assert _marked(axis) == {"vision tower": points}


def test_without_an_evaluation_there_is_no_point() -> None:
    trace = _made([1.5, 2.0], [0.1, 0.2])
    trace.candidates.clear()
    figure = plots.search_figure(trace)
    assert _scatter(figure).get_title() == "no evaluation"
    assert _marked(_scatter(figure)) == {}
    assert _marked(_heat_maps(figure)[0])["o"] == []


def test_names_of_sixty_layers_in_three_rounds_do_not_overlap() -> None:
    kinds = ["W_q", "W_k", "W_v", "W_o", "W_up", "W_down"]
    layers = [("vision", level, kind) for level in range(6) for kind in kinds]
    layers += [("text", level, kind) for level in range(4) for kind in kinds]
    rows, candidates, predictions = [], [], []
    for number in range(3):
        for tower, level, kind in layers:
            step, name = len(rows), f"{tower}.{level}.{kind}"
            rows.append(TraceRow(step, tower, kind, level, 0.1, 0.9, 0.9, 0.0, 50.0, 10.0, name))
            candidates.append(TraceCandidate(step, name, 0.1, 0.9, 0.9, 0.0, 0.5, 0.1, number))
            predictions.append(TracePrediction(60 * number, name, 0.1, -0.01, 0.1))
    figure = plots.search_figure(SearchTrace(LossValues(1.0), rows, candidates, {"order": "joint"}, predictions))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert max(figure.get_size_inches()) < 20
    for axis in figure.axes:
        for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
            boxes = [label.get_window_extent() for label in labels if label.get_text()]
            assert not any(one.overlaps(other) for one, other in pairwise(boxes)), axis.get_title()
    assert not any(axis.texts for axis in figure.axes[1:3])  # no numbers on bars as narrow as these


def test_a_search_that_predicts_nothing_has_nothing_to_compare(searched: Callable[..., SearchTrace]) -> None:
    trace = searched(order="exhaustive")
    with pytest.raises(ValueError, match="The trace is of a search that evaluates every candidate") as error:
        plots.prediction_figure(trace)
    for piece in ("predicts none", "search='screened'", "--search screened"):
        assert piece in str(error.value)
    with pytest.raises(ValueError, match="The trace has no row"):
        plots.prediction_figure(SearchTrace(LossValues(1.0)))
    # Its figure is as ever, without the panel.
    assert not any(axis.get_xlabel().startswith("predicted") for axis in plots.search_figure(trace).axes)

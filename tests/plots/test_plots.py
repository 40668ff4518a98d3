from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from setar_peft import plots
from setar_peft.detection.metrics import auroc, fpr_at_tpr
from setar_peft.objectives.loss import LossValues
from setar_peft.search.trace import SearchTrace, TraceRow


def trace_of(*rows: tuple[str, str, int | None, float]) -> SearchTrace:
    return SearchTrace(
        LossValues(1.0),
        [
            TraceRow(step, tower, weight, layer, ratio, 1.0, 1.0, 0.0, 50.0, 10.0, f"{tower}.{layer}.{weight}")
            for step, (tower, weight, layer, ratio) in enumerate(rows)
        ],
    )


TRACE = trace_of(
    ("vision", "W_up", 1, 0.4), ("vision", "W_up", 0, 0.0), ("text", "W_up", 1, 0.05), ("text", "W_up", 0, 0.2)
)


def scores(**sets: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {name: generator.uniform(size=size).astype(np.float32) for name, size in sets.items()}


SCORES = scores(ID=30, noise=20, photographs=10)
TWICE = {"before": SCORES, "after": SCORES}


def heights(axes: Any) -> list[float]:
    return [patch.get_height() for patch in axes.patches]


def test_ratios_are_bars_by_layer_from_the_bottom_one_panel_a_tower() -> None:
    figure = plots.rank_ratio_figure(TRACE)
    vision, text = figure.axes
    assert (vision.get_title(), text.get_title()) == ("vision tower", "text tower")
    assert heights(vision) == [0.0, 0.4]
    assert heights(text) == [0.2, 0.05]
    assert vision.get_ylabel() == "share of W_up removed"


def test_the_last_row_of_a_module_counts() -> None:
    figure = plots.rank_ratio_figure(trace_of(("vision", "W_up", 0, 0.1), ("vision", "W_up", 0, 0.3)))
    assert heights(figure.axes[0]) == [0.3]


def test_weight_types_stand_side_by_side_with_a_legend() -> None:
    rows = [("vision", "W_q", 0, 0.1), ("vision", "W_up", 0, 0.3), ("vision", "W_p", None, 0.2)]
    (axes,) = plots.rank_ratio_figure(trace_of(*rows)).axes
    assert sorted(heights(axes)) == [0.1, 0.2, 0.3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["W_q", "W_up", "W_p"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "head"]
    assert len({round(patch.get_x(), 6) for patch in axes.patches}) == 3


def test_histograms_add_up_to_all_images_of_both_sets() -> None:
    figure = plots.score_figure(TWICE, "mcm")
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert sum(heights(axes)) == pytest.approx(200)
        assert "FPR95" in axes.get_title()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()][:2] == ["ID", "noise"]


@pytest.mark.parametrize("positive", ["id", "ood"])
@pytest.mark.parametrize("threshold", ["at_least", "closest"])
@pytest.mark.parametrize("tpr", [0.95, 0.8])
def test_the_threshold_is_the_conventions(positive: Any, threshold: Any, tpr: float) -> None:
    convention = plots.Convention(positive, threshold, tpr)
    expected = fpr_at_tpr(SCORES["ID"], SCORES["noise"], tpr, positive=positive, threshold=threshold)
    axes = plots.score_figure({"base": SCORES}, convention=convention).axes[0]
    (line,) = axes.lines
    assert line.get_xdata()[0] == expected.threshold
    assert f"base: FPR{100 * tpr:g} {100 * expected.fpr:.1f} %" == axes.get_title()
    meaning = axes.get_legend().get_texts()[-1].get_text()
    assert meaning.endswith(f"{100 * tpr:g} % of {'ID above' if positive == 'id' else 'OOD below'}")
    assert meaning.startswith("about") is (threshold == "closest")
    curves = plots.roc_figure({"base": SCORES}, convention=convention).axes[0]
    dot = curves.lines[1]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (100 * expected.fpr, 100 * expected.tpr)
    assert curves.get_xlabel().startswith("OOD taken" if positive == "id" else "ID taken")


def test_roc_curves_are_one_a_model_with_the_area_below() -> None:
    figure = plots.roc_figure({"base": SCORES, "SeTAR": scores(ID=30, noise=20, photographs=10)}, "mcm")
    assert [axes.get_title() for axes in figure.axes] == ["noise", "photographs"]
    for axes, name in zip(figure.axes, ("noise", "photographs"), strict=True):
        (label, _) = [text.get_text() for text in axes.get_legend().get_texts()]
        assert label.startswith(f"base: AUROC {100 * auroc(SCORES['ID'], SCORES[name]):.2f}")
        wrong, found = axes.lines[0].get_data()
        assert np.trapezoid(found, wrong) / 1e4 == pytest.approx(auroc(SCORES["ID"], SCORES[name]))


def test_many_sets_go_below_one_another() -> None:
    many = scores(ID=30, **{f"set{number}": 10 for number in range(5)})
    for figure, panels in ((plots.roc_figure({"a": many}), 5), (plots.score_figure({"a": many, "b": many}), 10)):
        assert sum(axes.get_visible() for axes in figure.axes) == panels
        assert figure.axes[0].get_subplotspec().get_gridspec().ncols == 3


def test_equal_scores_can_be_drawn() -> None:
    same = {"ID": np.ones(3), "noise": np.ones(2)}
    assert len(plots.score_figure({"before": same, "after": same}).axes) == 2


def test_the_summary_has_both_and_is_written_without_pyplot(tmp_path: Any) -> None:
    figure = plots.summary_figure(TRACE, TWICE, "gl_mcm")
    assert len(figure.axes) == 2 + 4
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.rank_ratio_figure(SearchTrace(LossValues(1.0))), "The trace has no row"),
        (
            lambda: plots.score_figure({"base": scores(noise=3)}),
            r"base has the sets \['noise'\]; give each the set 'ID'",
        ),
        (lambda: plots.score_figure({"base": scores(ID=3)}), "at least one"),
        (lambda: plots.roc_figure({}), "There are no models"),
        (lambda: plots.score_figure({"b": scores(ID=3, a=3), "c": scores(ID=3, b=3)}), "the same OOD sets"),
    ],
)
def test_wrong_input_gets_a_sentence(draw: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"pip install setar-peft\[demo\]"):
        plots.rank_ratio_figure(TRACE)

"""Figures of scores: histograms and ROC curves of one or several models, at the evaluation's own convention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from setar_peft.detection.metrics import OperatingPoint, Positive, ThresholdRule, fpr_at_tpr
from setar_peft.plots.figure import ID_COLOUR, OOD_COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ScoresBySet: TypeAlias = Mapping[str, NDArray[Any]]

_BINS = 30
# OOD sets side by side; more go below, so that a figure can be read at the width of a page.
_COLUMNS = 4
_MODEL_COLOURS = (ID_COLOUR, *OOD_COLOURS)


class Convention(NamedTuple):
    """Where a figure draws its threshold; see `setar_peft.detection.metrics.fpr_at_tpr`.

    Attributes:
        positive: The positive class, "id" or "ood".
        threshold: How the threshold is chosen, "at_least" or "closest".
        tpr: The level, 0 < tpr <= 1.
    """

    positive: Positive = "id"
    threshold: ThresholdRule = "at_least"
    tpr: float = 0.95

    def point(self, id_scores: NDArray[Any], ood_scores: NDArray[Any]) -> OperatingPoint:
        """The threshold, and what it does."""
        return fpr_at_tpr(id_scores, ood_scores, self.tpr, positive=self.positive, threshold=self.threshold)

    def threshold_label(self) -> str:
        """What the line at the threshold means."""
        side = "ID above" if self.positive == "id" else "OOD below"
        return f"{'' if self.threshold == 'at_least' else 'about '}{100 * self.tpr:g} % of {side}"

    def title(self, point: OperatingPoint) -> str:
        """The figure at that threshold, in percent."""
        return f"FPR{100 * self.tpr:g} {100 * point.fpr:.1f} %"


def score_figure(
    models: Mapping[str, ScoresBySet],
    score: str = "score",
    id_set: str = "ID",
    convention: Convention = Convention(),  # noqa: B008 - it cannot be changed
) -> Figure:
    """Histograms of a score, ID against each OOD set, one line of panels a model, with the convention's threshold.

    The shares are on a logarithmic axis: the tails decide.

    Args:
        models: Name of a model, or "before" and "after" -> name of a set -> scores, (n,). All have the same sets.
        score: Name of the score, for the axes, with its temperature: see `Evaluation.score_label`.
        id_set: Which set is in-distribution; every other is an OOD set and gets a column.
        convention: Which threshold is drawn.

    Raises:
        ValueError: If the sets do not fit each other, or matplotlib is missing.
    """
    lines = list(_lines(ood_sets_of(models, id_set)))
    columns = len(lines[0])
    figure = new_figure(width=max(6.4, 3.4 * columns), height=0.4 + 2.1 * len(models) * len(lines))
    axes = figure.subplots(len(models) * len(lines), columns, sharex=True, sharey=True, squeeze=False)
    for place, line in enumerate(lines):
        part = axes[place * len(models) : (place + 1) * len(models)]
        draw_scores(part, models, line, score, id_set, convention)
        for axis in part[:, len(line) :].flat:
            axis.set_visible(False)
    return figure


def roc_figure(
    models: Mapping[str, ScoresBySet],
    score: str = "score",
    id_set: str = "ID",
    convention: Convention = Convention(),  # noqa: B008 - it cannot be changed
) -> Figure:
    """ROC curves, one panel an OOD set and one curve a model, with a dot where the convention reads the FPR off.

    Args:
        models: As for `score_figure`.
        score: Name of the score, for the title.
        id_set: Which set is in-distribution.
        convention: The positive class of the curves, and the threshold of the dots.

    Raises:
        ValueError: If the sets do not fit each other, or matplotlib is missing.
    """
    lines = list(_lines(ood_sets_of(models, id_set)))
    columns = len(lines[0])
    figure = new_figure(width=max(5.0, 3.2 * columns), height=0.6 + 3.2 * len(lines))
    figure.suptitle(score, fontsize=11)
    axes = figure.subplots(len(lines), columns, sharex=True, sharey=True, squeeze=False)
    positive, negative = ("ID", "OOD") if convention.positive == "id" else ("OOD", "ID")
    for line, names in zip(axes, lines, strict=True):
        for axis, name in zip(line, names, strict=False):
            _draw_curves(axis, models, name, id_set, convention)
            axis.set_title(name, fontsize=10)
        for axis in line[len(names) :]:
            axis.set_visible(False)
        line[0].set_ylabel(f"{positive} found (%)")
    for axis in axes[-1]:
        axis.set_xlabel(f"{negative} taken for {positive} (%)")
    return figure


def ood_sets_of(models: Mapping[str, ScoresBySet], id_set: str) -> list[str]:
    """The sets that are not in-distribution, in order.

    Raises:
        ValueError: If the models do not have the same sets, or there is no OOD set.
    """
    sets = {model: list(group) for model, group in models.items()}
    first = next(iter(sets.values()), [])
    if any(set(group) != set(first) for group in sets.values()) or id_set not in first or len(first) < 2:
        listed = ", ".join(f"{model} has the sets {group}" for model, group in sets.items()) or "There are no models"
        raise ValueError(f"{listed}; give each the set {id_set!r} and the same OOD sets, at least one.")
    return [name for name in first if name != id_set]


def draw_scores(
    axes: NDArray[Any],
    models: Mapping[str, ScoresBySet],
    ood_sets: list[str],
    score: str,
    id_set: str,
    convention: Convention,
) -> None:
    """Draw histograms, one line a model and one column an OOD set, with the convention's threshold."""
    everything = np.concatenate([np.asarray(scores) for group in models.values() for scores in group.values()])
    low, high = float(everything.min()), float(everything.max())
    # Equal scores everywhere still need a bin of some width.
    bins = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    for line, (title, group) in zip(axes, models.items(), strict=True):
        for column, (axis, name) in enumerate(zip(line, ood_sets, strict=False)):
            for label, colour in ((id_set, ID_COLOUR), (name, OOD_COLOURS[column % len(OOD_COLOURS)])):
                values = np.asarray(group[label])
                shares = np.full(len(values), 100 / len(values))
                axis.hist(values, bins=bins, weights=shares, color=colour, alpha=0.6, label=label)
            point = convention.point(group[id_set], group[name])
            axis.axvline(
                point.threshold, color="black", linestyle="--", linewidth=1, label=convention.threshold_label()
            )
            axis.set_title(f"{title}: {convention.title(point)}", fontsize=10)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("share of images (%)")
    # Room above the bars for the legend: the axis is shared and logarithmic.
    axes[0][0].set_ylim(top=100 * 30)
    axes[0][0].set_yticks([0.01, 0.1, 1, 10, 100])
    for top, bottom in list(zip(axes[0], axes[-1], strict=True))[: len(ood_sets)]:
        top.legend(frameon=False, loc="upper left", fontsize=8)
        bottom.set_xlabel(score)


def _draw_curves(
    axis: Axes, models: Mapping[str, ScoresBySet], ood_set: str, id_set: str, convention: Convention
) -> None:
    for place, (model, group) in enumerate(models.items()):
        known, unknown = np.asarray(group[id_set]), np.asarray(group[ood_set])
        is_id, scores = np.repeat([1, 0], [len(known), len(unknown)]), np.concatenate([known, unknown])
        if convention.positive == "ood":
            is_id, scores = 1 - is_id, -scores
        wrong, found, _ = roc_curve(is_id, scores)
        point = convention.point(known, unknown)
        colour = _MODEL_COLOURS[place % len(_MODEL_COLOURS)]
        label = f"{model}: AUROC {100 * np.trapezoid(found, wrong):.2f}, {convention.title(point)}"
        axis.plot(100 * wrong, 100 * found, color=colour, linewidth=1.5, label=label)
        axis.plot([100 * point.fpr], [100 * point.tpr], "o", color=colour, markersize=5)
    axis.axhline(100 * convention.tpr, color="grey", linestyle=":", linewidth=1)
    axis.set(xlim=(-2, 102), ylim=(-2, 102), aspect="equal")
    axis.legend(frameon=False, loc="lower right", fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _lines(names: list[str]) -> Iterator[list[str]]:
    """Names in lines of a few, as even as they can be."""
    count = -(-len(names) // _COLUMNS)
    width = -(-len(names) // count)
    for start in range(0, len(names), width):
        yield names[start : start + width]

"""What an evaluation's HTML page shows: tables, figures, and the mistakes that the models were surest of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from setar_peft.detection.figures import ID_SET, MEAN, Conventions, Difference, EvaluationRow, ModelScores
from setar_peft.detection.tables import difference_cells, figure_cells, score_label
from setar_peft.plots import Convention, roc_figure, score_figure
from setar_peft.plots.report import Content, Drawing, Picture, Pictures, Section, Settings, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Mistake(NamedTuple):
    """An image that a model got wrong.

    Attributes:
        set_name: Its set.
        place: Its place among the set's scores.
        caption: What is wrong about it.
    """

    set_name: str
    place: int
    caption: str


class Curves(NamedTuple):
    """Figures of one score of all models.

    Attributes:
        roc: ROC curves, a panel an OOD set, with the threshold that the false-positive rate is read off at.
        histograms: Of the ID images and of each OOD set, with that threshold.
    """

    roc: Figure
    histograms: Figure


def curves_of(models: Mapping[str, ModelScores], score: str, conventions: Conventions) -> Curves:
    """The figures of one score, by the conventions of an evaluation.

    Raises:
        ValueError: If matplotlib is missing.
    """
    convention = Convention(conventions.positive, conventions.threshold_rule, conventions.tpr)
    drawn = {model: scores.by_set(score) for model, scores in models.items()}
    label = score_label(score, models)
    return Curves(*(draw(drawn, label, ID_SET, convention) for draw in (roc_figure, score_figure)))


def evaluation_sections(
    models: Mapping[str, ModelScores],
    rows: Sequence[EvaluationRow],
    differences: Sequence[Difference],
    conventions: Conventions,
    *,
    score: str,
    mistakes: int,
    class_names: Sequence[str] | None,
    shown: Callable[[str, int], Any] | None,
    settings: Sequence[tuple[str, str]],
) -> list[Section]:
    """The parts of the page.

    Args:
        models: The models' scores.
        rows: Their figures.
        differences: Their differences from the first.
        conventions: How both were taken.
        score: The score whose mistakes are shown.
        mistakes: How many of each kind.
        class_names: Names of the classes, for the captions.
        shown: From a set's name and a number in it to its picture or text; None to give the images' names alone.
        settings: (name, value) pairs of everything that the figures depend on.
    """
    figures: list[Content] = [Table("Figures in percent", *figure_cells(models, rows, conventions, whole=True))]
    if differences:
        figures.append(
            Table(
                "Differences in percentage points, on the same resampled images",
                *difference_cells(differences, conventions),
            )
        )
    figures += conventions.sentences()
    curves: list[Content] = []
    for name in next(iter(models.values())).settings:
        label, drawn = score_label(name, models), curves_of(models, name, conventions)
        figures_by_set = "; ".join(
            f"{row.model} on {row.ood_set}: {conventions.fpr_name} {100 * row.metrics.fpr:.2f}, AUROC "
            f"{100 * row.metrics.auroc:.2f}"
            for row in rows
            if row.score == name and row.ood_set != MEAN
        )
        curves += [
            Drawing(
                drawn.roc,
                f"ROC curves of {label}. {figures_by_set}.",
                f"ROC curves of {label}; the dots are where the false-positive rate is read off.",
            ),
            Drawing(
                drawn.histograms,
                f"Histograms of {label} of the ID images and of each OOD set, one line a model, with the threshold.",
                f"Histograms of {label} with the threshold; the axis of shares is logarithmic.",
            ),
        ]
    said = (
        f"The mistakes that each model was surest of, by {score}. Where each set has a threshold of its own, an OOD "
        "image is compared with its set's and an ID image with the highest."
    )
    wrong: list[Content] = [said]
    for model, scores in models.items():
        thresholds = {
            row.ood_set: row.metrics.threshold
            for row in rows
            if (row.model, row.score) == (model, score) and row.ood_set != MEAN
        }
        for kind, found in _mistakes(scores, score, thresholds, conventions, mistakes, class_names).items():
            wrong.append(Pictures(f"{model}: {kind}", [_picture(mistake, scores, shown) for mistake in found]))
    return [
        Section("Figures", figures),
        Section("Curves and histograms", curves),
        Section("Most confident mistakes", wrong),
        Section("Settings", [Settings(settings)]),
    ]


def _mistakes(
    scores: ModelScores,
    score: str,
    thresholds: Mapping[str, float],
    conventions: Conventions,
    count: int,
    class_names: Sequence[str] | None,
) -> dict[str, list[Mistake]]:
    """The mistakes of a model by kind, the surest first, at most so many of each."""

    def named(index: int) -> str:
        return f"class {index}" if class_names is None else class_names[index]

    # With OOD as the positive class an image at the threshold is taken for OOD.
    is_id = np.greater_equal if conventions.positive == "id" else np.greater
    taken = [
        (float(images.scores[score][place]), name, int(place))
        for name, images in scores.ood_sets.items()
        for place in _first(-images.scores[score], is_id(images.scores[score], thresholds[name]), count)
    ]
    taken.sort(key=lambda entry: -entry[0])
    known = scores.id_set
    values = known.scores[score]
    rejected = _first(values, ~is_id(values, max(thresholds.values())), count)
    wrong = (known.labels >= 0) & (known.predictions >= 0) & (known.labels != known.predictions)

    def caption(name: str, place: int, said: str) -> Mistake:
        # Of a path the last two parts: the folder may be the class.
        short = "/".join(re.split(r"[\\/]", scores.sets[name].ids[place])[-2:])
        return Mistake(name, place, f"{short}: {said}")

    def prediction(name: str, place: int) -> str:
        images = scores.sets[name]
        if images.predictions[place] < 0:
            return ""
        return f", predicted as {named(int(images.predictions[place]))} ({100 * images.confidence[place]:.0f} %)"

    found = {
        "OOD taken for ID, with the highest scores": [
            caption(name, place, f"{name}, score {value:.4g}{prediction(name, place)}")
            for value, name, place in taken[:count]
        ],
        "ID rejected, with the lowest scores": [
            caption(ID_SET, place, f"score {values[place]:.4g}{prediction(ID_SET, place)}") for place in rejected
        ],
    }
    if not math.isnan(known.accuracy):
        found["ID classified wrongly, with the highest confidence"] = [
            caption(ID_SET, place, f"is {named(int(known.labels[place]))}{prediction(ID_SET, place)}")
            for place in _first(-known.confidence, wrong, count)
        ]
    return found


def _first(order: Any, chosen: Any, count: int) -> list[int]:
    """The places of the smallest values among those chosen, at most so many."""
    places = np.flatnonzero(chosen)
    return [int(place) for place in places[np.argsort(order[places], kind="stable")[:count]]]


def _picture(mistake: Mistake, scores: ModelScores, shown: Callable[[str, int], Any] | None) -> Picture:
    images = scores.sets[mistake.set_name]
    if shown is None:
        return Picture(images.ids[mistake.place], mistake.caption)
    try:
        return Picture(shown(mistake.set_name, int(images.numbers[mistake.place])), mistake.caption)
    except (OSError, ValueError) as error:
        # The file may have gone since; the page is about the others, too.
        return Picture(f"It cannot be shown: {error}", mistake.caption)

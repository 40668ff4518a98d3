"""Scores of image sets by one or several models, and the figures that are made of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from setar_peft.detection.bootstrap import Interval, Resampled, resample
from setar_peft.detection.metrics import OODMetrics, Positive, ThresholdRule, as_scores, fpr_at_tpr, ood_metrics

# What the ID images are called beside the OOD sets, and the row of the sets' means.
ID_SET = "ID"
MEAN = "mean"

_MEANS = ("fpr", "auroc", "aupr_in", "aupr_out", "detection_accuracy", "accuracy_at_threshold")


@dataclass(frozen=True)
class SetScores:
    """What one model says about one set of images or texts. No logits: memory does not grow with the classes.

    Attributes:
        ids: What each image is called, (n,): its path, URL, or number.
        numbers: Its position in its source, (n,) int64.
        labels: Class indices, (n,) int64; -1 for an image without a label.
        predictions: Indices of the predicted classes, (n,) int64.
        confidence: Softmax probability of the predicted class in the model's own logits, (n,) float32, in [0, 1].
        scores: Name of a score -> (n,) float32; higher means more in-distribution.
        left_out: What an image that could not be read is called -> why.
    """

    ids: Sequence[str]
    numbers: NDArray[np.int64]
    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    confidence: NDArray[np.float32]
    scores: dict[str, NDArray[np.floating]]
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_scores(cls, scores: Mapping[str, Any]) -> SetScores:
        """A set of which there are scores alone: no names, labels or predictions.

        Args:
            scores: Name of a score -> (n,), an array, tensor or sequence of numbers; at least one.

        Raises:
            ValueError: If there are no scores, or they are not 1-D or not finite.
        """
        arrays: dict[str, NDArray[np.floating]] = {name: as_scores(name, values) for name, values in scores.items()}
        count = len(next(iter(arrays.values())))
        unknown = np.full(count, -1)
        return cls(
            [str(number) for number in range(count)],
            np.arange(count),
            unknown,
            unknown,
            np.full(count, math.nan, np.float32),
            arrays,
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def accuracy(self) -> float:
        """Share of images classified right, in [0, 1]; NaN unless every image has a label and a prediction."""
        if not len(self) or bool((self.labels < 0).any()) or bool((self.predictions < 0).any()):
            return math.nan
        return float(np.mean(self.predictions == self.labels))


@dataclass(frozen=True)
class ModelScores:
    """What one model says about all sets.

    Attributes:
        id_set: The ID images.
        ood_sets: Name of an OOD set -> its images.
        settings: Name of a score -> its settings in full, by name: the temperature in use, and others that it has.
        about: What the model is, as plain values: its base, adapter, dtype.
    """

    id_set: SetScores
    ood_sets: dict[str, SetScores]
    settings: dict[str, dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def sets(self) -> dict[str, SetScores]:
        """Every set by name, the ID images first."""
        return {ID_SET: self.id_set, **self.ood_sets}

    def by_set(self, score: str) -> dict[str, NDArray[np.floating]]:
        """Name of a set, the ID images' first -> one score of its images, (n,)."""
        return {name: images.scores[score] for name, images in self.sets.items()}


@dataclass(frozen=True)
class Conventions:
    """How figures and their intervals are taken.

    Attributes:
        positive: The positive class of the false-positive rate, "id" or "ood".
        threshold_rule: How its threshold is chosen, "at_least" or "closest".
        tpr: Its level, 0 < tpr <= 1.
        resamples: Resamples of the bootstrap; 0 for no intervals.
        seed: Of the bootstrap.
        level: Share of the resampled figures that an interval holds.

    Raises:
        ValueError: If a convention is unknown, or a number outside its range.
    """

    positive: Positive = "id"
    threshold_rule: ThresholdRule = "at_least"
    tpr: float = 0.95
    resamples: int = 1000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        fpr_at_tpr([1.0], [0.0], self.tpr, positive=self.positive, threshold=self.threshold_rule)
        if isinstance(self.resamples, bool) or not isinstance(self.resamples, int) or self.resamples < 0:
            raise ValueError(f"resamples is {self.resamples!r}; give 0 for no intervals, or a number such as 1000.")

    @property
    def fpr_name(self) -> str:
        """What the false-positive rate is called, such as FPR95."""
        return f"FPR{100 * self.tpr:g}"

    def sentences(self) -> list[str]:
        """How the figures came about and are to be read."""
        positive, negative = ("ID", "OOD") if self.positive == "id" else ("OOD", "ID")
        rule = "at least" if self.threshold_rule == "at_least" else "closest to"
        fpr = (
            f"{self.fpr_name}: share of {negative} images taken for {positive} at the threshold where {rule} "
            f"{100 * self.tpr:g} % of the {positive} images are found."
        )
        bootstrap = (
            f"In brackets: what {100 * self.level:g} % of {self.resamples:,} bootstrap resamples of the test images "
            f"lie between (seed {self.seed}); the models are taken as given."
        )
        aupr = "AUPR: average precision with ID (in) or OOD (out) as the positive class."
        return [fpr, aupr, bootstrap] if self.resamples else [fpr, aupr]


class EvaluationRow(NamedTuple):
    """The figures of one model and score on one OOD set; see `OODMetrics` for their conventions.

    Attributes:
        model: Name of the model.
        ood_set: Name of the OOD set; "mean" for the mean of the figures of all sets, as in the paper's tables.
        score: Name of the score.
        metrics: The figures; of a mean, the threshold is NaN unless all sets have it.
        fpr_interval: Of the false-positive rate; None without a bootstrap.
        auroc_interval: Of the area under the ROC curve; None without a bootstrap.
    """

    model: str
    ood_set: str
    score: str
    metrics: OODMetrics
    fpr_interval: Interval | None = None
    auroc_interval: Interval | None = None


class Difference(NamedTuple):
    """How much a model's figures differ from another's on the same images.

    Attributes:
        model: Name of the model.
        baseline: Name of the model whose figures are taken off.
        ood_set: Name of the OOD set; "mean" for the mean over all sets.
        score: Name of the score.
        fpr: Of the false-positive rates; negative is better.
        auroc: Of the areas under the ROC curve; positive is better.
        fpr_interval: Over paired resamples: the same images for both models; None without a bootstrap.
        auroc_interval: Likewise.
    """

    model: str
    baseline: str
    ood_set: str
    score: str
    fpr: float
    auroc: float
    fpr_interval: Interval | None = None
    auroc_interval: Interval | None = None


def figures_of(
    models: Mapping[str, ModelScores], conventions: Conventions
) -> tuple[list[EvaluationRow], list[Difference]]:
    """The figures of every model, OOD set and score, and the differences of the models from the first.

    Raises:
        ValueError: If the models differ in scores, sets or numbers of images, a set has the name of what stands beside
            the sets, there is no OOD set or score, or the conventions or scores are none.
    """
    _check_fit(models)
    names, first = list(models), next(iter(models.values()))
    sets, scores = list(first.ood_sets), list(first.settings)
    columns = [(model, score) for model in names for score in scores]
    figures = {
        (model, ood_set, score): ood_metrics(
            models[model].id_set.scores[score],
            models[model].ood_sets[ood_set].scores[score],
            positive=conventions.positive,
            threshold=conventions.threshold_rule,
            tpr=conventions.tpr,
        )
        for model, score in columns
        for ood_set in sets
    }
    if len(sets) > 1:
        for model, score in columns:
            figures[model, MEAN, score] = _mean([figures[model, ood_set, score] for ood_set in sets])
        sets = [*sets, MEAN]
    resampled = _resampled(models, columns, conventions, with_mean=len(sets) > 1)

    def interval(kind: int, ood_set: str, score: str, model: str, less: str | None = None) -> Interval | None:
        if resampled is None:
            return None
        values = resampled[kind][:, sets.index(ood_set)]
        found = values[:, columns.index((model, score))]
        return Interval.of(
            found if less is None else found - values[:, columns.index((less, score))], conventions.level
        )

    rows = [
        EvaluationRow(
            model,
            ood_set,
            score,
            figures[model, ood_set, score],
            interval(0, ood_set, score, model),
            interval(1, ood_set, score, model),
        )
        for ood_set in sets
        for score in scores
        for model in names
    ]
    differences = []
    for model in names[1:]:
        for ood_set in sets:
            for score in scores:
                ours, others = figures[model, ood_set, score], figures[names[0], ood_set, score]
                differences.append(
                    Difference(
                        model,
                        names[0],
                        ood_set,
                        score,
                        ours.fpr - others.fpr,
                        ours.auroc - others.auroc,
                        interval(0, ood_set, score, model, names[0]),
                        interval(1, ood_set, score, model, names[0]),
                    )
                )
    return rows, differences


def check_set_names(ood_sets: Collection[str]) -> None:
    """Refuse names of OOD sets that stand for something else here.

    Raises:
        ValueError: If one does.
    """
    for reserved, meaning in ((ID_SET, "the ID images"), (MEAN, "the mean over the sets")):
        if reserved in ood_sets:
            raise ValueError(f"An OOD set is called {reserved!r}, which stands for {meaning}; give it another name.")


def _resampled(
    models: Mapping[str, ModelScores], columns: list[tuple[str, str]], conventions: Conventions, *, with_mean: bool
) -> Resampled | None:
    """Figures of every resample, the mean over the sets after them; None without a bootstrap."""
    if not conventions.resamples:
        return None
    first = next(iter(models.values()))
    found = resample(
        [models[model].id_set.scores[score] for model, score in columns],
        {name: [models[model].ood_sets[name].scores[score] for model, score in columns] for name in first.ood_sets},
        positive=conventions.positive,
        threshold=conventions.threshold_rule,
        tpr=conventions.tpr,
        resamples=conventions.resamples,
        seed=conventions.seed,
    )
    if not with_mean:
        return found
    return Resampled(*(np.concatenate([kind, kind.mean(1, keepdims=True)], axis=1) for kind in found))


def _mean(figures: Sequence[OODMetrics]) -> OODMetrics:
    """The mean of the sets' figures, each set counting alike, as the paper forms its averages."""
    thresholds = {figure.threshold for figure in figures}
    return OODMetrics(
        **{name: math.fsum(getattr(figure, name) for figure in figures) / len(figures) for name in _MEANS},
        threshold=thresholds.pop() if len(thresholds) == 1 else math.nan,
        positive=figures[0].positive,
        threshold_rule=figures[0].threshold_rule,
        tpr=figures[0].tpr,
    )


def _check_fit(models: Mapping[str, ModelScores]) -> None:
    if not models:
        raise ValueError("There are no models; give at least one, by name.")
    name, first = next(iter(models.items()))
    if not first.ood_sets:
        raise ValueError("There is no OOD set; give at least one, for example {'noise': images}.")
    if not first.settings:
        raise ValueError("There is no score; give at least one, such as 'mcm'.")
    check_set_names(first.ood_sets)
    shape = {ood_set: len(images) for ood_set, images in first.sets.items()}
    for other, scores in models.items():
        found = {ood_set: len(images) for ood_set, images in scores.sets.items()}
        if found != shape or list(scores.settings) != list(first.settings):
            raise ValueError(
                f"Model {other!r} has the images {found} and the scores {list(scores.settings)}, model {name!r} "
                f"{shape} and {list(first.settings)}; give scores of the same images, so that they can be paired."
            )
        for ood_set, images in scores.sets.items():
            if not np.array_equal(images.numbers, first.sets[ood_set].numbers):
                raise ValueError(
                    f"Models {name!r} and {other!r} have scores of different images of the set {ood_set!r}; give "
                    "scores of the same images, so that they can be paired."
                )
            for score in scores.settings:
                if score not in images.scores:
                    raise ValueError(
                        f"Model {other!r} has no {score!r} of the set {ood_set!r}; give every score of every set."
                    )
                _check_finite(images, other, ood_set, score)


def _check_finite(images: SetScores, model: str, ood_set: str, score: str) -> None:
    """Refuse scores that are no numbers, and name the images."""
    values = images.scores[score]
    if values.ndim == 1 and np.issubdtype(values.dtype, np.floating):
        broken = np.flatnonzero(~np.isfinite(values))
        if len(broken):
            named = ", ".join(images.ids[number] for number in broken[:3])
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise ValueError(
                f"{score!r} of model {model!r} is NaN or infinite for {len(broken)} of {len(images)} images of the "
                f"set {ood_set!r}: {named}{more}. Look for an overflow in the model, or leave the images out."
            )

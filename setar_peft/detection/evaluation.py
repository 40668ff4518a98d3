"""How well a model classifies and detects: logits and scores of image sets, and a table of figures.

Works on a stock model and on a PEFT model alike. Scores are computed batch by batch, so that the local logits of a set
(images x patches x classes) never exist as a whole.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from setar_peft.backbones import ClassWeights, ImageFeatures, Logits
from setar_peft.data.images import ImageSource
from setar_peft.data.texts import NamedInputs
from setar_peft.detection.metrics import OODMetrics, Positive, ThresholdRule, accuracy, ood_metrics
from setar_peft.detection.scores import find_score, score
from setar_peft.objectives.base import Objective, evaluation_mode
from setar_peft.objectives.loss import LOCAL_LOGITS_CHUNK
from setar_peft.versions import versions

DEFAULT_SCORES = ("mcm", "gl_mcm")

# Names of scores, with the paper's settings; or name -> settings that differ from the paper's.
Scores: TypeAlias = Sequence[str] | Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ImageScores:
    """What a model says about a set of images.

    Attributes:
        logits: Global logits, (images, classes), float32, on the CPU.
        labels: (images,) class indices; -1 for images without labels.
        scores: Name of a score -> (images,) float32, on the CPU; higher means more in-distribution.
        settings: Name of a score -> its settings in full, by name: the temperature in use, and others that it has.
    """

    logits: Tensor
    labels: Tensor
    scores: dict[str, Tensor]
    settings: dict[str, dict[str, Any]]

    @property
    def accuracy(self) -> float:
        """Share of images classified right, in [0, 1]; NaN for images without labels."""
        return math.nan if bool((self.labels < 0).any()) else accuracy(self.logits, self.labels)


class EvaluationRow(NamedTuple):
    """The figures of one score on one OOD set; see `OODMetrics` for their conventions."""

    ood_set: str
    score: str
    metrics: OODMetrics


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on the ID images, and how well each score tells them from each OOD set.

    Attributes:
        id_images: Logits and scores of the ID images.
        ood_images: Name of an OOD set -> its logits and scores.
        rows: One row an OOD set and score.
        prompt: The template of the class prompts, or one text a class; None for a model without prompts.
        versions: What it was computed with, name -> version.
    """

    id_images: ImageScores
    ood_images: dict[str, ImageScores]
    rows: list[EvaluationRow]
    prompt: str | Sequence[str] | None
    versions: dict[str, str]

    @property
    def accuracy(self) -> float:
        """Share of ID images classified right, in [0, 1]; NaN for images without labels."""
        return self.id_images.accuracy

    def metrics(self, ood_set: str, score_name: str) -> OODMetrics:
        """The figures of one score on one OOD set.

        Raises:
            ValueError: If there is no such row.
        """
        for row in self.rows:
            if (row.ood_set, row.score) == (ood_set, score_name):
                return row.metrics
        rows = ", ".join(f"({row.ood_set!r}, {row.score!r})" for row in self.rows)
        raise ValueError(f"There are no figures for {(ood_set, score_name)!r}; there are some for {rows}.")

    def convention(self) -> str:
        """How the figures came about and are to be read: convention, temperature, prompt, versions."""
        metrics = self.rows[0].metrics
        positive, negative = ("ID", "OOD") if metrics.positive == "id" else ("OOD", "ID")
        rule = "at least" if metrics.threshold_rule == "at_least" else "closest to"
        used = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"FPR{_percent_level(metrics.tpr)}: share of {negative} images taken for {positive} at the threshold where "
            f"{rule} {100 * metrics.tpr:g} % of the {positive} images are found. AUPR: average precision with ID (in) "
            f"or OOD (out) as the positive class. All figures in percent. {self._inputs()} Made with {used}."
        )

    def score_label(self, name: str) -> str:
        """A score with the settings that it was computed with, such as "gl_mcm (temperature 100)".

        The temperature is always in it, another setting where it is not the paper's.
        """
        usual = find_score(name).settings(1.0, {})
        said = [
            f"{setting.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{setting} {value}"
            for setting, value in self.id_images.settings[name].items()
            if setting == "temperature" or value != usual[setting]
        ]
        return f"{name} ({', '.join(said)})"

    def table(self) -> str:
        """The rows as a table in plain text, in percent, with `convention` below it."""
        level = f"FPR{_percent_level(self.rows[0].metrics.tpr)}"
        cells = [["OOD set", "score", "accuracy", level, "AUROC", "AUPR-in", "AUPR-out"]]
        for row in self.rows:
            shares = (self.accuracy, row.metrics.fpr, row.metrics.auroc, row.metrics.aupr_in, row.metrics.aupr_out)
            cells.append(
                [row.ood_set, row.score, *("-" if math.isnan(share) else f"{100 * share:.2f}" for share in shares)]
            )
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        aligned = (
            [cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(line)]
            for line in (list(zip(line, widths, strict=True)) for line in cells)
        )
        return "\n".join(["  ".join(line).rstrip() for line in aligned] + textwrap.wrap(self.convention(), 80))

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON, shares in [0, 1]; an unknown accuracy is None.

        With them goes what they depend on: the prompt, each score's settings, the convention of each row, versions.
        """
        return {
            "prompt": self.prompt if self.prompt is None or isinstance(self.prompt, str) else list(self.prompt),
            "scores": self.id_images.settings,
            "accuracy": None if math.isnan(self.accuracy) else self.accuracy,
            "images": {"id": len(self.id_images.labels)}
            | {name: len(images.labels) for name, images in self.ood_images.items()},
            "rows": [{"ood_set": row.ood_set, "score": row.score, **vars(row.metrics)} for row in self.rows],
            "versions": self.versions,
        }

    def _inputs(self) -> str:
        """What the scores read: their temperatures, and the prompt."""
        labels = ", ".join(map(self.score_label, self.id_images.settings))
        if self.prompt is None:
            prompt = "No prompts."
        elif isinstance(self.prompt, str):
            prompt = f'Prompt "{self.prompt}".'
        else:
            prompt = f'Prompts "{self.prompt[0]}" and so on, one a class.'
        return f"Scores: {labels}. {prompt}"


def evaluate(
    model: nn.Module,
    objective: Objective,
    id_images: Any,
    ood_images: Mapping[str, Any],
    *,
    scores: Scores = DEFAULT_SCORES,
    temperature: float | None = None,
    processor: Any = None,
    positive: Positive = "id",
    threshold: ThresholdRule = "at_least",
    tpr: float = 0.95,
) -> Evaluation:
    """Accuracy on ID images, and detection figures for each OOD set and score.

    The model is left in the mode it was in.

    Args:
        model: A stock model of a known family, or a PEFT model, which is evaluated as its active adapters make it.
        objective: Gives the class prompts; its images are not read.
        id_images: In-distribution images: an `ImageSource` or `NamedInputs`, with class names where an accuracy is
            wanted; or whatever an `ImageSource` takes (a folder, a data set, a tensor of pixel values, a sequence of
            paths or PIL images), without labels.
        ood_images: Name of an OOD set -> its images, likewise.
        scores: Names out of `setar_peft.detection.scores.SCORES`, with the paper's settings; or a mapping from names
            to settings of another kind, such as `{"mcm": {}, "gl_mcm": {"local_weight": 0.5, "temperature": 1.0}}`.
        temperature: Divides the logits of every score whose settings do not say it, > 0; by default the paper's, which
            is another for each score (see `setar_peft.detection.scores`).
        processor: The model's processor; only for images that are no `ImageSource` and no tensor.
        positive: The positive class of the false-positive rate, "id" or "ood".
        threshold: How its threshold is chosen, "at_least" or "closest".
        tpr: Its level, 0 < tpr <= 1.

    Raises:
        ValueError: If there is no OOD set or score, a score or convention is unknown, or the images do not fit the
            model.
    """
    if not ood_images:
        raise ValueError("ood_images is empty; give at least one OOD set, for example {'noise': images}.")

    def source(images: Any) -> ImageSource | NamedInputs:
        return images if isinstance(images, (ImageSource, NamedInputs)) else ImageSource(processor, images)

    id_images = source(id_images)
    sources = {name: source(images) for name, images in ood_images.items()}
    if id_images.classes is not None:
        objective.check_labels(id_images.classes)
    known = image_scores(model, objective, id_images, scores=scores, temperature=temperature)
    unknown = {
        name: image_scores(model, objective, images, scores=scores, temperature=temperature)
        for name, images in sources.items()
    }
    rows = [
        EvaluationRow(
            name,
            score_name,
            ood_metrics(
                known.scores[score_name],
                images.scores[score_name],
                positive=positive,
                threshold=threshold,
                tpr=tpr,
            ),
        )
        for name, images in unknown.items()
        for score_name in scores
    ]
    with evaluation_mode(model) as (backbone, _):
        prompt = objective.prompt if backbone.needs_prompts else None
    return Evaluation(known, unknown, rows, prompt, versions())


def image_scores(
    model: nn.Module,
    objective: Objective,
    images: ImageSource | NamedInputs,
    *,
    scores: Scores = DEFAULT_SCORES,
    temperature: float | None = None,
) -> ImageScores:
    """Global logits and scores of a set of images, in evaluation mode and without gradients.

    Args:
        model: A stock model of a known family, or a PEFT model.
        objective: Gives the class prompts; its images are not read.
        images: The images, labelled or not.
        scores: As for `evaluate`.
        temperature: As for `evaluate`.

    Raises:
        ValueError: If no score is given, one is unknown or has no such setting, the family of the model is not known,
            or the images do not fit it.
    """
    if isinstance(scores, str) or not scores:
        raise ValueError(f"scores is {scores!r}; give a list of names, such as {list(DEFAULT_SCORES)}.")
    given: Mapping[str, Mapping[str, Any]] = scores if isinstance(scores, Mapping) else {name: {} for name in scores}
    if not all(isinstance(chosen, Mapping) for chosen in given.values()):
        raise ValueError(f"scores is {scores!r}; give each score its settings by name, as in {{'mcm': {{}}}}.")
    if temperature is not None:
        given = {name: {"temperature": temperature, **chosen} for name, chosen in given.items()}
    found = {name: find_score(name) for name in given}
    needs_local = any(entry.needs_local for entry in found.values())
    logits, labels, values = [], [], []
    with evaluation_mode(model) as (backbone, _):
        classes = objective.class_weights(backbone)
        scale = float(classes.scale)
        settings: dict[str, dict[str, Any]] = {
            name: {
                setting: value.item() if isinstance(value, Tensor) else value
                for setting, value in entry.settings(scale, given[name]).items()
            }
            for name, entry in found.items()
        }
        for batch, batch_labels in images.batches():
            features = backbone.embedded(backbone.image_features(batch))
            for part in _parts(features, classes, needs_local):
                logits.append(part.pooled.cpu())
                values.append(torch.stack([score(name, part, **settings[name]) for name in settings]))
            labels.append(batch_labels)
    by_score = torch.cat(values, dim=1).cpu()
    return ImageScores(torch.cat(logits), torch.cat(labels), dict(zip(settings, by_score, strict=True)), settings)


def image_logits(model: nn.Module, objective: Objective, inputs: Tensor | Mapping[str, Tensor]) -> Logits:
    """Global and local logits of one batch, in evaluation mode and without gradients.

    Args:
        model: A stock model of a known family, or a PEFT model.
        objective: Gives the class prompts, which are encoded anew in each call; its images are not read.
        inputs: Pixel values (images, channels, height, width), or the model's inputs by name, as its processor gives
            them; on any device.

    Returns:
        Global logits (images, classes) and local logits (images, patches, classes), float32, on the model's device.

    Raises:
        ValueError: If the family of the model is not known, or the images do not fit it.
    """
    with evaluation_mode(model) as (backbone, _):
        return backbone.logits(inputs, objective.class_weights(backbone))


def _parts(features: ImageFeatures, classes: ClassWeights, needs_local: bool) -> Iterator[Logits]:
    """Logits of a batch, some images at a time so that local ones stay small."""
    images = len(features.pooled)
    if needs_local:
        numel = features.local.shape[1] * len(classes.weight)
        images = max(1, LOCAL_LOGITS_CHUNK.get(features.local.device.type, 2**24) // numel)
    for start in range(0, len(features.pooled), images):
        part = slice(start, start + images)
        mask = None if features.mask is None else features.mask[part]
        yield classes.logits_of(ImageFeatures(features.pooled[part], features.local[part], mask), local=needs_local)


def _percent_level(tpr: float) -> str:
    return f"{100 * tpr:g}"

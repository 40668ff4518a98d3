"""How well a model classifies and detects: logits and scores of image sets, and a table of figures.

Works on a stock model and on a PEFT model alike. Scores are computed batch by batch, so that the local logits of a set
(images x patches x classes) never exist as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from setar_peft.backbones import ClassWeights, ImageFeatures, Logits, named_inputs
from setar_peft.data.images import ImageSource
from setar_peft.data.texts import NamedInputs
from setar_peft.detection.metrics import OODMetrics, Positive, ThresholdRule, accuracy, ood_metrics
from setar_peft.detection.scores import find_score, score
from setar_peft.objectives.base import Objective, encoded_classes, evaluation_mode
from setar_peft.objectives.loss import LOCAL_LOGITS_CHUNK

DEFAULT_SCORES = ("mcm", "gl_mcm")


@dataclass(frozen=True)
class ImageScores:
    """What a model says about a set of images.

    Attributes:
        logits: Global logits, (images, classes), float32, on the CPU.
        labels: (images,) class indices; -1 for images without labels.
        scores: Name of a score -> (images,) float32, on the CPU; higher means more in-distribution.
    """

    logits: Tensor
    labels: Tensor
    scores: dict[str, Tensor]

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
    """

    id_images: ImageScores
    ood_images: dict[str, ImageScores]
    rows: list[EvaluationRow]

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
        """How the figures are to be read, in one sentence."""
        metrics = self.rows[0].metrics
        positive, negative = ("ID", "OOD") if metrics.positive == "id" else ("OOD", "ID")
        rule = "at least" if metrics.threshold_rule == "at_least" else "closest to"
        return (
            f"FPR{_percent_level(metrics.tpr)}: share of {negative} images taken for {positive} at the threshold where "
            f"{rule} {100 * metrics.tpr:g} % of the {positive} images are found. AUPR: average precision with ID (in) "
            "or OOD (out) as the positive class. All figures in percent."
        )

    def table(self) -> str:
        """The rows as a table in plain text, in percent."""
        level = f"FPR{_percent_level(self.rows[0].metrics.tpr)}"
        cells = [["OOD set", "score", "accuracy", level, "AUROC", "AUPR-in", "AUPR-out"]]
        for row in self.rows:
            shares = (self.accuracy, row.metrics.fpr, row.metrics.auroc, row.metrics.aupr_in, row.metrics.aupr_out)
            cells.append([row.ood_set, row.score, *(f"{100 * share:.2f}" for share in shares)])
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        aligned = (
            [cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(line)]
            for line in (list(zip(line, widths, strict=True)) for line in cells)
        )
        return "\n".join("  ".join(line).rstrip() for line in aligned)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON, shares in [0, 1]; an unknown accuracy is None."""
        return {
            "accuracy": None if math.isnan(self.accuracy) else self.accuracy,
            "images": {"id": len(self.id_images.labels)}
            | {name: len(images.labels) for name, images in self.ood_images.items()},
            "rows": [{"ood_set": row.ood_set, "score": row.score, **vars(row.metrics)} for row in self.rows],
        }


def evaluate(
    model: nn.Module,
    objective: Objective,
    id_images: ImageSource | NamedInputs,
    ood_images: Mapping[str, Any],
    *,
    scores: Sequence[str] = DEFAULT_SCORES,
    processor: Any = None,
    temperature: float = 1.0,
    positive: Positive = "id",
    threshold: ThresholdRule = "at_least",
    tpr: float = 0.95,
) -> Evaluation:
    """Accuracy on ID images, and detection figures for each OOD set and score.

    The model is left in the mode it was in.

    Args:
        model: A stock model of a known family, or a PEFT model, which is evaluated as its active adapters make it.
        objective: Gives the class prompts; its images are not read.
        id_images: In-distribution images, with labels where an accuracy is wanted.
        ood_images: Name of an OOD set -> its images: an `ImageSource`, or whatever one takes (a folder, a data set,
            a tensor of pixel values, a sequence of PIL images).
        scores: Names out of `setar_peft.scores.SCORES`.
        processor: The model's processor; only for OOD images that are no `ImageSource` and no tensor.
        temperature: Divides the logits, > 0.
        positive: The positive class of the false-positive rate, "id" or "ood".
        threshold: How its threshold is chosen, "at_least" or "closest".
        tpr: Its level, 0 < tpr <= 1.

    Raises:
        ValueError: If there is no OOD set or score, a score or convention is unknown, or the images do not fit the
            model.
    """
    if not ood_images:
        raise ValueError("ood_images is empty; give at least one OOD set, for example {'noise': images}.")
    sources = {
        name: images if isinstance(images, (ImageSource, NamedInputs)) else ImageSource(processor, images)
        for name, images in ood_images.items()
    }
    if id_images.classes is not None:
        objective.check_labels(id_images.classes)
    known = image_scores(model, objective, id_images, scores=scores, temperature=temperature)
    unknown = {
        name: image_scores(model, objective, source, scores=scores, temperature=temperature)
        for name, source in sources.items()
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
    return Evaluation(known, unknown, rows)


def image_scores(
    model: nn.Module,
    objective: Objective,
    images: ImageSource | NamedInputs,
    *,
    scores: Sequence[str] = DEFAULT_SCORES,
    temperature: float = 1.0,
) -> ImageScores:
    """Global logits and scores of a set of images, in evaluation mode and without gradients.

    Args:
        model: A stock model of a known family, or a PEFT model.
        objective: Gives the class prompts; its images are not read.
        images: The images, labelled or not.
        scores: Names out of `setar_peft.scores.SCORES`.
        temperature: Divides the logits, > 0.

    Raises:
        ValueError: If no score is given or one is unknown, the family of the model is not known, or the images do
            not fit it.
    """
    if isinstance(scores, str) or not scores:
        raise ValueError(f"scores is {scores!r}; give a list of names, such as {list(DEFAULT_SCORES)}.")
    needs_local = any(find_score(name).needs_local for name in scores)
    logits, labels, values = [], [], []
    with evaluation_mode(model) as (backbone, device):
        objective.check_classes(backbone)
        classes = encoded_classes(backbone, objective.prompt_tokens, objective.prompt_batch_size, device)
        for batch, batch_labels in images.batches():
            inputs = {name: value.to(device) for name, value in named_inputs(batch).items()}
            features = backbone.embedded(backbone.image_features(inputs))
            for pooled, local in _parts(features, classes, needs_local):
                logits.append(pooled.cpu())
                values.append(torch.stack([score(name, pooled, local, temperature=temperature) for name in scores]))
            labels.append(batch_labels)
    by_score = torch.cat(values, dim=1).cpu()
    return ImageScores(torch.cat(logits), torch.cat(labels), dict(zip(scores, by_score, strict=True)))


def image_logits(model: nn.Module, class_tokens: Mapping[str, Tensor], pixel_values: Tensor) -> Logits:
    """Global and local logits of one batch, in evaluation mode and without gradients.

    Args:
        model: A stock model of a known family, or a PEFT model.
        class_tokens: The class prompts as `Objective.class_tokens` gives them, each (classes, tokens); not read where
            a model has its classes inside.
        pixel_values: (images, channels, height, width), as the model's processor gives them.

    Returns:
        Global logits (images, classes) and local logits (images, patches, classes), float32, on the model's device.

    Raises:
        ValueError: If the family of the model is not known, or the images do not fit it.
    """
    with evaluation_mode(model) as (backbone, device):
        classes = encoded_classes(backbone, lambda _: class_tokens, Objective.prompt_batch_size, device)
        return backbone.logits(pixel_values.to(device), classes)


def _parts(features: ImageFeatures, classes: ClassWeights, needs_local: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Global and local logits of a batch, some images at a time so that local ones stay small; None where unneeded."""
    pooled, local, mask = features
    images = len(pooled)
    if needs_local:
        numel = local.shape[1] * len(classes.weight)
        images = max(1, LOCAL_LOGITS_CHUNK.get(pooled.device.type, 2**24) // numel)
        if mask is not None:
            # The scores take maxima over patches: padding that repeats a real patch changes none.
            first = local[torch.arange(len(local), device=local.device), mask.int().argmax(-1)]
            local = torch.where(mask[..., None], local, first[:, None])
    for start in range(0, len(pooled), images):
        part = slice(start, start + images)
        yield classes.logits(pooled[part]), classes.logits(local[part]) if needs_local else None


def _percent_level(tpr: float) -> str:
    return f"{100 * tpr:g}"

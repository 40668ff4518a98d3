"""A metric in place of the loss: how well images are told from their own OOD patches."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from setar_peft.backbones import ClassWeights, ImageFeatures
from setar_peft.objectives.locoop import LoCoOpObjective
from setar_peft.objectives.loss import LossSums, LossValues, locoop_sums, locoop_values

PatchMetric = Literal["auroc", "fpr95"]


class PatchMetricObjective(LoCoOpObjective):
    """Minimises 1 - AUROC, or FPR95, of telling the images from the OOD patches in them by MCM.

    The images are in-distribution and scored by MCM on their global logits; the patches that do not have the true
    class among their top K (paper, Eq. 10) stand for OOD images and are scored by MCM on their local logits. MCM reads
    cosines at temperature 1, as in the evaluation: the temperature is the model's logit scale, 1 for a classifier. Like
    the published code's metric criteria, it needs no OOD data. The scores are counted in bins, so that the metric adds
    up over batches and processes; scores in one bin count as ties.

    Args:
        args: As `LoCoOpObjective`.
        metric: "auroc" or "fpr95".
        kwargs: As `LoCoOpObjective`.

    Raises:
        ValueError: As `LoCoOpObjective`, or if the metric is unknown.
    """

    # Bins of equal relative width, 2048 an octave, over the log of the likeliest class's odds over chance. Of cosines
    # it is between 0 and 2, often all scores within a few hundredths; of a confident classifier's logits 10 and more.
    bins: ClassVar[int] = 2**15
    octaves: ClassVar[tuple[int, int]] = (-10, 6)
    sums_size: ClassVar[int] = len(LossSums._fields) + 2 * bins
    # The loss's parts are reported, not minimised.
    criteria: ClassVar[tuple[str, ...]] = ("total",)
    is_differentiable: ClassVar[bool] = False

    def __init__(self, *args: Any, metric: PatchMetric = "auroc", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if metric not in ("auroc", "fpr95"):
            raise ValueError(f"metric is {metric!r}; give 'auroc' or 'fpr95'.")
        self.metric = metric

    def settings(self) -> dict[str, Any]:
        """The LoCoOp loss's settings, and the metric."""
        return {**super().settings(), "metric": self.metric}

    def sums(self, features: ImageFeatures, classes: ClassWeights, labels: Tensor) -> Tensor:
        """The LoCoOp sums, then how many images and how many OOD patches have their score in each bin."""
        patches: list[Tensor] = []
        pooled, local, mask, _ = features
        loss = locoop_sums(
            pooled,
            local,
            classes,
            labels,
            top_k=self.top_k,
            mask=mask,
            on_ood_patches=lambda logits: patches.append(self._counts(logits / classes.scale)),
        )
        images = self._counts(classes.logits(pooled) / classes.scale)
        ood = torch.stack(patches).sum(0) if patches else torch.zeros_like(images)
        return torch.cat([torch.stack(loss), images, ood])

    def values(self, sums: Tensor) -> LossValues:
        """The parts of the LoCoOp loss, with what is minimised in the place of the total loss."""
        loss = locoop_values(sums[: len(LossSums._fields)], self.ood_weight)
        images, patches = sums[len(LossSums._fields) :].view(2, self.bins)
        minimised = _one_minus_auroc(images, patches) if self.metric == "auroc" else _fpr95(images, patches)
        if math.isnan(loss.id_loss):  # no patch of NaN is OOD, and images without OOD patches would be perfect
            minimised = math.nan
        return loss._replace(total=minimised)

    def _counts(self, logits: Tensor) -> Tensor:
        """How many of the logits (n, classes) have their MCM in each bin, (bins,), float64."""
        largest, likeliest = logits.max(-1, keepdim=True)
        # Of the largest logit over the others and not of a softmax, which rounds to 1 where the model is sure.
        others = logits.scatter(-1, likeliest, -math.inf).logsumexp(-1)
        over_chance = largest[..., 0] - others + math.log(logits.shape[-1] - 1)
        low, high = self.octaves
        place = ((over_chance.clamp(min=0).log2() - low) / (high - low) * self.bins).nan_to_num(nan=0)
        return torch.bincount(place.clamp(0, self.bins - 1).long(), minlength=self.bins).to(torch.float64)


def _one_minus_auroc(images: Tensor, patches: Tensor) -> float:
    """Share of (image, patch) pairs in which the patch scores higher, ties by half; 0 without patches."""
    pairs = float(images.sum() * patches.sum())
    higher = patches.flip(0).cumsum(0).flip(0) - patches
    return float((images * (higher + patches / 2)).sum()) / pairs if pairs else 0.0


def _fpr95(images: Tensor, patches: Tensor) -> float:
    """Share of patches at or above the largest threshold that keeps 95 % of the images; 0 without patches."""
    found = images.flip(0).cumsum(0).flip(0)
    threshold = int((found >= 0.95 * images.sum()).nonzero()[-1])
    return float(patches[threshold:].sum() / patches.sum()) if patches.any() else 0.0

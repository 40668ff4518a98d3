"""The LoCoOp loss as sums and counts, so that it does not depend on how the data is cut.

Loss = ID loss + lambda * OOD loss (paper, Eq. 12): the mean over images of the cross entropy, and the mean over all
OOD patches of the set of minus the entropy (Eq. 11). A patch is OOD if its true class is not among its top K (Eq. 10).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from setar_peft.backbones import ClassWeights

# Local logits formed at once, as a number of elements: they stay within a processor's cache or a sliver of a GPU's
# memory, and an image set's images x patches x classes never exists as a whole.
LOCAL_LOGITS_CHUNK = {"cpu": 2**18, "cuda": 2**26}


class LossSums(NamedTuple):
    """What adds up over batches and processes; each is a float64 scalar (float32 where the device has no float64).

    Attributes:
        id_loss: Sum over images of the cross entropy.
        images: Number of images.
        ood_loss: Sum over OOD patches of minus the entropy.
        ood_patches: Number of OOD patches.
        patches: Number of patches.
        correct: Number of images whose largest logit is the true class's.
    """

    id_loss: Tensor
    images: Tensor
    ood_loss: Tensor
    ood_patches: Tensor
    patches: Tensor
    correct: Tensor


class LossValues(NamedTuple):
    """The loss of a set and its parts.

    Attributes:
        total: ID loss + lambda * OOD loss.
        id_loss: Mean cross entropy over images.
        ood_loss: Mean of minus the entropy over OOD patches; 0 where there are none.
        accuracy: Share of images classified right, 0 to 1.
        ood_patch_share: Share of patches that are OOD, 0 to 1.
    """

    total: float
    id_loss: float = math.nan
    ood_loss: float = math.nan
    accuracy: float = math.nan
    ood_patch_share: float = math.nan

    def part(self, criterion: str) -> float:
        """What a search minimises: "total", or one of its parts, "id" or "ood" (the config's `criterion`)."""
        return float({"total": self.total, "id": self.id_loss, "ood": self.ood_loss}[criterion])


def ood_patch_mask(local_logits: Tensor, labels: Tensor, top_k: int) -> Tensor:
    """Which patches do not have the true class among their top K (paper, Eq. 10).

    The rank of the true class is a count of larger logits; ties are in its favour.

    Args:
        local_logits: (images, patches, classes).
        labels: (images,) class indices.
        top_k: K, 0 to the number of classes: 0 makes every patch OOD, the number of classes none.

    Returns:
        (images, patches), bool.
    """
    true = local_logits.gather(-1, labels.view(-1, 1, 1).expand(-1, local_logits.shape[1], 1))
    return (local_logits > true).sum(-1) >= top_k


def negative_entropy(logits: Tensor, eps: float = 1e-5) -> Tensor:
    """Minus the entropy of softmax(logits), sum p log(p + eps), over the last axis (paper, Eq. 11).

    Args:
        logits: (..., classes).
        eps: Added inside the logarithm, as in the published code; 0 gives the exact entropy.

    Returns:
        (...), in [-log classes, about 0].
    """
    probabilities = logits.softmax(-1)
    if eps:
        # Each pass over images x patches x classes counts: this takes logarithm and product in one.
        return torch.special.xlogy(probabilities, probabilities + eps).sum(-1)
    return (probabilities * logits.log_softmax(-1)).sum(-1)


def locoop_sums(
    pooled: Tensor,
    local: Tensor,
    classes: ClassWeights,
    labels: Tensor,
    *,
    top_k: int,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    on_ood_patches: Callable[[Tensor], None] | None = None,
) -> LossSums:
    """The summed LoCoOp loss of some images.

    Args:
        pooled: (images, d) features of the whole images, as `classes` takes them.
        local: (images, patches, d) features of the patches.
        classes: The map to logits.
        labels: (images,) class indices.
        top_k: K of Eq. 10.
        eps: Of the entropy (see `negative_entropy`).
        mask: (images, patches), bool: which patches there are; by default all. The others count for nothing.
        on_ood_patches: Called with the logits of OOD patches, (patches, classes), chunk by chunk.
    """
    exact = torch.float32 if pooled.device.type == "mps" else torch.float64
    logits = classes.logits(pooled)
    images, patches = local.shape[:2]
    rows = local.flatten(0, 1)
    row_labels = labels.repeat_interleave(patches)
    if mask is not None:
        rows, row_labels = rows[mask.flatten()], row_labels[mask.flatten()]
    ood_loss = torch.zeros((), dtype=exact, device=logits.device)
    ood_patches = torch.zeros((), dtype=exact, device=logits.device)
    chunk = LOCAL_LOGITS_CHUNK.get(rows.device.type, 2**24) // max(1, logits.shape[1])
    # With K classes or more in the top K no patch is OOD, and the local logits need not exist.
    for start in range(0, len(rows) if top_k < logits.shape[1] else 0, max(1, chunk)):
        part = slice(start, start + max(1, chunk))
        arguments = (rows[part], row_labels[part], classes, top_k, eps, on_ood_patches)
        if torch.is_grad_enabled() and on_ood_patches is None:
            # A chunk's logits are formed again on the way back, or all chunks' would wait for it.
            sums = checkpoint(_ood_sums, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            sums = _ood_sums(*arguments)
        ood_loss, ood_patches = ood_loss + sums[0], ood_patches + sums[1]
    return LossSums(
        F.cross_entropy(logits, labels, reduction="none").sum(dtype=exact),
        torch.full((), images, dtype=exact, device=logits.device),
        ood_loss,
        ood_patches,
        torch.full((), len(rows), dtype=exact, device=logits.device),
        (logits.argmax(-1) == labels).sum().to(exact),
    )


def _ood_sums(
    rows: Tensor,
    labels: Tensor,
    classes: ClassWeights,
    top_k: int,
    eps: float,
    on_ood_patches: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Tensor]:
    """Of some patches (rows, d) the OOD loss and the number of those that are OOD, scalars."""
    exact = torch.float32 if rows.device.type == "mps" else torch.float64
    local_logits = classes.logits(rows)
    is_ood = ood_patch_mask(local_logits[:, None], labels, top_k)[:, 0]
    if on_ood_patches is not None:
        on_ood_patches(local_logits[is_ood])
    # Of every patch, since a GPU would have to wait to learn which are OOD.
    return torch.where(is_ood, negative_entropy(local_logits, eps), 0).sum(dtype=exact), is_ood.sum()


def locoop_values(sums: LossSums | Tensor, ood_weight: float) -> LossValues:
    """The loss of a set from its sums (paper, Eq. 12).

    Args:
        sums: The sums over the whole set, or the same stacked into a tensor (6,).
        ood_weight: lambda.
    """
    id_sum, images, ood_sum, ood_patches, patches, correct = (float(value) for value in sums)
    id_loss = id_sum / images
    ood_loss = ood_sum / ood_patches if ood_patches else 0.0
    share = ood_patches / patches if patches else 0.0
    return LossValues(id_loss + ood_weight * ood_loss, id_loss, ood_loss, correct / images, share)


def locoop_loss(
    global_logits: Tensor,
    local_logits: Tensor,
    labels: Tensor,
    *,
    ood_weight: float,
    top_k: int,
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """The LoCoOp loss of one batch of logits, differentiable (paper, Eq. 10 to 12).

    The OOD loss is a mean over the OOD patches of this batch; that of several batches is no mean of theirs.

    Args:
        global_logits: (images, classes).
        local_logits: (images, patches, classes).
        labels: (images,) class indices.
        ood_weight: lambda, the weight of the OOD loss.
        top_k: K of Eq. 10.
        eps: Of the entropy (see `negative_entropy`).
        mask: (images, patches), bool: which patches there are, as `Logits.mask` says; by default all. The others count
            for nothing.

    Returns:
        The loss, a float32 scalar.
    """
    is_ood = ood_patch_mask(local_logits.detach(), labels, top_k)
    if mask is not None:
        is_ood = is_ood & mask
    id_loss = F.cross_entropy(global_logits.float(), labels)
    ood_loss = negative_entropy(local_logits[is_ood].float(), eps).sum() / is_ood.sum().clamp(min=1)
    return id_loss + ood_weight * ood_loss

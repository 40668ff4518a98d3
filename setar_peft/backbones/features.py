"""Features, logits, and the linear map between them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ImageFeatures(NamedTuple):
    """Features of some images; or of some texts, whose tokens take the place of the patches.

    Attributes:
        pooled: Of the whole images, (images, d).
        local: Of their patches, (images, patches, d).
        mask: Which patches there are, (images, patches), bool; None where every image has all of them. The others are
            padding and count for nothing.
        layers: Of the whole images after each block, (images, blocks, d), the last one `pooled`; None where they were
            not wanted.
    """

    pooled: Tensor
    local: Tensor
    mask: Tensor | None = None
    layers: Tensor | None = None

    def part(self, images: slice) -> ImageFeatures:
        """Those of some of the images."""
        return ImageFeatures(*(None if field is None else field[images] for field in self))  # type: ignore[arg-type]


class ClassWeights(NamedTuple):
    """The linear map from features to logits: logits = features @ weight.T + bias.

    Attributes:
        weight: (classes, d), float32; a model's logit scale is inside.
        bias: (classes,) or None.
        scale: That logit scale, a float32 scalar: logits are this many times cosines (100 for CLIP), up to a shift
            that is the same for all classes. 1 for a classifier, which has none.
        negative: Rows of labels that are none of the classes, (negative labels, d), scaled as `weight`; None where
            there are none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | float = 1.0
    negative: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What there is of it by name; a scale that is a plain number as a float64, which tells it from a tensor."""
        scale = torch.as_tensor(self.scale, dtype=None if isinstance(self.scale, Tensor) else torch.float64)
        parts = self._replace(scale=scale)._asdict()
        return {name: part for name, part in parts.items() if part is not None}

    def to(self, device: torch.device) -> ClassWeights:
        """The same on a device."""
        weight, bias, scale, negative = (part.to(device) if isinstance(part, Tensor) else part for part in self)
        return ClassWeights(weight, bias, scale, negative)  # type: ignore[arg-type]

    def logits(self, features: Tensor) -> Tensor:
        """Logits (..., classes) of features (..., d), float32 also under `torch.autocast`."""
        with without_autocast(features.device):
            return F.linear(features.float(), self.weight, self.bias)

    def logits_of(self, features: ImageFeatures, *, local: bool = True) -> Logits:
        """Logits of some images or texts.

        Args:
            features: As the map takes them (see `Backbone.embedded`).
            local: Whether the local logits are wanted, too.
        """
        pooled, patches, mask, layers = features
        local_logits = None
        if local:
            if mask is not None:
                first = patches[torch.arange(patches.shape[0], device=patches.device), mask.int().argmax(-1)]
                patches = torch.where(mask[..., None], patches, first[:, None])
            local_logits = self.logits(patches)
        negative = None
        if self.negative is not None:
            # A model that classifies by texts has one bias for them all (SigLIP), if any.
            bias = None if self.bias is None else self.bias[:1].expand(len(self.negative))
            negative = ClassWeights(self.negative, bias).logits(pooled)
        return Logits(
            self.logits(pooled),
            local_logits,
            self.scale,
            mask,
            None if layers is None else self.logits(layers),
            negative,
        )


class Logits(NamedTuple):
    """Logits of some images or texts, float32.

    Attributes:
        pooled: Of the whole images, (images, classes).
        local: Of their patches, (images, patches, classes); None where they were not wanted. Padding repeats the
            image's first patch, so that no maximum over patches sees it.
        scale: The model's logit scale, 1 where it has none: `logits / scale` are cosines, up to a shift that is the
            same for all classes.
        mask: Which patches there are, (images, patches), bool; None where every image has all of them.
        layers: Of the whole images after each block, (images, blocks, classes); None where they were not wanted.
        negative: Of the whole images to labels that are none of the classes, (images, negative labels); None where
            there are none.
    """

    pooled: Tensor
    local: Tensor | None
    scale: Tensor | float
    mask: Tensor | None = None
    layers: Tensor | None = None
    negative: Tensor | None = None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Computes in the dtypes of the tensors, also within `torch.autocast`."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()

"""DeiT image classifiers: ViT with a distillation token beside the class token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from setar_peft.backbones.classifier import linear_map
from setar_peft.backbones.features import ClassWeights
from setar_peft.backbones.vit import ViTBackbone, ViTTower


class _TwoHeadedTower(ViTTower):
    """Pooled features are both special tokens, and local features each patch twice, (..., 2 d): one for each head."""

    def finish(self, *args: Any) -> tuple[Tensor, ...]:
        pooled, patches = super().finish(*args)
        return pooled, torch.cat([patches, patches], dim=-1)

    def pooled(self, special: Tensor) -> Tensor:
        return special.flatten(1)


class DeiTBackbone(ViTBackbone):
    """A stock `transformers.DeiTForImageClassification` or `DeiTForImageClassificationWithTeacher`.

    With a teacher the logits are the mean of two classifiers', one for the class token and one for the distillation
    token; a patch goes through both.
    """

    model_type = "deit"
    model_classes: ClassVar[Sequence[str]] = ("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._has_teacher = hasattr(model, "distillation_classifier")
        self.towers = {"vision": (_TwoHeadedTower if self._has_teacher else ViTTower)(model, special_tokens=2)}

    def class_weights(self, text_features: Tensor | None = None) -> ClassWeights:
        """The classifier, or both side by side and halved: (classes, d) or (classes, 2 d)."""
        if not self._has_teacher:
            return super().class_weights(text_features)
        heads = [linear_map(self.model.cls_classifier), linear_map(self.model.distillation_classifier)]
        biases = [head.bias for head in heads if head.bias is not None]
        return ClassWeights(
            torch.cat([head.weight for head in heads], dim=1) / 2,
            torch.stack(biases).sum(0) / 2 if biases else None,
        )

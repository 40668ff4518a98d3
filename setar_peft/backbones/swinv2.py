"""Swin-V2 image classifiers: Swin with the norms of a block behind its attention and its MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from setar_peft.backbones.swin import SwinBackbone, SwinTower


class _Tower(SwinTower):
    def value_path(self, block: Any, patches: Tensor) -> Tensor:
        values = block.attention.self.value(patches)
        return patches + block.layernorm_before(block.attention.output(values, patches))

    def mlp(self, block: Any, patches: Tensor) -> Tensor:
        return patches + block.layernorm_after(block.output(block.intermediate(patches)))


class Swinv2Backbone(SwinBackbone):
    """A stock `transformers.Swinv2ForImageClassification`; local logits as in `SwinBackbone`."""

    model_type = "swinv2"
    model_classes: ClassVar[Sequence[str]] = ("Swinv2ForImageClassification",)
    weight_names: ClassVar[dict[str, str]] = {
        "W_q": "attention.self.query",
        "W_k": "attention.self.key",
        "W_v": "attention.self.value",
        "W_o": "attention.output.dense",
        "W_up": "intermediate.dense",
        "W_down": "output.dense",
    }
    tower_class = _Tower

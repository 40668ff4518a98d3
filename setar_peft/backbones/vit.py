"""ViT image classifiers: the class token through a linear classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from setar_peft.backbones.attention import attended_by_first
from setar_peft.backbones.base import Tower, TowerInput
from setar_peft.backbones.classifier import ClassifierBackbone
from setar_peft.backbones.inputs import check_images


class ViTTower(Tower):
    """The blocks of a ViT or DeiT, with the final norm on top.

    Args:
        model: A model with a classifier on top of the blocks.
        special_tokens: Tokens before the patches.
    """

    name = "vision"

    def __init__(self, model: Any, special_tokens: int = 1) -> None:
        prefix = model.base_model_prefix
        names = [f"{prefix}.layers.{index}" for index in range(len(model.base_model.layers))]
        super().__init__(model, names, [f"{prefix}.layernorm"])
        self.special_tokens = special_tokens

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        """Run the model without its classifier."""
        return self.model.base_model(pixel_values=inputs["pixel_values"])

    def finish(self, entry: TowerInput, hidden: Tensor) -> tuple[Tensor, ...]:
        """The class token, (images, d), and the patches past the last block's attention, (images, patches, d)."""
        del entry
        block, attention, first = self.blocks[-1], self.blocks[-1].attention, self.special_tokens
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        normed = block.layernorm_before(hidden)
        attended = attended_by_first(normed, projections, attention.head_dim, attention.scaling, first=first)
        tokens = hidden + attention.o_proj(attended)
        tokens = self.model.base_model.layernorm(tokens + block.mlp(block.layernorm_after(tokens)))
        return self.pooled(tokens[:, :first]), tokens[:, first:]

    def class_token(self, hidden: Tensor) -> Tensor:
        """The special tokens after a block, through the final norm and as the classifier reads them, (images, d)."""
        return self.pooled(self.model.base_model.layernorm(hidden[:, : self.special_tokens]))

    def pooled(self, special: Tensor) -> Tensor:
        """What the classifier reads, (images, d), of the special tokens (images, special tokens, d)."""
        return special[:, 0]


class ViTBackbone(ClassifierBackbone):
    """A stock `transformers.ViTForImageClassification`.

    Local logits: patches through the last block's value path and MLP, the final norm, and the classifier.
    """

    model_type = "vit"
    model_classes: ClassVar[Sequence[str]] = ("ViTForImageClassification",)
    weight_names: ClassVar[dict[str, str]] = {
        "W_q": "attention.q_proj",
        "W_k": "attention.k_proj",
        "W_v": "attention.v_proj",
        "W_o": "attention.o_proj",
        "W_up": "mlp.fc1",
        "W_down": "mlp.fc2",
    }

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.towers = {"vision": ViTTower(model)}

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise a `ValueError` unless the images have the model's channels, height and width."""
        check_images(inputs, self.model.config.num_channels, self.model.config.image_size)

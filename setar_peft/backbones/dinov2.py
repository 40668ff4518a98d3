"""DINOv2 image classifiers, with and without registers: class token and mean patch through a linear classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from setar_peft.backbones.base import Tower, TowerInput
from setar_peft.backbones.classifier import ClassifierBackbone
from setar_peft.backbones.inputs import check_images


class _Tower(Tower):
    name = "vision"

    def __init__(self, model: Any) -> None:
        prefix = model.base_model_prefix
        names = [f"{prefix}.encoder.layer.{index}" for index in range(len(model.base_model.encoder.layer))]
        super().__init__(model, names, [f"{prefix}.layernorm"])
        self._special_tokens = 1 + getattr(model.config, "num_register_tokens", 0)

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.model.base_model(pixel_values=inputs["pixel_values"])

    def finish(self, entry: TowerInput, hidden: Tensor) -> tuple[Tensor, ...]:
        block, norm = self.blocks[-1], self.model.base_model.layernorm
        local = hidden[:, self._special_tokens :]
        local = local + block.layer_scale1(block.attention.o_proj(block.attention.v_proj(block.norm1(local))))
        tokens = norm(self.step(entry, len(self.blocks) - 1, hidden))
        local = norm(local + block.layer_scale2(block.mlp(block.norm2(local))))
        return self._pooled(tokens), torch.cat([torch.zeros_like(local), local], dim=-1)

    def class_token(self, hidden: Tensor) -> Tensor:
        return self._pooled(self.model.base_model.layernorm(hidden))

    def _pooled(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, 0], tokens[:, self._special_tokens :].mean(1)], dim=-1)


class Dinov2Backbone(ClassifierBackbone):
    """A stock `transformers.Dinov2ForImageClassification`.

    The classifier reads the class token beside the mean of the patches, (images, 2 d). Local logits are a patch's own
    share of that: patches through the last block's value path and MLP and the final norm, in place of the mean, with
    zeros in place of the class token. (With the class token itself every patch would carry the whole image's
    evidence, and none would ever be OOD in an image that is classified right.)

    The model takes images of any size that its patches divide.
    """

    model_type = "dinov2"
    model_classes: ClassVar[Sequence[str]] = ("Dinov2ForImageClassification",)
    weight_names: ClassVar[dict[str, str]] = {
        "W_q": "attention.q_proj",
        "W_k": "attention.k_proj",
        "W_v": "attention.v_proj",
        "W_o": "attention.o_proj",
        "W_up": "mlp.fc1",
        "W_down": "mlp.fc2",
    }
    # The giant model gates its MLP (SwiGLU).
    gated_weight_names: ClassVar[dict[str, str]] = {"W_up": "mlp.up_proj", "W_down": "mlp.down_proj"}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not hasattr(self.model.base_model.encoder.layer[0].attention, "o_proj"):
            raise ValueError(
                f"{type(model).__name__} is built and named differently before transformers 5.18, and this is "
                f"{transformers.__version__}. Update transformers; the other families work with it."
            )
        if self.model.config.use_swiglu_ffn:
            self.weight_names = {**self.weight_names, **self.gated_weight_names}  # type: ignore[misc] # this model's
        self.towers = {"vision": _Tower(model)}

    @classmethod
    def default_targets(cls) -> set[str]:
        """W_up of either MLP."""
        return {cls.weight_names["W_up"], cls.gated_weight_names["W_up"]}

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise a `ValueError` unless the images have the model's channels."""
        check_images(inputs, self.model.config.num_channels, self.model.config.image_size, any_size=True)


class Dinov2WithRegistersBackbone(Dinov2Backbone):
    """A stock `transformers.Dinov2WithRegistersForImageClassification`; the registers are neither pooled nor local."""

    model_type = "dinov2_with_registers"
    model_classes: ClassVar[Sequence[str]] = ("Dinov2WithRegistersForImageClassification",)

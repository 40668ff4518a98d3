"""CLIP: a vision and a text tower with a projection (W_p) on top of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from setar_peft.backbones.base import Backbone, Tower, TowerInput
from setar_peft.losses import ClassWeights


class _VisionTower(Tower):
    name = "vision"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = model.vision_model.encoder.layers
        self.block_names = [f"vision_model.encoder.layers.{index}" for index in range(len(self.blocks))]
        self.head = {
            "vision_model.post_layernorm": model.vision_model.post_layernorm,
            "visual_projection": model.visual_projection,
        }

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.model.vision_model(pixel_values=inputs["pixel_values"])

    def finish(self, entry: TowerInput, hidden: Tensor) -> tuple[Tensor, ...]:
        block: Any = self.blocks[-1]
        # The patches take the last block's value path instead of its attention, then its MLP (Miyai et al., 2023b).
        patches = hidden[:, 1:]
        patches = patches + block.self_attn.out_proj(block.self_attn.v_proj(block.layer_norm1(patches)))
        pooled = self.step(entry, len(self.blocks) - 1, hidden)[:, 0]
        patches = patches + block.mlp(block.layer_norm2(patches))
        return self._project(pooled), self._project(patches)

    def _project(self, hidden: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model.post_layernorm(hidden))


class _TextTower(Tower):
    name = "text"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = model.text_model.encoder.layers
        self.block_names = [f"text_model.encoder.layers.{index}" for index in range(len(self.blocks))]
        self.head = {
            "text_model.final_layer_norm": model.text_model.final_layer_norm,
            "text_projection": model.text_projection,
        }

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.model.text_model(**inputs)

    def context(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Position of the end-of-text token of each prompt, (prompts,)."""
        ids = inputs["input_ids"]
        end = self.model.config.text_config.eos_token_id
        # Checkpoints from before transformers' PR 24773 carry the id 2 and mean the largest token id.
        return ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)

    def finish(self, entry: TowerInput, hidden: Tensor) -> tuple[Tensor, ...]:
        hidden = self.step(entry, len(self.blocks) - 1, hidden)
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), entry.context.to(hidden.device)]
        return (self.model.text_projection(self.model.text_model.final_layer_norm(pooled)),)


class CLIPBackbone(Backbone):
    """A stock `transformers.CLIPModel`, of any size."""

    model_type = "clip"
    weight_names: ClassVar[dict[str, str]] = {
        "W_q": "self_attn.q_proj",
        "W_k": "self_attn.k_proj",
        "W_v": "self_attn.v_proj",
        "W_o": "self_attn.out_proj",
        "W_up": "mlp.fc1",
        "W_down": "mlp.fc2",
    }
    projection_names: ClassVar[dict[str, str]] = {"vision": "visual_projection", "text": "text_projection"}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.towers = {"vision": _VisionTower(model), "text": _TextTower(model)}

    def embed(self, features: Tensor) -> Tensor:
        """Features of unit length, float32."""
        features = features.float()
        return features / features.norm(dim=-1, keepdim=True)

    def class_weights(self, text_features: Tensor | None) -> ClassWeights:
        """Text features of unit length times CLIP's logit scale, (classes, d)."""
        if text_features is None:
            raise ValueError("CLIP classifies by text: give the features of the class prompts.")
        model: Any = self.model
        return ClassWeights(self.embed(text_features) * model.logit_scale.detach().float().exp())

    def check_pixels(self, pixel_values: Tensor) -> None:
        """Raise a `ValueError` unless the images have the channels, height and width of the vision tower."""
        config: Any = self.model.config.vision_config  # type: ignore[union-attr]
        expected = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"The images have shape {tuple(pixel_values.shape)}; this model takes (images, "
                f"{', '.join(map(str, expected))}). Give the processor that belongs to the model, or tensors it made."
            )

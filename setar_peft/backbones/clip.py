"""CLIP: a vision and a text tower with a projection (W_p) on top of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from setar_peft.backbones.attention import attended_by_first
from setar_peft.backbones.base import Backbone, Tower, TowerInput
from setar_peft.backbones.features import ClassWeights
from setar_peft.backbones.inputs import check_images
from setar_peft.backbones.prompts import (
    Prompts,
    block_step,
    check_length,
    end_positions,
    laid_out,
    last_block_at_ends,
    shared,
)


class _VisionTower(Tower):
    name = "vision"

    def __init__(self, model: Any) -> None:
        names = [f"vision_model.encoder.layers.{index}" for index in range(len(model.vision_model.encoder.layers))]
        super().__init__(model, names, ["vision_model.post_layernorm", "visual_projection"])

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.model.vision_model(pixel_values=inputs["pixel_values"])

    def finish(self, entry: TowerInput, hidden: Tensor) -> tuple[Tensor, ...]:
        del entry
        # The patches take the last block's value path instead of its attention, then its MLP (Miyai et al., 2023b);
        # so only the pooled token attends, and both go through the MLP together.
        block, attention = self.blocks[-1], self.blocks[-1].self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        attended = attended_by_first(block.layer_norm1(hidden), projections, attention.head_dim, attention.scale)
        tokens = hidden + attention.out_proj(attended)
        tokens = tokens + block.mlp(block.layer_norm2(tokens))
        tokens = self._project(tokens)
        return tokens[:, 0], tokens[:, 1:]

    def class_token(self, hidden: Tensor) -> Tensor:
        return self._project(hidden[:, 0])

    def _project(self, hidden: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model.post_layernorm(hidden))


class _TextTower(Tower):
    name = "text"

    def __init__(self, model: Any) -> None:
        names = [f"text_model.encoder.layers.{index}" for index in range(len(model.text_model.encoder.layers))]
        super().__init__(model, names, ["text_model.final_layer_norm", "text_projection"])

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        check_length(inputs["input_ids"], self.model.config.text_config.max_position_embeddings)
        return self.model.text_model(**inputs)

    def context(self, inputs: Mapping[str, Tensor]) -> Prompts:
        """Where the prompts end, and what they have in common.

        Raises:
            ValueError: If a prompt has no end token, in whose place the model would read its first.
        """
        ids = inputs["input_ids"]
        end = self.model.config.text_config.eos_token_id
        # Checkpoints from before transformers' PR 24773 carry the id 2 and mean the largest token id.
        ends = ids.argmax(-1) if end == 2 else end_positions(ids, end)
        return laid_out(ids, ends, inputs.get("attention_mask"))

    def enter(self, inputs: Mapping[str, Tensor]) -> TowerInput:
        """As every tower; the common beginning of the prompts is in a row of its own."""
        entry = super().enter(inputs)
        if entry.context.beginning:
            entry.hidden = shared(entry.hidden, entry.context)
        return entry

    def step(self, entry: TowerInput, level: int, hidden: Tensor) -> Tensor:
        """Run one block, the common beginning once."""
        if entry.context.beginning:
            return block_step(self.blocks[level], hidden, entry.context)
        return super().step(entry, level, hidden)

    def finish(self, entry: TowerInput, hidden: Tensor) -> tuple[Tensor, ...]:
        if entry.context.blind:
            # What the model makes of a token that may attend to nothing depends on its attention's implementation.
            hidden = super().step(entry, len(self.blocks) - 1, hidden)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), entry.context.ends.to(hidden.device)]
        else:
            pooled = last_block_at_ends(self.blocks[-1], hidden, entry.context)
        return (self.model.text_projection(self.model.text_model.final_layer_norm(pooled)),)


class CLIPBackbone(Backbone):
    """A stock `transformers.CLIPModel`, of any size."""

    model_type = "clip"
    model_classes: ClassVar[Sequence[str]] = ("CLIPModel",)
    weight_names: ClassVar[dict[str, str]] = {
        "W_q": "self_attn.q_proj",
        "W_k": "self_attn.k_proj",
        "W_v": "self_attn.v_proj",
        "W_o": "self_attn.out_proj",
        "W_up": "mlp.fc1",
        "W_down": "mlp.fc2",
    }
    projection_names: ClassVar[dict[str, str]] = {"vision": "visual_projection", "text": "text_projection"}
    tower_classes: ClassVar[tuple[Callable[[nn.Module], Tower], ...]] = (_VisionTower, _TextTower)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.longest_prompt = self.model.config.text_config.max_position_embeddings
        self.towers = {tower.name: tower for tower in (make(model) for make in self.tower_classes)}

    def embed(self, features: Tensor) -> Tensor:
        """Features of unit length, float32."""
        features = features.float()
        return features / features.norm(dim=-1, keepdim=True)

    def class_weights(self, text_features: Tensor | None) -> ClassWeights:
        """Text features of unit length times the logit scale, (classes, d), and that scale."""
        if text_features is None:
            raise ValueError(f"{type(self.model).__name__} classifies by text: give the features of the class prompts.")
        scale = self.model.logit_scale.detach().float().exp()
        return ClassWeights(self.embed(text_features) * scale, scale=scale)

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise a `ValueError` unless the images have the channels, height and width of the vision tower."""
        config = self.model.config.vision_config
        check_images(inputs, config.num_channels, config.image_size)

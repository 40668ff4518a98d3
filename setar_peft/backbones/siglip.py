"""SigLIP: two towers without a vision projection; images are pooled by an attention head over their patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from setar_peft.backbones.base import Tower, TowerInput
from setar_peft.backbones.clip import CLIPBackbone
from setar_peft.backbones.features import ClassWeights
from setar_peft.backbones.prompts import Prompts, check_length, last_block_at_ends


def value_path(block: Any, patches: Tensor) -> Tensor:
    """Patches (images, patches, width) past a block's attention: each attends to itself alone."""
    return patches + block.self_attn.out_proj(block.self_attn.v_proj(block.layer_norm1(patches)))


class _VisionTower(Tower):
    name = "vision"

    def __init__(self, model: Any) -> None:
        names = [f"vision_model.encoder.layers.{index}" for index in range(len(model.vision_model.encoder.layers))]
        super().__init__(model, names, ["vision_model.post_layernorm", "vision_model.head"])

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.model.vision_model(**inputs)

    def context(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Which patches are no padding, (images, patches); None for images of one size."""
        return inputs.get("pixel_attention_mask")

    def finish(self, entry: TowerInput, hidden: Tensor) -> tuple[Tensor, ...]:
        block, vision, mask = self.blocks[-1], self.model.vision_model, entry.context
        patches = value_path(block, hidden)
        tokens = vision.post_layernorm(self.step(entry, len(self.blocks) - 1, hidden))
        patches = vision.post_layernorm(patches + block.mlp(block.layer_norm2(patches)))
        if mask is None:
            return vision.head(tokens), _pooled_alone(vision.head, patches)
        mask = mask.to(tokens.device)
        return vision.head(tokens, mask), _pooled_alone(vision.head, patches), mask.bool()


def _pooled_alone(head: Any, patches: Tensor) -> Tensor:
    """What the pooling head makes of each patch by itself, (images, patches, d).

    With a single patch to attend to, the head's attention is its value path, whatever the probe asks for.
    """
    width = patches.shape[-1]
    attention = head.attention
    values = F.linear(patches, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
    pooled = F.linear(values, attention.out_proj.weight, attention.out_proj.bias)
    return pooled + head.mlp(head.layernorm(pooled))


class _TextTower(Tower):
    name = "text"

    def __init__(self, model: Any) -> None:
        names = [f"text_model.encoder.layers.{index}" for index in range(len(model.text_model.encoder.layers))]
        super().__init__(model, names, ["text_model.final_layer_norm", "text_model.head"])

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        check_length(inputs["input_ids"], self.model.config.text_config.max_position_embeddings, exactly=True)
        return self.model.text_model(**inputs)

    def context(self, inputs: Mapping[str, Tensor]) -> Prompts:
        """Where the prompts end: the last token is read, be it padding, as SigLIP was trained on full-length prompts.

        Nothing is shared between prompts, since each token attends to what follows it, too.
        """
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        return Prompts(0, torch.full((len(ids),), ids.shape[1] - 1), ids.shape[1], mask)

    def finish(self, entry: TowerInput, hidden: Tensor) -> tuple[Tensor, ...]:
        pooled = last_block_at_ends(self.blocks[-1], hidden, entry.context)
        return (self.model.text_model.head(self.model.text_model.final_layer_norm(pooled)),)


class SiglipBackbone(CLIPBackbone):
    """A stock `transformers.SiglipModel`.

    Logits are `scale * cosine + bias`. SigLIP is trained with a sigmoid for each pair of image and text; the LoCoOp
    loss and the scores take the softmax over the classes, as the field does when it classifies or detects with SigLIP.
    The bias is the same for every class, so it changes no softmax: the temperature of a score that reads cosines is the
    scale alone. But it does change max-logit and energy scores.

    Local features: patches through the last block's value path and MLP, the final norm, and the pooling head applied to
    each patch alone. Thus they are in the space of the pooled features, as CLIP's are after its projection.

    The pooling head is a block of its own kind on top of the vision tower: its `mlp.fc1` and `mlp.fc2` are searched
    with W_up and W_down. The text tower's `head` is its W_p; the vision tower has none.
    """

    model_type = "siglip"
    model_classes: ClassVar[Sequence[str]] = ("SiglipModel",)
    projection_names: ClassVar[dict[str, str]] = {"text": "text_model.head"}
    pads_prompts = True
    tower_classes = (_VisionTower, _TextTower)

    def class_weights(self, text_features: Tensor | None) -> ClassWeights:
        """Text features of unit length times the logit scale, (classes, d), the logit bias, and that scale."""
        classes = super().class_weights(text_features)
        return classes._replace(bias=self.model.logit_bias.detach().float().expand(len(classes.weight)))

"""Swin image classifiers: stages of windowed blocks, the mean of the last stage's patches through a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from setar_peft.backbones.base import Tower, TowerInput
from setar_peft.backbones.classifier import ClassifierBackbone
from setar_peft.backbones.grid import PatchGrid, grid_of, pair
from setar_peft.backbones.inputs import check_images


class SwinTower(Tower):
    """The blocks of all stages in one row; a stage's last block takes the merging of patches after it along.

    Args:
        model: A Swin or Swin-V2 image classifier.
    """

    name = "vision"

    def __init__(self, model: Any) -> None:
        prefix = model.base_model_prefix
        depths = [len(stage.blocks) for stage in model.base_model.encoder.layers]
        self._stages = [stage for stage, depth in enumerate(depths) for _ in range(depth)]
        names = [
            f"{prefix}.encoder.layers.{stage}.blocks.{index}"
            for stage, depth in enumerate(depths)
            for index in range(depth)
        ]
        super().__init__(model, names, [f"{prefix}.layernorm"])
        self._mergings: dict[int, Any] = {
            level: model.base_model.encoder.layers[self._stages[level]].downsample
            for level in range(len(self.blocks) - 1)
            if self._stages[level] != self._stages[level + 1]
        }

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        """Run the model without its classifier."""
        return self.model.base_model(pixel_values=inputs["pixel_values"].to(self.model.dtype))

    def step(self, entry: TowerInput, level: int, hidden: Tensor) -> Tensor:
        """Run one block, and merge its patches where the next block is in another stage."""
        height, width = entry.args[0]
        for _ in range(self._stages[level]):
            height, width = (height + 1) // 2, (width + 1) // 2
        output = self.blocks[level](hidden, (height, width), *entry.args[1:], **entry.kwargs)[0]
        return self._mergings[level](output, (height, width)) if level in self._mergings else output

    def parts(self, level: int) -> Mapping[str, nn.Module]:
        """The block at a level and the merging of patches after it, or the head."""
        parts = dict(super().parts(level))
        if level in self._mergings:
            parts[f"{self.block_names[level].partition('.blocks.')[0]}.downsample"] = self._mergings[level]
        return parts

    def finish(self, entry: TowerInput, hidden: Tensor) -> tuple[Tensor, ...]:
        """The mean of the patches, (images, d), and the patches past the last block's attention."""
        block, base = self.blocks[-1], self.model.base_model
        patches = self.value_path(block, hidden)
        tokens = base.layernorm(self.step(entry, len(self.blocks) - 1, hidden))
        pooled = base.pooler(tokens.transpose(1, 2)).flatten(1)
        return pooled, base.layernorm(self.mlp(block, patches))

    def value_path(self, block: Any, patches: Tensor) -> Tensor:
        """Patches (images, patches, d) past a block's attention: each attends to itself alone, so no window matters."""
        return patches + block.attention.o_proj(block.attention.v_proj(block.layernorm_before(patches)))

    def mlp(self, block: Any, patches: Tensor) -> Tensor:
        """Patches (images, patches, d) through a block's MLP."""
        return patches + block.mlp(block.layernorm_after(patches))


class SwinBackbone(ClassifierBackbone):
    """A stock `transformers.SwinForImageClassification`.

    Local logits: patches of the last stage through its last block's value path and MLP, the final norm, and the
    classifier. The model takes images of any size.
    """

    model_type = "swin"
    model_classes: ClassVar[Sequence[str]] = ("SwinForImageClassification",)
    weight_names: ClassVar[dict[str, str]] = {
        "W_q": "attention.q_proj",
        "W_k": "attention.k_proj",
        "W_v": "attention.v_proj",
        "W_o": "attention.o_proj",
        "W_up": "mlp.fc1",
        "W_down": "mlp.fc2",
    }
    tower_class: ClassVar[type[SwinTower]] = SwinTower

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.towers = {"vision": self.tower_class(model)}

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise a `ValueError` unless the images have the model's channels."""
        config = self.model.config
        check_images(inputs, config.num_channels, config.image_size, any_size=not config.use_absolute_embeddings)

    def _grid(self, inputs: Mapping[str, Tensor]) -> PatchGrid:
        # Each merging halves the patches, rounding up: as if the image were padded to whole patches of the last stage.
        stages = len(self.model.base_model.encoder.layers)
        height, width = pair(self.model.config.patch_size)
        return grid_of(inputs, (height << (stages - 1), width << (stages - 1)), padded=True)

"""SigLIP 2 with images of any aspect ratio (NaFlex): SigLIP's towers, fed with patches that may be padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from setar_peft.backbones.grid import PatchGrid
from setar_peft.backbones.siglip import SiglipBackbone

_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


class Siglip2Backbone(SiglipBackbone):
    """A stock `transformers.Siglip2Model`; SigLIP 2 checkpoints of a fixed image size are `SiglipModel`s.

    Logits and local features are SigLIP's. Images come as patches, (images, patches, channels * patch_size ** 2), with
    a mask of those that are no padding and the height and width in patches: all three that the processor gives.
    Padding is no patch: it counts for nothing in the loss.
    """

    model_type = "siglip2"
    model_classes: ClassVar[Sequence[str]] = ("Siglip2Model",)

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise a `ValueError` unless the images are patches of the vision tower's size, with mask and shapes."""
        config = self.model.config.vision_config
        missing = [name for name in _INPUTS if name not in inputs]
        if missing:
            raise ValueError(
                f"The inputs lack {', '.join(missing)}; Siglip2Model takes {', '.join(_INPUTS)}. Give them by name, as "
                "the model's image processor returns them."
            )
        pixels = config.num_channels * config.patch_size**2
        shape = tuple(inputs["pixel_values"].shape)
        if len(shape) != 3 or shape[2] != pixels:
            raise ValueError(
                f"The images have shape {shape}; this model takes (images, patches, {pixels}). Give the processor that "
                "belongs to the model, or tensors it made."
            )

    def _grid(self, inputs: Mapping[str, Tensor]) -> PatchGrid:
        shapes = {(int(rows), int(columns)) for rows, columns in inputs["spatial_shapes"].tolist()}
        if len(shapes) != 1:
            listed = ", ".join(f"{rows} x {columns}" for rows, columns in sorted(shapes))
            raise ValueError(f"The images have patches in several grids ({listed}); ask for one image's at a time.")
        size = self.model.config.vision_config.patch_size
        return PatchGrid(*shapes.pop(), size, size)

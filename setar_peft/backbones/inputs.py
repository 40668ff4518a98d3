"""A model's inputs by name, and whether images have the shape that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from setar_peft.backbones.grid import pair


def named_inputs(inputs: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A model's inputs by name; a tensor alone is pixel values."""
    return {"pixel_values": inputs} if isinstance(inputs, Tensor) else inputs


def check_images(
    inputs: Mapping[str, Tensor], channels: int, size: int | Sequence[int], *, any_size: bool = False
) -> None:
    """Raise a `ValueError` unless the pixel values have the shape that a model takes.

    Args:
        inputs: The model's inputs by name.
        channels: Channels that the model takes.
        size: Height and width that the model takes, or one number for both.
        any_size: Whether it takes other sizes, too.
    """
    height, width = pair(size)
    wanted: tuple[Any, ...] = (channels, "height", "width") if any_size else (channels, height, width)
    shape = tuple(inputs["pixel_values"].shape) if "pixel_values" in inputs else None
    if shape is None or len(shape) != 4 or (shape[1:2] if any_size else shape[1:]) != wanted[: 1 if any_size else 3]:
        raise ValueError(
            f"The images have shape {shape}; this model takes (images, {', '.join(map(str, wanted))}). Give the "
            "processor that belongs to the model, or tensors it made."
        )

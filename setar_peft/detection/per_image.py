"""What the functions of logits have in common: their checks, and float32 a few images at a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

# Logits taken to float32 at a time: 64 MiB, whatever the number of images.
_CHUNK_NUMEL = 1 << 24


def per_image(logits: Tensor, temperature: Tensor | float, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """`reduce` over runs of images in float32, so that the set as a whole is never copied to float32.

    Args:
        logits: (n, ..., classes).
        temperature: Divides the logits, > 0.
        reduce: Takes (m, ..., classes), float32 and divided by the temperature, to (m, ...).

    Returns:
        (n, ...) float32.

    Raises:
        ValueError: If the temperature is not positive.
    """
    if not isinstance(temperature, (int, float, Tensor)) or not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature!r}; give a positive number: for the paper's scores the model's logit scale, "
            "such as CLIP's 100, and 1 for a classifier."
        )
    if torch.compiler.is_compiling():
        # How many chunks there are depends on the number of images, which an exported graph leaves open.
        return reduce(logits.float() / temperature)
    images_per_chunk = max(1, _CHUNK_NUMEL // math.prod(logits.shape[1:]))
    return torch.cat([reduce(chunk.float() / temperature) for chunk in torch.split(logits, images_per_chunk)])


def check_logits(argument: str, logits: Tensor, axes: tuple[str, ...]) -> None:
    """Raise a `ValueError` unless logits have these axes, none but the first empty, and are floating."""
    shape = tuple(logits.shape)
    if logits.ndim != len(axes):
        hint = " Join the height and width of the patches: logits.flatten(1, 2)." if logits.ndim == 4 else ""
        raise ValueError(
            f"{argument} have shape {shape}, {logits.ndim} dimensions; give {len(axes)}: ({', '.join(axes)}).{hint}"
        )
    if not logits.is_floating_point():
        raise ValueError(f"{argument} have dtype {logits.dtype}; give floating logits, as the model made them.")
    for axis, size in zip(axes[1:], shape[1:], strict=True):
        if size == 0:
            raise ValueError(f"{argument} have shape {shape}, no {axis}; give at least one.")


def check_count(setting: str, value: int, most: int, why: str) -> None:
    """Raise a `ValueError` unless a setting is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{setting} is {value!r}; {why}, so give a whole number from 1 to {most}.")

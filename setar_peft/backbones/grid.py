"""Where an input's patches lie: the grid of the local features, and the picture beneath it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class PatchGrid(NamedTuple):
    """How the patches of one image lie, row by row from the top left; a text's tokens are one row.

    Attributes:
        rows: Patches from top to bottom.
        columns: Patches from left to right.
        height: Pixels of a patch from top to bottom; 1 for tokens. The patches may end before the image does, or beyond
            it, where the model pads it.
        width: Pixels of a patch from left to right; 1 for tokens.
    """

    rows: int
    columns: int
    height: int
    width: int


def pair(size: Any) -> tuple[int, int]:
    """A height and width that transformers' configurations give as one number where they are alike."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def grid_of(inputs: Mapping[str, Tensor], patch: tuple[int, int], *, padded: bool = False) -> PatchGrid:
    """The grid of pixel values, (images, channels, height, width), in patches of one size.

    Args:
        inputs: The model's inputs by name.
        patch: Height and width of a patch in pixels.
        padded: Whether the model pads an image that its patches do not divide, instead of leaving the rest out.
    """
    sides = inputs["pixel_values"].shape[-2:]
    rows, columns = (-(-side // size) if padded else side // size for side, size in zip(sides, patch, strict=True))
    return PatchGrid(rows, columns, *patch)


def image_pixels(inputs: Mapping[str, Tensor], grid: PatchGrid) -> Tensor:
    """The pixel values of one image, (channels, height, width).

    Args:
        inputs: The model's inputs by name, of one image; `pixel_values` may be (1, channels, height, width), or
            flattened patches (1, patches, height * width * channels), of which those beyond the grid are padding.
        grid: The image's grid.
    """
    pixels = inputs["pixel_values"][0]
    if pixels.dim() == 3:
        return pixels
    patches = pixels[: grid.rows * grid.columns].reshape(grid.rows, grid.columns, grid.height, grid.width, -1)
    return patches.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)

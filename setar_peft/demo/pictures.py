"""Pictures of no class: crops of scikit-learn's two photographs, and noise; at any size, or in the digits' format."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

DIGIT_SIDE = 8
DIGIT_LEVELS = 17
# Twice the digits' own side: patches of 4 pixels then cover 2 x 2 of theirs, 16 patches an image.
IMAGE_SIDE = 16
_SMALLEST_CROP = 32


def photograph_crops(count: int, side: int, seed: int) -> list[Image.Image]:
    """Random square crops of scikit-learn's two photographs (a temple and a flower), scaled to one size.

    Args:
        count: Number of crops.
        side: Width and height in pixels.
        seed: Seed of their places and sizes.

    Returns:
        RGB images.
    """
    generator = np.random.default_rng(seed)
    photographs = load_sample_images().images
    crops = []
    for _ in range(count):
        photograph = photographs[generator.integers(len(photographs))]
        height, width = photograph.shape[:2]
        crop = int(generator.integers(_SMALLEST_CROP, min(height, width), endpoint=True))
        top, left = generator.integers(height - crop, endpoint=True), generator.integers(width - crop, endpoint=True)
        picture = Image.fromarray(photograph[top : top + crop, left : left + crop])
        crops.append(picture.resize((side, side), Image.Resampling.BOX if side < crop else Image.Resampling.BICUBIC))
    return crops


def noise(count: int, side: int, seed: int) -> list[Image.Image]:
    """RGB images of independent uniform noise.

    Args:
        count: Number of images.
        side: Width and height in pixels.
        seed: Seed of the noise.
    """
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def digit_image(levels: NDArray[np.floating] | NDArray[np.integer]) -> Image.Image:
    """One of the data set's digits as a grey image, scaled up.

    Args:
        levels: Grey levels, (8, 8), from 0 to 16.

    Returns:
        A grey image of 16 x 16 pixels.
    """
    grey = (np.asarray(levels) * (255 / (DIGIT_LEVELS - 1))).round().astype(np.uint8)
    return Image.fromarray(grey).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)


def in_digit_format(pictures: Iterable[Image.Image]) -> list[Image.Image]:
    """Pictures brought to what the digits are: 8 x 8 pixels in 17 levels of grey, scaled up as they are."""
    small = (picture.convert("L").resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BOX) for picture in pictures)
    return [digit_image((np.asarray(picture) * ((DIGIT_LEVELS - 1) / 255)).round()) for picture in small]

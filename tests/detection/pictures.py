"""Pictures of noise, in memory and in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Pictures of noise, 30 wide and 40 high."""
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(count)]


def written(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """The same as PNG files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}.png" for number in range(count)]
    for path, picture in zip(paths, pictures(count, seed), strict=True):
        picture.save(path)
    return paths

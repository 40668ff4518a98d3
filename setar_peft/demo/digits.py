"""Scikit-learn's handwritten digits: zero to six in-distribution, seven to nine held out, and pictures of no digit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from setar_peft.demo import tiny_clip
from setar_peft.demo.pictures import digit_image, in_digit_format, noise, photograph_crops

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six")
SEARCH_IMAGES_PER_CLASS = 20
TEST_IMAGES_PER_CLASS = 50
OOD_IMAGES = 200
_SEED = 0


class LabelledImages(NamedTuple):
    """Images and their class indices, in the same order."""

    images: list[Image.Image]
    labels: list[int]


@dataclass(frozen=True)
class DigitImages:
    """The demo's images, 16 x 16 and grey; no image is in two sets.

    Attributes:
        class_names: Names of the in-distribution classes, "zero" to "six".
        train: What the demo's model is trained on.
        search: For the search: 20 images a class.
        test: In-distribution test images: 50 a class.
        ood: Name of an OOD set -> 200 images: digits that the model has never seen, and photographs and noise
            brought to the digits' format.
    """

    class_names: list[str]
    train: LabelledImages
    search: LabelledImages
    test: LabelledImages
    ood: dict[str, list[Image.Image]]


def load_images() -> DigitImages:
    """The demo's images; the same ones each time. Nothing is downloaded: they come with scikit-learn."""
    digits = load_digits()
    generator = np.random.default_rng(_SEED)
    indices: dict[str, list[int]] = {"search": [], "test": [], "train": []}
    for label in range(len(CLASS_NAMES)):
        shuffled = generator.permutation(np.flatnonzero(digits.target == label)).tolist()
        search_end = SEARCH_IMAGES_PER_CLASS
        test_end = search_end + TEST_IMAGES_PER_CLASS
        indices["search"] += shuffled[:search_end]
        indices["test"] += shuffled[search_end:test_end]
        indices["train"] += shuffled[test_end:]
    held_out = generator.permutation(np.flatnonzero(digits.target >= len(CLASS_NAMES)))[:OOD_IMAGES]
    sets = {
        name: LabelledImages([digit_image(digits.images[i]) for i in chosen], [int(digits.target[i]) for i in chosen])
        for name, chosen in indices.items()
    }
    return DigitImages(
        class_names=list(CLASS_NAMES),
        **sets,
        ood={
            "digits 7-9": [digit_image(digits.images[i]) for i in held_out],
            "photographs": in_digit_format(photograph_crops(OOD_IMAGES, 64, _SEED)),
            # Noise at the digits' own size: larger noise would average out to plain grey.
            "noise": in_digit_format(noise(OOD_IMAGES, 8, _SEED)),
        },
    )


def load_model(
    cache: str | Path | None = None, *, steps: int = tiny_clip.STEPS, progress: bool = True
) -> tuple[Any, Any]:
    """The demo's CLIP and its processor: trained on the first call, read from the cache afterwards.

    Args:
        cache: Folder to keep it in; by default `setar_peft` in the user's cache folder.
        steps: Training steps.
        progress: Show a progress bar on standard error while it is trained.

    Returns:
        A `transformers.CLIPModel` in evaluation mode and a `transformers.CLIPProcessor`.

    Raises:
        ValueError: If the cache cannot be written or is damaged.
    """
    return tiny_clip.load(model_folder(cache, steps=steps, progress=progress))


def model_folder(cache: str | Path | None = None, *, steps: int = tiny_clip.STEPS, progress: bool = True) -> Path:
    """The folder of the demo's CLIP, in transformers' format; see `load_model`."""
    return tiny_clip.cached(cache, lambda: load_images().train, CLASS_NAMES, steps=steps, progress=progress)

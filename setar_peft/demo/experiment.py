"""What the demo runs on: its own digits and model, or a CLIP and folders of images that the user names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from setar_peft.backbones.loading import load_model, load_processor, torch_device
from setar_peft.data.folders import class_names_of, read_folder
from setar_peft.data.images import ImageSource
from setar_peft.data.labels import ClassNames, class_indices
from setar_peft.demo import digits
from setar_peft.demo.pictures import noise, photograph_crops
from setar_peft.demo.tiny_clip import STEPS
from setar_peft.objectives.locoop import LoCoOpObjective

SEARCH_IMAGES = 100
GENERATED_OOD_IMAGES = 100
_SEED = 0
_OBJECTIVE = inspect.signature(LoCoOpObjective).parameters


@dataclass(frozen=True)
class Settings:
    """What a user may set of a run: of the objective (see `LoCoOpObjective`), with its defaults, and the device.

    Attributes:
        ood_weight: lambda of the LoCoOp loss.
        top_k: K of the LoCoOp loss.
        prompt: Text with "{class}" in it.
        batch_size: Images a batch.
        device: "cpu", "cuda" and so on; by default a GPU if there is one.
    """

    ood_weight: float = _OBJECTIVE["ood_weight"].default
    top_k: int | None = _OBJECTIVE["top_k"].default
    prompt: str = _OBJECTIVE["prompt"].default
    batch_size: int = _OBJECTIVE["batch_size"].default
    device: str | None = None


@dataclass(frozen=True)
class Experiment:
    """A model, images to search with, images to test on, and images of no class.

    Attributes:
        title: What this is, in one line.
        base: Folder or Hub name of the base model, which another process can load.
        model: The base model, in evaluation mode.
        processor: Its processor.
        objective: The search's loss, over the search's images.
        test: In-distribution test images, with labels; none of them is among the search's.
        ood: Name of an OOD set -> its images.
    """

    title: str
    base: str
    model: Any
    processor: Any
    objective: LoCoOpObjective
    test: ImageSource
    ood: dict[str, ImageSource]


def digits_experiment(
    settings: Settings, cache: str | Path | None = None, *, steps: int = STEPS, progress: bool = True
) -> Experiment:
    """The demo's own images and model, which is trained on the first call.

    Args:
        settings: Settings of the run.
        cache: Folder to keep the model in; by default `setar_peft` in the user's cache folder.
        steps: Training steps.
        progress: Show a progress bar while it is trained.

    Raises:
        ValueError: If the cache cannot be written or is damaged, or a setting is outside its range.
    """
    device = torch_device(settings.device)
    folder = digits.model_folder(cache, steps=steps, progress=progress)
    model, processor = digits.load_model(cache, steps=steps, progress=progress)
    data = digits.load_images()
    return _experiment(
        f"scikit-learn's digits zero to six with a small CLIP trained on {len(data.train.images)} of them",
        folder,
        model.to(device),
        processor,
        ClassNames.of(data.class_names),
        data.search,
        data.test,
        data.ood,
        settings,
    )


def folder_experiment(
    model: str,
    images: str | Path,
    settings: Settings,
    *,
    classes: str | Path | None = None,
    ood: Sequence[str | Path] = (),
    search_images_per_class: int | None = None,
) -> Experiment:
    """A CLIP and images of the user's own.

    Args:
        model: Folder or Hub name of a CLIP.
        images: Folder with one subfolder of images a class.
        settings: Settings of the run.
        classes: JSON file with a list of class names, which the subfolders match by name, or a mapping from subfolder
            to class name; by default the subfolders' names are the classes'.
        ood: Folders of OOD images; photograph crops and noise of the model's size are always added.
        search_images_per_class: Images of each class that the search gets; the others are for testing. By default
            about 100 in all, and at most half of the smallest class.

    Raises:
        ValueError: If the model, a folder or the file cannot be read, a class has too few images, or a setting is
            outside its range.
    """
    device = torch_device(settings.device)
    names = class_names_of(Path(images), classes)
    files = read_folder(images, labelled=True)
    labels, _ = class_indices(files.labels, None, len(files.paths), names, f"The folders of {images}")
    search, test = split_by_class(labels.numpy(), names.names, search_images_per_class)
    sets: dict[str, Any] = {Path(folder).name or str(folder): folder for folder in ood}
    if len(sets) < len(ood):
        raise ValueError(f"Two of the OOD folders have one name: {', '.join(map(str, ood))}. Rename one of them.")
    clip, processor = load_clip(model)
    side = clip.config.vision_config.image_size
    sets["photographs"] = photograph_crops(GENERATED_OOD_IMAGES, side, _SEED)
    sets["noise"] = noise(GENERATED_OOD_IMAGES, side, _SEED)
    return _experiment(
        f"{model} with the {len(names)} classes of {images}",
        model,
        clip.to(device),
        processor,
        names,
        files.of(search),
        files.of(test),
        sets,
        settings,
    )


def _experiment(
    title: str,
    base: str | Path,
    model: Any,
    processor: Any,
    class_names: ClassNames,
    search: tuple[Any, Any],
    test: tuple[Any, Any],
    ood: Mapping[str, Any],
    settings: Settings,
) -> Experiment:
    objective = LoCoOpObjective(
        processor,
        class_names,
        *search,
        ood_weight=settings.ood_weight,
        top_k=settings.top_k,
        prompt=settings.prompt,
        batch_size=settings.batch_size,
    )
    sources = {name: ImageSource(processor, images, batch_size=settings.batch_size) for name, images in ood.items()}
    test_source = ImageSource(processor, *test, class_names=class_names, batch_size=settings.batch_size)
    return Experiment(title, str(base), model.eval(), processor, objective, test_source, sources)


def split_by_class(
    labels: np.ndarray[Any, np.dtype[np.int64]], class_names: Sequence[str], search_images_per_class: int | None
) -> tuple[list[int], list[int]]:
    """Indices of the search's images and of the test images; no index is in both.

    Args:
        labels: (images,) class indices.
        class_names: Names of the classes, for the error.
        search_images_per_class: Images of each class for the search; by default about 100 in all, and at most half of
            the smallest class.

    Raises:
        ValueError: If a class does not have an image for each side, or the number is not positive.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    smallest = int(counts.argmin())
    chosen = search_images_per_class
    if chosen is None:
        chosen = max(1, min(round(SEARCH_IMAGES / len(class_names)), int(counts.min()) // 2))
    if chosen < 1:
        raise ValueError(f"search-images-per-class is {chosen}; give 1 or more.")
    if counts[smallest] <= chosen:
        raise ValueError(
            f"Class {class_names[smallest]!r} has {counts[smallest]} images, and the search takes {chosen} of each "
            "class; at least one has to be left for testing. Add images, or lower search-images-per-class."
        )
    generator = np.random.default_rng(_SEED)
    search: list[int] = []
    test: list[int] = []
    for label in range(len(class_names)):
        shuffled = generator.permutation(np.flatnonzero(labels == label)).tolist()
        search += shuffled[:chosen]
        test += shuffled[chosen:]
    return search, test


def load_clip(model: str) -> tuple[Any, Any]:
    """A CLIP and its processor.

    Args:
        model: Folder or Hub name.

    Raises:
        ValueError: If there is no such model, or it is no CLIP.
    """
    clip = load_model(model)
    if clip.config.model_type != "clip":
        raise ValueError(
            f"{model} is of model type {clip.config.model_type!r}; the demo takes a CLIP, such as "
            "openai/clip-vit-base-patch16."
        )
    return clip, load_processor(model, clip)

"""Folders of images: which files are images, and which class a subfolder is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


def read_folder(folder: str | Path, class_names: Sequence[str] | None = None) -> datasets.Dataset:
    """The images in a folder, in sorted order.

    Args:
        folder: Without `class_names`, images anywhere below it. With them, one subfolder a class: a subfolder that is
            named after a class is that class; if none is, the sorted subfolders are the classes in order.
        class_names: Names of the classes.

    Returns:
        A data set with the columns "image" and, with `class_names`, "label".

    Raises:
        ValueError: If the folder does not exist, holds no images, or its subfolders do not fit the classes.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give the folder that holds the images.")
    if class_names is None:
        paths = _image_files(root)
        columns: dict[str, Any] = {"image": [str(path) for path in paths]}
        features = datasets.Features({"image": datasets.Image()})
    else:
        subfolders = sorted(path for path in root.iterdir() if path.is_dir())
        index = _class_of(subfolders, class_names, root)
        labelled = [(str(path), index[sub.name]) for sub in subfolders for path in _image_files(sub)]
        columns = {"image": [path for path, _ in labelled], "label": [label for _, label in labelled]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    if not columns["image"]:
        raise ValueError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return datasets.Dataset.from_dict(columns, features=features)


def class_names_of(images: Path, classes: str | Path | None) -> list[str]:
    """Names of the classes: those in a JSON file, or those of the subfolders, sorted.

    Raises:
        ValueError: If the folder does not exist, or the file holds no list of names.
    """
    if classes is None:
        if not images.is_dir():
            raise ValueError(f"{images} is no folder; give the folder that has one subfolder of images a class.")
        return sorted(path.name for path in images.iterdir() if path.is_dir())
    try:
        names = json.loads(Path(classes).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{classes} cannot be read as JSON ({error}); give a list of class names.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{classes} holds no list of names; write for example ["cat", "dog"].')
    return names


def _class_of(subfolders: Sequence[Path], class_names: Sequence[str], root: Path) -> dict[str, int]:
    names = [path.name for path in subfolders]
    if set(names) <= set(class_names):
        return {name: list(class_names).index(name) for name in names}
    if len(names) != len(class_names) or set(names) & set(class_names):
        strangers = [name for name in names if name not in class_names]
        raise ValueError(
            f"{root} has {len(names)} subfolders for {len(class_names)} classes; {', '.join(strangers[:4])} "
            "fit no class name. Name each subfolder after its class, or have as many as classes, in sorted order."
        )
    return {name: index for index, name in enumerate(names)}


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())

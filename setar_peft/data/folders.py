"""Folders of images: which files are images, and which class folder each lies in."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from setar_peft.data.labels import ClassNames, in_natural_order

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
# Files that lie beside images and are none; whatever else is left out is said.
_NO_IMAGES = frozenset(
    {".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".html", ".ini", ".log", ".db"}
)


class FolderImages(NamedTuple):
    """The images in a folder.

    Attributes:
        paths: Their files, in sorted order.
        labels: Name of the class folder that each lies in; None where classes are not asked for.
    """

    paths: list[Path]
    labels: list[str] | None

    def of(self, numbers: Iterable[int]) -> FolderImages:
        """Some of the images, by their numbers."""
        chosen = list(numbers)
        labels = None if self.labels is None else [self.labels[number] for number in chosen]
        return FolderImages([self.paths[number] for number in chosen], labels)


def read_folder(folder: str | Path, *, labelled: bool) -> FolderImages:
    """The images in a folder: anywhere below it, or one subfolder a class.

    Hidden files and folders and `__MACOSX` are passed over. Warns of everything else that is left out and might be
    an image.

    Args:
        folder: The folder.
        labelled: Whether each subfolder is a class.

    Raises:
        ValueError: If the folder does not exist, holds no images, or a class folder holds none.
    """
    root = Path(folder)
    if not labelled:
        paths = _images_below(root, [root])
        if not paths:
            raise ValueError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        return FolderImages(paths, None)
    subfolders = {path.name: path for path in sorted(_entries(root)) if path.is_dir()}
    if not subfolders:
        raise ValueError(f"{root} has no class folders; give the folder that has one subfolder of images a class.")
    paths = _images_below(root, subfolders.values())
    labels = [path.relative_to(root).parts[0] for path in paths]
    empty = [name for name in subfolders if name not in set(labels)]
    if empty:
        raise ValueError(
            f"{root}: the class folders {', '.join(in_natural_order(empty))} hold no images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}). Fill them, or take them away."
        )
    loose = [path.name for path in sorted(_entries(root)) if path.is_file() and _may_be_image(path)]
    if loose:
        _warn(f"{len(loose)} images in {root} lie in no class folder and are left out: {', '.join(loose[:4])}")
    return FolderImages(paths, labels)


def class_names_of(
    images: str | Path, classes: str | Path | None, id2label: Mapping[int, str] | None = None
) -> ClassNames:
    """The classes of a folder with one subfolder a class, by a file, the model or the subfolders.

    Args:
        images: The folder.
        classes: JSON file with a list of class names in the labels' order, or a mapping from subfolder to class name,
            for a classifier of those subfolders alone that do not have the class's name.
        id2label: A classifier's `config.id2label`; its numbering is the one that counts. None where classes are given
            by prompts.

    Returns:
        The classes, in the classifier's order if it names them; else as the file has them; else one for each
        subfolder, sorted, numbers as numbers, with spaces for underscores.

    Raises:
        ValueError: If the folder or file cannot be read, or the names are not the classifier's.
    """
    model = ClassNames.of_model(id2label)
    # Of a classifier's names a mapping may hold those alone that differ from the folders'.
    given = None if classes is None else ClassNames.of(_read_json(classes), 2 if model is None else 1)
    if model is not None:
        if given is None:
            return model
        ordered = given.in_order_of(model)
        if given.keys is None and not given.is_in_order_of(model):
            _warn(f"{classes} lists the model's classes in another order; they are numbered as the model numbers them")
        return ordered
    if given is not None:
        return given
    if id2label is not None:
        raise ValueError(
            f"The model does not name its {len(id2label)} classes ({', '.join(list(id2label.values())[:2])}, ...), so "
            f"the folders of {images} cannot be matched with them; give --classes, a JSON list of the folders' names "
            "in the order of the model's outputs."
        )
    root = Path(images)
    # For a prompt: "a photo of a golden retriever". The folders still match, and the caller is told.
    return ClassNames.of(in_natural_order(path.name.replace("_", " ") for path in _entries(root) if path.is_dir()))


def _read_json(file: str | Path) -> Any:
    try:
        names = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}); give a list of class names.") from error
    values = list(names.values()) if isinstance(names, dict) else names
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise ValueError(
            f'{file} holds no list of names; write for example ["cat", "dog"], or {{"folder": "class name", ...}}.'
        )
    return names


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder that has one subfolder of images a class.")
    return [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX"]


def _images_below(root: Path, folders: Iterable[Path]) -> list[Path]:
    """Every image below some folders, sorted; what is left out is said."""
    images: list[Path] = []
    left_out: list[Path] = []
    for folder in folders:
        _collect(folder, (), images, left_out)
    if left_out:
        kinds = Counter(
            "folder that is a loop" if path.is_dir() else path.suffix.lower() or "without a suffix" for path in left_out
        )
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        _warn(f"In {root} some files are not read as images and are left out: {counts} (the first is {min(left_out)})")
    return sorted(images)


def _collect(folder: Path, above: tuple[str, ...], images: list[Path], left_out: list[Path]) -> None:
    """The images in a folder, links followed; a link to a folder that it lies in would go round for ever."""
    here = os.path.realpath(folder)
    if here in above:
        left_out.append(folder)
        return
    for path in _entries(folder):
        if path.is_dir():
            _collect(path, (*above, here), images, left_out)
        elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            images.append(path)
        elif _may_be_image(path):
            left_out.append(path)


def _may_be_image(path: Path) -> bool:
    """Whether a file is to be spoken of if it is left out; one without a suffix is looked into."""
    if path.suffix:
        return path.suffix.lower() not in _NO_IMAGES
    try:
        with Image.open(path):
            return True
    except OSError:
        return False


def _warn(sentence: str) -> None:
    warnings.warn(f"{sentence}.", UserWarning, stacklevel=3)

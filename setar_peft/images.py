"""Images from wherever users have them, as batches of pixel values and labels."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


class ImageSource:
    """A set of images, labelled or not, in a fixed order.

    Args:
        processor: A processor with an image processor in it, or an image processor. Not used for pixel values.
        dataset: A `datasets.Dataset`, a folder (with one subfolder a class where labels are wanted), a tensor of
            pixel values (images, channels, height, width), or a sequence of PIL images or arrays.
        labels: (images,) class indices, for tensors and sequences.
        class_names: Names of the classes; None for images without labels, such as an OOD set.
        batch_size: Images a batch.
        image_column: Name of the data set's image column; by default the one of image type.
        label_column: Name of the data set's label column; by default the one of class-label type, or "label".

    Raises:
        ValueError: If there are no images, or labels are missing, wrong in number, or outside the classes.
    """

    def __init__(
        self,
        processor: Any,
        dataset: datasets.Dataset | str | Path | Tensor | Sequence[Any],
        labels: Tensor | Sequence[int] | None = None,
        *,
        class_names: Sequence[str] | None = None,
        batch_size: int = 64,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; give an integer of 1 or more.")
        self.batch_size = batch_size
        if isinstance(dataset, (str, Path)):
            dataset = read_folder(dataset, class_names)
        self._images: Any = dataset
        if isinstance(dataset, Tensor):
            if dataset.dim() != 4 or not dataset.is_floating_point():
                raise ValueError(
                    f"The tensor of images has shape {tuple(dataset.shape)} and dtype {dataset.dtype}; give processed "
                    "pixel values, (images, channels, height, width), in floating point."
                )
        else:
            self._image_processor = _image_processor(processor)
        if isinstance(dataset, datasets.Dataset):
            image_column = image_column or _column(dataset, datasets.Image, ("image", "img"))
            self._images = dataset.select_columns([image_column])
            if class_names is not None and labels is None:
                labels = dataset[label_column or _column(dataset, datasets.ClassLabel, ("label", "labels"))]
        self._image_column = image_column
        if len(self._images) == 0:
            raise ValueError("There are no images in the data set; give at least one.")
        self.labels = checked_labels(labels, len(self._images), class_names)

    def __len__(self) -> int:
        return len(self._images)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixel values (b, channels, height, width), float32, and labels (b,) of all images, in order."""
        for start in range(0, len(self), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self._pixel_values(part), self.labels[part]

    def shard(self, index: int, count: int) -> ImageSource:
        """Every `count`-th image from number `index` on; it may be empty."""
        part = copy.copy(self)
        part.labels = self.labels[index::count]
        if isinstance(self._images, datasets.Dataset):
            part._images = self._images.select(range(index, len(self), count))
        else:
            part._images = self._images[index::count]
        return part

    def _pixel_values(self, part: slice) -> Tensor:
        images = self._images[part]
        if isinstance(images, Tensor):
            return images
        if self._image_column is not None:
            images = images[self._image_column]
        images = [image.convert("RGB") if isinstance(image, Image.Image) else image for image in images]
        pixel_values = self._image_processor(images, return_tensors="pt")["pixel_values"]
        return torch.as_tensor(pixel_values)


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


def _image_processor(processor: Any) -> Any:
    image_processor = getattr(processor, "image_processor", processor)
    if not callable(image_processor) or not hasattr(image_processor, "preprocess"):
        raise ValueError(
            f"processor is a {type(processor).__name__}, which cannot process images. Give the model's processor, or "
            "pixel values as a tensor."
        )
    return image_processor


def _column(dataset: datasets.Dataset, feature: type, usual: Sequence[str]) -> str:
    typed = [name for name, kind in dataset.features.items() if isinstance(kind, feature)]
    candidates = typed if len(typed) == 1 else [name for name in usual if name in dataset.column_names]
    if not candidates:
        kind = "image" if feature is datasets.Image else "label"
        raise ValueError(
            f"The data set has the columns {', '.join(dataset.column_names)}; say with {kind}_column which holds the "
            f"{kind}s."
        )
    return candidates[0]


def checked_labels(labels: Any, images: int, class_names: Sequence[str] | None) -> Tensor:
    """Labels as class indices, (images,), or -1 for each image where there are no classes.

    Raises:
        ValueError: If they are missing, wrong in number, or outside the classes.
    """
    if class_names is None:
        return torch.full((images,), -1)
    if labels is None:
        raise ValueError("The images have no labels; give labels, one class index an image.")
    tensor = torch.as_tensor(labels if isinstance(labels, (Tensor, np.ndarray)) else list(labels))
    if tensor.shape != (images,) or tensor.is_floating_point():
        raise ValueError(
            f"labels has shape {tuple(tensor.shape)} and dtype {tensor.dtype} for {images} images; give one class "
            "index an image."
        )
    tensor = tensor.long()
    outside = tensor[(tensor < 0) | (tensor >= len(class_names))]
    if len(outside):
        raise ValueError(
            f"labels holds {int(outside[0])}, but there are {len(class_names)} classes (0 to {len(class_names) - 1}). "
            "Give a name for every class, or drop the images of other classes."
        )
    return tensor

"""Images from wherever users have them, as batches of pixel values and labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor

from setar_peft.data.folders import read_folder
from setar_peft.data.labels import checked_labels


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

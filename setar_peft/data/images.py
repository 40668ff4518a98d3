"""Images from wherever users have them, as batches of pixel values and labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from setar_peft.data.decoding import ahead, decoded, name_of, processor_channels
from setar_peft.data.folders import read_folder
from setar_peft.data.labels import ClassNames, check_has_classes, class_indices
from setar_peft.data.rows import Rows, rows_of

if TYPE_CHECKING:
    import datasets


class ImageSource:
    """A set of images, labelled or not, in a fixed order; decoded when they are used, in threads and a batch ahead.

    Args:
        processor: A processor with an image processor in it, or an image processor; images become grey if it takes one
            channel. Not used for pixel values.
        dataset: A folder (with one subfolder a class where labels are wanted), a `datasets.Dataset`, a streamed one
            (read once, to its end, and kept encoded), a `torch.utils.data.Dataset` of (image, label), a tensor of pixel
            values (images, channels, height, width), or a sequence of paths, PIL images or arrays.
        labels: (images,) class indices or class names, for tensors and sequences. Indices are refused beside a data set
            that names its classes and numbers them otherwise.
        class_names: Names of the classes in the labels' order, or a mapping from what the data call them to their
            names; None for images without labels, such as an OOD set. Names that the data have (class folders, a
            `ClassLabel`, labels that are strings, torchvision's `classes`) are matched with them by name.
        batch_size: Images a batch.
        image_column: Name of the data set's image column; by default the one of image type.
        label_column: Name of the data set's label column; by default the one of class-label type, or "label".

    Attributes:
        labels: (images,) class indices, -1 without classes.
        classes: The classes that the labels mean; None without.
        matched: What the data call each class -> its class name; empty where the data have no names. Nothing is printed
            here: names that differ in case, spaces, underscores and hyphens alone are one name if they are unambiguous.
        batch_size: Images a batch.

    Raises:
        ValueError: If there are no images, or labels are missing, wrong in number, outside the classes, or do not
            match them by name.
    """

    def __init__(
        self,
        processor: Any,
        dataset: datasets.Dataset | datasets.IterableDataset | str | Path | Tensor | Sequence[Any] | Any,
        labels: Tensor | Sequence[int] | Sequence[str] | None = None,
        *,
        class_names: Sequence[str] | Mapping[Any, str] | ClassNames | None = None,
        batch_size: int = 64,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        self.batch_size = checked_batch_size(batch_size)
        self.classes = classes = None if class_names is None else ClassNames.of(class_names)
        check_has_classes(labels, classes)
        where = "The labels"
        self._images: Tensor | None = None
        if isinstance(dataset, Tensor):
            if dataset.dim() != 4 or not dataset.is_floating_point():
                raise ValueError(
                    f"The tensor of images has shape {tuple(dataset.shape)} and dtype {dataset.dtype}; give processed "
                    "pixel values, (images, channels, height, width), in floating point."
                )
            self._images = dataset
            rows = Rows(len(dataset), dataset.__getitem__)
        elif isinstance(dataset, (str, Path)):
            if labels is not None:
                raise ValueError(
                    "labels beside a folder: its subfolders are its classes. Give a list of paths instead."
                )
            files = read_folder(dataset, labelled=classes is not None)
            rows = Rows(len(files.paths), files.paths.__getitem__, files.labels)
            where = f"The folders of {dataset}"
        else:
            labelled = classes is not None and labels is None
            rows = rows_of(dataset, "image", image_column, label_column, labelled=labelled)
        if self._images is None:
            self._image_processor = image_processor_of(processor)
            self._channels = processor_channels(self._image_processor)
            # What a processor is set to convert would become RGB again.
            converts = self._channels == 1 and getattr(self._image_processor, "do_convert_rgb", False)
            self._settings: dict[str, Any] = {"do_convert_rgb": False} if converts else {}
        if not rows.count:
            raise ValueError("There are no images in the data set; give at least one.")
        self._image = rows.input
        self._numbers = range(rows.count)
        own = rows.labels if labels is None else labels
        self.labels, self.matched = class_indices(
            own, rows.label_names, rows.count, classes, where, beside=labels is not None
        )

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixel values (b, channels, height, width), float32, and labels (b,) of all images, in order.

        Raises:
            ValueError: If an image cannot be read, with its path or number.
        """
        parts = [slice(start, start + self.batch_size) for start in range(0, len(self), self.batch_size)]
        if self._images is not None:
            for part in parts:
                yield self._images[part], self.labels[part]
            return
        # Closed here, and not whenever it is collected: its threads end with this loop, however that ends.
        numbers = [self._numbers[part] for part in parts]
        with closing(ahead(numbers, self._fetched, self._processed)) as processed:
            for part, images in zip(parts, processed, strict=True):
                yield self._stacked(images), self.labels[part]

    def shard(self, index: int, count: int) -> ImageSource:
        """Every `count`-th image from number `index` on; it may be empty."""
        part = copy.copy(self)
        part.labels = self.labels[index::count]
        part._numbers = self._numbers[index::count]
        part._images = None if self._images is None else self._images[index::count]
        return part

    def _fetched(self, number: int) -> Any:
        image = None
        try:
            image = self._image(number)
            if isinstance(image, Image.Image):
                # Two threads cannot read one picture that is opened and not yet read, and it may be there twice.
                image.load()
        except Exception as error:
            raise self._unreadable(number, name_of(image), error) from error
        return image

    def _processed(self, number: int, image: Any) -> Tensor:
        try:
            picture = decoded(image, self._channels)
            processed = self._image_processor(picture, return_tensors="pt", **self._settings)
            return torch.as_tensor(processed["pixel_values"])
        except Exception as error:
            raise self._unreadable(number, name_of(image), error) from error

    def _stacked(self, images: Sequence[Tensor]) -> Tensor:
        shapes = {tuple(image.shape[1:]) for image in images}
        if len(shapes) > 1:
            raise ValueError(
                f"The image processor gives images of different shapes, {' and '.join(map(str, sorted(shapes)))}; set "
                "its do_resize or do_center_crop, so that they fit in one batch."
            )
        return torch.cat(list(images))

    def _unreadable(self, number: int, name: str | None, error: Exception) -> ValueError:
        read = self._numbers.index(number)
        which = f"Image {number} (from 0)" if name is None else name
        return ValueError(
            f"{which} cannot be read: {str(error) or type(error).__name__}. {read} of {len(self)} images come before "
            "it. Replace it, or take it away."
        )


def image_processor_of(processor: Any) -> Any:
    """The image processor in a processor, or the one that it is.

    Raises:
        ValueError: If there is none.
    """
    image_processor = getattr(processor, "image_processor", processor)
    if not processes_images(processor):
        raise ValueError(
            f"processor is a {type(processor).__name__}, which cannot process images. Give the model's processor, or "
            "pixel values as a tensor."
        )
    return image_processor


def processes_images(processor: Any) -> bool:
    """Whether it is an image processor, or has one."""
    image_processor = getattr(processor, "image_processor", processor)
    return callable(image_processor) and hasattr(image_processor, "preprocess")


def checked_batch_size(batch_size: int) -> int:
    """A batch size as it is.

    Raises:
        ValueError: If it is no integer of 1 or more.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; give an integer of 1 or more.")
    return batch_size

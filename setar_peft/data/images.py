"""Images from wherever users have them, as batches of pixel values and labels."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from setar_peft.data.contents import digest_of, digest_of_image, digest_of_row
from setar_peft.data.decoding import ahead, decoded, processor_channels
from setar_peft.data.files import name_of
from setar_peft.data.folders import read_folder
from setar_peft.data.inputs import InputBatch, Inputs, checked_batch_size, finite_rows
from setar_peft.data.labels import ClassNames, check_has_classes, class_indices
from setar_peft.data.rows import Rows, rows_of

if TYPE_CHECKING:
    import datasets


class ImageSource(Inputs):
    """A set of images, labelled or not, in a fixed order; decoded when they are used, in threads and a batch ahead.

    Args:
        processor: A processor with an image processor in it, or an image processor; images become grey if it takes one
            channel. Not used for pixel values.
        dataset: A folder (with one subfolder a class where labels are wanted), a `datasets.Dataset`, a streamed one
            (read once, to its end, and kept encoded), a `torch.utils.data.Dataset` of (image, label), a tensor of pixel
            values (images, channels, height, width), or a sequence of paths, URLs (http or https), encoded bytes, PIL
            images or arrays.
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

    kind = "image"

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
        self.numbers = range(rows.count)
        self._names: dict[int, str | None] = {}
        own = rows.labels if labels is None else labels
        self.labels, self.matched = class_indices(
            own, rows.label_names, rows.count, classes, where, beside=labels is not None
        )

    def readable_batches(self) -> Generator[InputBatch, None, None]:
        """Pixel values (b, channels, height, width), or what else the processor gives by name, in order.

        Images are read in threads, a batch ahead. One that cannot be read, that becomes values that are not finite, or
        of another shape than most of its batch, is an error of its batch.
        """
        parts = self._parts()
        if self._images is not None:
            for part in parts:
                tensors, errors = self._of_tensors({"pixel_values": self._images}, part)
                yield self._batch(part, tensors["pixel_values"], errors)
            return
        # Closed here, and not whenever it is collected: its threads end with this loop, however that ends.
        with closing(ahead(parts, self._fetched, self._processed)) as processed:
            for part, images in zip(parts, processed, strict=True):
                yield self._stacked(part, images)

    def shown(self, number: int) -> Image.Image:
        """An image upright in RGB, 8 bits a channel; pixel values are scaled from their own range to 0 ... 255.

        Raises:
            ValueError: If it cannot be read, or has neither 1 nor 3 channels.
        """
        try:
            if self._images is not None:
                return picture_of(self._images[self._row(number)])
            return decoded(self._image(self._row(number)), 3)
        except Exception as error:
            raise ValueError(self._unreadable(number, error)) from error

    def _name(self, row: int) -> str | None:
        if self._images is not None:
            return None
        if row not in self._names:
            try:
                self._names[row] = name_of(self._image(row))
            except Exception:
                return None
        return self._names[row]

    def _content(self, number: int) -> bytes:
        row = self._row(number)
        if self._images is not None:
            return digest_of_row({"pixel_values": self._images}, row)
        try:
            return digest_of_image(self._image(row))
        except Exception as error:
            return digest_of("unreadable", f"{type(error).__name__}: {error}")

    def _preprocessing(self) -> Any:
        if self._images is not None:
            return "pixel values"
        settings = getattr(self._image_processor, "to_dict", lambda: vars(self._image_processor))()
        return [type(self._image_processor).__qualname__, settings, self._channels, self._settings]

    def _fetched(self, number: int) -> Any:
        row = self._row(number)
        self._names.setdefault(row, None)
        try:
            image = self._image(row)
            self._names[row] = name_of(image)
            if isinstance(image, Image.Image):
                # Two threads cannot read one picture that is opened and not yet read, and it may be there twice.
                image.load()
        except Exception as error:
            return _Unread(self._unreadable(number, error))
        return image

    def _processed(self, number: int, image: Any) -> dict[str, Tensor] | _Unread:
        if isinstance(image, _Unread):
            return image
        try:
            picture = decoded(image, self._channels)
            processed = self._image_processor(picture, return_tensors="pt", **self._settings)
            # SigLIP 2's model takes more than pixel values: which patches are padding, and how many there are a side.
            names = getattr(self._image_processor, "model_input_names", ["pixel_values"])
            values = {name: torch.as_tensor(processed[name]) for name in names if name in processed}
            if "pixel_values" not in values or any(len(value) != 1 for value in values.values()):
                shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items()) or "nothing"
                raise ValueError(f"the image processor gives {shapes} for it, which is not one image's pixel_values")
            if not finite_rows(values)[0]:
                raise ValueError("the image processor gives values for it that are not finite")
        except Exception as error:
            return _Unread(self._unreadable(number, error))
        return values

    def _stacked(self, part: range, images: Sequence[dict[str, Tensor] | _Unread]) -> InputBatch:
        errors = {
            number: image.sentence for number, image in zip(part, images, strict=True) if isinstance(image, _Unread)
        }
        read = {number: image for number, image in zip(part, images, strict=True) if not isinstance(image, _Unread)}
        shapes = {number: _shapes(image) for number, image in read.items()}
        # Those that come first have it if there are as many of another.
        usual = max(shapes.values(), key=list(shapes.values()).count, default=None)
        for number in [number for number, shape in shapes.items() if shape != usual]:
            both = " and ".join(
                ", ".join(str(shape) for _, shape in by_name) for by_name in sorted({shapes[number], usual or ()})
            )
            error = ValueError(
                f"the image processor gives images of different shapes, {both}; set its do_resize or do_center_crop, "
                "so that they fit in one batch"
            )
            errors[number] = self._unreadable(number, error)
            del read[number]
        if not read:
            return self._batch(part, None, errors)
        names = next(iter(read.values()))
        inputs = {name: torch.cat([image[name] for image in read.values()]) for name in names}
        return self._batch(part, inputs["pixel_values"] if list(inputs) == ["pixel_values"] else inputs, errors)


class _Unread(NamedTuple):
    sentence: str


def _shapes(image: Mapping[str, Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(value.shape[1:])) for name, value in image.items())


def picture_of(pixel_values: Tensor, image_processor: Any = None) -> Image.Image:
    """Pixel values (1 or 3 channels, height, width) as a picture in RGB.

    Args:
        pixel_values: One image's.
        image_processor: What made them, whose normalisation is taken back; without one that normalises they are scaled
            from their own range to 0 ... 255.

    Raises:
        ValueError: If they have another shape.
    """
    if pixel_values.dim() != 3 or len(pixel_values) not in (1, 3):
        raise ValueError(f"pixel values of shape {tuple(pixel_values.shape)} are no picture")
    values = pixel_values.detach().float().cpu().nan_to_num()
    if getattr(image_processor, "do_normalize", False):
        mean, std = (
            torch.as_tensor(getattr(image_processor, name)).view(-1, 1, 1) for name in ("image_mean", "image_std")
        )
        values = (values * std + mean).clamp(0, 1)
    else:
        low, high = values.aminmax()
        values = (values - low) / (high - low).clamp(min=1e-12)
    pixels = (values * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


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

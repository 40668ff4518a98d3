"""From a file, encoded bytes, an array or a PIL image to 8 bits a channel, upright; in threads, ahead of use."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from setar_peft.data.files import is_encoded, opened

_DEEPEST = 255
_START = 16  # bytes of a file that tell what it may be
_DEEPEST_OF_16_BITS = 65535
_Output = TypeVar("_Output")


def decoded(image: Any, channels: int) -> Image.Image:
    """An image as the model's processor takes it: upright by its EXIF orientation, 8 bits a channel.

    16 bits become 8 by division by 257 (white is 65535, also where fewer bits are used), floats are taken to lie in
    0 ... 1, transparency is dropped, as stock processors drop it.

    Args:
        image: A path, a URL, encoded bytes, a mapping with "bytes" or "path" (an undecoded image of `datasets`), a PIL
            image, or an array: (height, width), (height, width, channels) or (channels, height, width) with 1, 3 or 4
            channels. Of an animated image the first frame counts, of a picture with pages the first.
        channels: 3 for RGB, 1 for grey.

    Raises:
        ValueError: If it is no such image, or its range of values is not known.
        OSError: If it cannot be read.
    """
    if image is None:
        raise ValueError("there is no image")
    if is_encoded(image):
        with opened(image) as file:
            return _of_file(file, channels)
    if not isinstance(image, Image.Image):
        image = _of_array(_as_array(image))
    return _of_picture(image, channels)


def processor_channels(image_processor: Any) -> int:
    """Channels that an image processor takes: as many as it has means.

    Raises:
        ValueError: If it does not say, or has neither 1 nor 3.
    """
    mean = getattr(image_processor, "image_mean", None)
    channels = len(mean) if isinstance(mean, (Sequence, np.ndarray)) else None
    if channels not in (1, 3):
        raise ValueError(
            f"The image processor's image_mean is {mean!r}, so it is not known whether images are to be RGB or grey; "
            "give it three numbers, or one, in image_mean and image_std."
        )
    return channels


def ahead(
    parts: Sequence[Sequence[int]], fetch: Callable[[int], Any], process: Callable[[int, Any], _Output]
) -> Generator[list[_Output], None, None]:
    """What is made of the inputs of each part, in order, one part ahead of its use.

    Inputs are fetched in order, one after the other, in one thread and processed in several. An error is raised in the
    place of its part; what is not begun is then dropped, as it is where the caller stops early.

    Args:
        parts: Numbers of the inputs, part by part.
        fetch: `number -> input`.
        process: `(number, input) -> output`; called in several threads at once.
    """
    workers, feeder = ThreadPoolExecutor(_threads()), ThreadPoolExecutor(1)

    def of(part: Sequence[int]) -> list[_Output]:
        processed = [workers.submit(process, number, fetch(number)) for number in part]
        return [future.result() for future in processed]

    try:
        coming = feeder.submit(of, parts[0]) if parts else None
        for following in [*parts[1:], None]:
            if coming is None:
                return
            outputs = coming.result()
            coming = None if following is None else feeder.submit(of, following)
            yield outputs
    finally:
        workers.shutdown(wait=False, cancel_futures=True)
        feeder.shutdown(cancel_futures=True)


def _threads() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available)


def _of_file(file: IO[bytes], channels: int) -> Image.Image:
    try:
        with Image.open(file) as picture:
            return _of_picture(picture, channels)
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(_START)
        what = f"it begins with {start!r}" if start else "it is empty"
        raise ValueError(f"PIL cannot identify it as an image: {what}") from None


def _of_picture(picture: Image.Image, channels: int) -> Image.Image:
    if not all(picture.size):
        raise ValueError(f"it has no pixels: {picture.width} x {picture.height}")
    # Asked first: the whole of `exif_transpose` costs a copy where there is nothing to turn.
    upright = ImageOps.exif_transpose(picture) if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1 else picture
    mode = upright.mode
    if mode == "F":
        upright = _of_array(np.asarray(upright))
    elif mode.startswith("I"):
        upright = Image.fromarray(_from_16_bits(np.asarray(upright), certain=mode != "I" or _is_16_bit(picture)))
    elif mode in ("P", "PA"):
        # A palette with transparency in it is converted with a warning, unless by way of it.
        upright = upright.convert("RGBA")
    return upright.convert("RGB" if channels == 3 else "L")


def _is_16_bit(picture: Image.Image) -> bool:
    return picture.format in ("PNG", "PPM")


def _from_16_bits(values: NDArray[Any], *, certain: bool) -> NDArray[np.uint8]:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > _DEEPEST_OF_16_BITS or (0 < high <= _DEEPEST and not certain):
        raise ValueError(
            f"it holds integers of 32 bits from {low} to {high}, and their white is not known; save it with 8 or 16 "
            "bits"
        )
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _as_array(image: Any) -> NDArray[Any]:
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image
    try:
        array = np.asarray(image)
    except Exception:
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "biufc":
        raise ValueError(
            f"it is of type {type(image).__name__}, which is no image; give a path, a URL, encoded bytes, a PIL image "
            "or an array"
        )
    return array


def _of_array(array: NDArray[Any]) -> Image.Image:
    places = [axis for axis in (2, 0) if array.ndim == 3 and array.shape[axis] in (1, 3, 4)]
    if not array.size:
        raise ValueError(f"it is an array of shape {array.shape}, which holds no pixels")
    if array.ndim != 2 and len(places) != 1:
        raise ValueError(
            f"it is an array of shape {array.shape}; give (height, width), or with 1, 3 or 4 channels first or last"
        )
    if places:
        array = np.moveaxis(array, places[0], 2)
        array = array[..., 0] if array.shape[2] == 1 else array
    if array.dtype == bool:
        array = array * np.float32(1)
    if array.dtype.kind == "f":
        low, high = (float(array.min()), float(array.max()))
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"it holds floating-point values from {low:g} to {high:g}; bring them into 0 ... 1, or give 8 bits, "
                "or all pixel values that a processor has made in one tensor"
            )
        array = (array.astype(np.float64) * _DEEPEST).round().astype(np.uint8)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = _from_16_bits(array, certain=True)
    elif array.dtype.kind in "iu" and array.dtype != np.uint8:
        if not (array.min() >= 0 and array.max() <= _DEEPEST):
            raise ValueError(f"it is an array of {array.dtype} beyond 0 ... 255; give uint8 or uint16")
        array = array.astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"it is an array of {array.dtype}; give uint8, uint16, or floating point in 0 ... 1")
    return Image.fromarray(array)

"""Digests of contents: of file bytes, pixels, texts and tensors, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from setar_peft.data.files import is_encoded, opened


def digest_of(*parts: str | bytes) -> bytes:
    """SHA-256 of some parts, each as long as it is: ("a", "bc") and ("ab", "c") are different."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.digest()


def digest_of_row(tensors: Mapping[str, Tensor], row: int) -> bytes:
    """SHA-256 of a row of tensors by name: their dtypes, shapes and values."""
    parts: list[str | bytes] = []
    for name in sorted(tensors):
        values = tensors[name][row].detach().cpu().contiguous()
        parts += [f"{name} {values.dtype} {tuple(values.shape)}", values.flatten().view(torch.uint8).numpy().tobytes()]
    return digest_of("row", *parts)


def digest_of_image(image: Any) -> bytes:
    """SHA-256 of an image in any form that `decoded` takes.

    What is encoded (files, URLs, bytes) counts by its bytes; a picture by its mode, pixels, palette and orientation; an
    array by its dtype, shape and values.

    Raises:
        ValueError: If there is no such file, or the URL does not give one.
        OSError: If a file cannot be read.
    """
    if is_encoded(image):
        digest = hashlib.sha256()
        with opened(image) as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        return digest_of("encoded", digest.digest())
    if isinstance(image, Image.Image):
        picture = (image.mode, image.size, image.getpalette(), image.getexif().get(ExifTags.Base.Orientation, 1))
        return digest_of("picture", repr(picture), image.tobytes())
    if isinstance(image, Tensor):
        return digest_of_row({"image": image[None]}, 0)
    array = np.ascontiguousarray(image)
    if array.dtype.hasobject:
        raise ValueError(f"it is a {type(image).__name__}, which is no image")
    return digest_of("array", f"{array.dtype} {array.shape}", array.tobytes())

"""Where labels meet class names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


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

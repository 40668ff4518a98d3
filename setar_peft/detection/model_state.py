"""Whether a model still computes as it did when a detector was made with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from setar_peft.detection.adapters import adapted_modules

# Numbers a row of what is summed: a matrix whose rows and columns are both summed, in order.
_ROW = 4096


class ModelState:
    """What a model computes with, as it is now: the values of its weights and buffers, and its adapters.

    Values are compared where something may have been written or moved. A weight that is written through `.data`, which
    torch does not record, is seen by a `thorough` check alone; a forward that was replaced by hand, or a hook, by none.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._records, self._adapters = records_of(model), adapters_of(model)
        self._values = _values(model)

    def check(self, model: nn.Module, *, thorough: bool = False) -> None:
        """Raise a `ValueError` unless a model computes as the one that this is the state of.

        Args:
            model: The model, on whichever device.
            thorough: Whether to read every weight.
        """
        records = records_of(model)
        same = adapters_of(model) == self._adapters
        if same and (thorough or records != self._records):
            same = _values(model) == self._values
        if not same:
            raise ValueError(
                "The model has been changed since the detector was made (its weights, their dtype, or which adapters "
                "are active or merged, and how strongly), so that neither its class prompts nor its threshold are the "
                "model's. Make a new detector and fit it."
            )
        self._records = records


def records_of(model: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """Of each tensor which it is, where it lies, and how often it was written: equal where nothing happened."""
    return tuple(
        (id(tensor), _address(tensor), -1 if tensor.is_inference() else tensor._version, tensor.dtype)
        for tensor in _tensors(model)
    )


def adapters_of(model: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """Of each layer with adapters which are active and merged, and how strongly they count."""
    return tuple(
        (
            name,
            tuple(layer.active_adapters),
            bool(layer.disable_adapters),
            tuple(getattr(layer, "merged_adapters", ())),
            tuple(sorted((getattr(layer, "scaling", None) or {}).items())),
        )
        for name, layer in adapted_modules(model)
    )


def _values(model: nn.Module) -> tuple[Any, ...]:
    """Of each tensor dtype, shape and sums over its bits that depend on their order; the same on every device."""
    return tuple(_summed(tensor.detach()) for tensor in _tensors(model))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _is_plain(tensor: Tensor) -> bool:
    return not tensor.is_meta and not hasattr(tensor, "__tensor_flatten__")


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if _is_plain(tensor) else 0


def _summed(tensor: Any) -> tuple[Any, ...]:
    kind = tensor.dtype, tuple(tensor.shape)
    if hasattr(tensor, "__tensor_flatten__"):  # quantised: what it is made of
        return *kind, *(_summed(getattr(tensor, name)) for name in sorted(tensor.__tensor_flatten__()[0]))
    if tensor.is_meta:
        return kind
    bits = tensor.contiguous().reshape(-1).view(torch.uint8)
    # As few and wide numbers as there are; int64 wraps around, and so is exact in whatever order it is summed.
    numbers = bits.view(torch.int64) if len(bits) % 8 == 0 and bits.storage_offset() % 8 == 0 else bits.long()
    whole = len(numbers) - len(numbers) % _ROW
    rows = numbers[:whole].view(-1, _ROW)
    sums = [_weighted(rows.sum(0)), _weighted(rows.sum(1)), _weighted(numbers[whole:])]
    return *kind, *torch.stack(sums).tolist()


def _weighted(numbers: Tensor) -> Tensor:
    return (numbers * (2 * torch.arange(len(numbers), device=numbers.device) + 1)).sum()

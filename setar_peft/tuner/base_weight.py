"""The base layer's weight: by which values it is known, and how it was before merging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

# A prime, so that entries which are moved, in rows or in columns, fall into another sum.
_SUMS = 4093


def fingerprint(tensor: Tensor) -> Tensor:
    """Sums over a tensor's bits, as integers: they change with its values, and do not depend on the number of threads.

    One pass over the memory: little beside a product with a few hundred tokens. Small tensors are their
    own fingerprint. It stays on the tensor's device.

    Args:
        tensor: Of any dtype and shape.

    Returns:
        Integers, (k,), of which k depends on the number of bytes alone.
    """
    bits = _bits(tensor)
    rows = bits.numel() // _SUMS
    return torch.cat([bits[: rows * _SUMS].view(rows, _SUMS).sum(0), bits[rows * _SUMS :]])


def sample_fingerprint(tensor: Tensor) -> Tensor:
    """The same of every eleventh cache line, in less time: whatever changes whole rows or columns shows."""
    bits = _bits(tensor)
    rows = bits.numel() // 88
    if rows < _SUMS:
        return fingerprint(tensor)
    return torch.cat([bits[: rows * 88].view(rows, 88)[:, :8].sum(0), bits[rows * 88 :]])


def _bits(tensor: Tensor) -> Tensor:
    bits = tensor.detach().contiguous().view(-1)
    size = bits.numel() * bits.element_size()
    words = next(dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.int8) if size % dtype.itemsize == 0)
    return bits.view(words)


class SavedBaseWeight:
    """What merging replaced in a layer's base layer, and by what.

    Of a float weight the `nn.Parameter` itself is kept: merging puts another one in its place, so that whatever else
    holds the old one (a tied layer) does not notice. Of a quantised one the layer is remembered with all its
    attributes, because quantisation backends keep scales beside the weight, change the old weight's attributes on
    merging (bitsandbytes), or put another module in its place (HQQ).

    Args:
        layer: The adapter layer, before merging.
    """

    def __init__(self, layer: BaseTunerLayer) -> None:
        base = layer.get_base_layer()
        self._written: Tensor | None = None
        self._parameter: nn.Parameter | None = None
        if layer.quantization_backend is None:
            self._parameter = base.weight
            return
        self._base: Any = base
        self._attributes = {name: _shallow_copy(value) for name, value in vars(base).items()}
        weight = getattr(base, "weight", None)
        self._weight_attributes = dict(vars(weight)) if hasattr(weight, "__dict__") else {}

    def write(self, layer: BaseTunerLayer, weight: Tensor) -> None:
        """Put a merged weight into the layer, of the base weight's shape and orientation, and remember it."""
        if self._parameter is not None:
            layer.get_base_layer().weight = nn.Parameter(weight, requires_grad=self._parameter.requires_grad)
        else:
            layer.set_base_weight(weight)
        self.remember(layer)

    def remember(self, layer: BaseTunerLayer) -> None:
        """Take the layer's weight as it is now for what merging wrote."""
        self._written = _known_by(layer)

    def is_written(self, layer: BaseTunerLayer) -> bool:
        """Whether the layer's weight is, to the bit, what merging wrote."""
        now = _known_by(layer)
        then = self._written
        return then is not None and now.shape == then.shape and torch.equal(now, then.to(now.device))

    def restore(self, layer: BaseTunerLayer) -> None:
        """Put back what merging replaced."""
        if self._parameter is not None:
            layer.get_base_layer().weight = self._parameter
            return
        layer.base_layer = self._base
        vars(self._base).clear()
        vars(self._base).update({name: _shallow_copy(value) for name, value in self._attributes.items()})
        weight = getattr(self._base, "weight", None)
        if hasattr(weight, "__dict__"):
            vars(weight).clear()
            vars(weight).update(self._weight_attributes)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Do to the kept weight what `nn.Module.to` and the like do to the layer's parameters."""
        if self._parameter is not None:
            self._parameter.data = function(self._parameter.data)


def check_mergeable(layer: BaseTunerLayer) -> None:
    """Raise a `ValueError` that says why nothing can be merged into the base layer, where that is so."""
    backend, base = layer.quantization_backend, layer.get_base_layer()
    if backend is not None and not backend.supports_merge:
        raise ValueError(
            f"Weights quantised with {backend.backend_name} cannot be merged into. Keep the adapter unmerged, or "
            "merge into the model in floating point."
        )
    if hasattr(layer.weight, "full_tensor"):
        raise ValueError("A sharded weight cannot be merged into. Merge before the model is sharded.")
    if backend is None and not isinstance(base._parameters.get("weight"), nn.Parameter):
        raise ValueError(
            f"The weight of a {type(base).__name__} is computed from other tensors (a parametrisation, pruning), "
            "so what is merged into it would be lost. Make it a parameter first, for example by "
            "torch.nn.utils.parametrize.remove_parametrizations."
        )
    if layer.weight.is_meta:
        raise ValueError(
            "The weight is on the meta device, so nothing can be merged into it or taken out of it. Where it is "
            "offloaded, call merge_adapter() and unmerge_adapter() of the model, which fetch it."
        )


def original_matrix(layer: Any) -> Tensor:
    """The base weight as a matrix (m, n), without what is merged into it."""
    if layer._saved_base is None:
        return layer.base_matrix()
    merged = SavedBaseWeight(layer)
    layer._saved_base.restore(layer)
    try:
        return layer.base_matrix()
    finally:
        merged.restore(layer)


def _known_by(layer: BaseTunerLayer) -> Tensor:
    return fingerprint(layer.get_base_weight())


def _shallow_copy(value: Any) -> Any:
    # The dictionaries of parameters and buffers, and the state object of bitsandbytes: their content is replaced on
    # merging, so the containers must be ours.
    if isinstance(value, dict):
        return value.copy()
    if type(value).__name__ == "MatmulLtState":
        state = object.__new__(type(value))
        vars(state).update(vars(value))
        return state
    return value

"""The base layer as it was before merging: what unmerging puts back, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor


class SavedBaseWeight:
    """Keeps the weight of a layer's base layer while adapters are merged into it.

    A float weight is kept as its tensor. Of a quantised one the layer is remembered with all its attributes, because
    quantisation backends keep scales beside the weight, change the old weight's attributes on merging
    (bitsandbytes), or put another module in its place (HQQ).

    Args:
        layer: The adapter layer, before merging.
    """

    def __init__(self, layer: BaseTunerLayer) -> None:
        base = layer.get_base_layer()
        self._tensor: Tensor | None = None
        if layer.quantization_backend is None:
            self._tensor = base.weight.data
            return
        self._base: Any = base
        self._attributes = {name: _shallow_copy(value) for name, value in vars(base).items()}
        weight = getattr(base, "weight", None)
        self._weight_attributes = dict(vars(weight)) if hasattr(weight, "__dict__") else {}

    def restore(self, layer: BaseTunerLayer) -> None:
        """Put the weight back into the layer."""
        if self._tensor is not None:
            layer.get_base_layer().weight.data = self._tensor
            return
        layer.base_layer = self._base
        vars(self._base).clear()
        vars(self._base).update({name: _shallow_copy(value) for name, value in self._attributes.items()})
        weight = getattr(self._base, "weight", None)
        if hasattr(weight, "__dict__"):
            vars(weight).clear()
            vars(weight).update(self._weight_attributes)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Do to the kept tensor what `nn.Module.to` and the like do to the layer's parameters."""
        if self._tensor is not None:
            self._tensor = function(self._tensor)


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

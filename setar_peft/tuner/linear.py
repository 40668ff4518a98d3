"""A linear layer with SeTAR adapters: y = W x - B0 (A0 x), and + B (A x) when fine-tuned (paper, Eq. 6 to 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import quantization_extra_repr
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from setar_peft.tuner.forward import Factors, adapter_output, effective_weight, formed_weight_is_cheaper
from setar_peft.tuner.layer import SeTARLayer


class SeTARLinear(nn.Module, SeTARLayer):
    """`nn.Linear` or transformers' `Conv1D`, quantised or not, with SeTAR adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        SeTARLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Apply the layer.

        Args:
            x: Input, (..., n).
            adapter_names: The adapter of each item of the batch, "__base__" for none; by default the active ones for
                all.
            *args: Passed to the base layer.
            **kwargs: Passed to the base layer.

        Returns:
            (..., m), in the base layer's output dtype.

        Raises:
            ValueError: If there are not as many `adapter_names` as items, or adapters are merged.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.setar_ratio]
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        adapters = [self.factors(name) for name in names]
        if self._can_form_weight() and formed_weight_is_cheaper(x.numel() // max(1, x.shape[-1]), self.shape):
            return self._forward_formed(x, adapters)
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return self._add(result, x, adapters)

    def _can_form_weight(self) -> bool:
        base = self.base_layer
        plain = type(base).forward in (nn.Linear.forward, Conv1D.forward)
        return plain and self.quantization_backend is None and not base._forward_hooks and not base._forward_pre_hooks

    def _forward_formed(self, x: Tensor, adapters: Sequence[Factors]) -> Tensor:
        base = self.base_layer
        # Under autocast the product of the factors would be rounded before it is subtracted.
        with torch.autocast(x.device.type, enabled=False):
            weight = effective_weight(self._oriented(base.weight), adapters).to(base.weight.dtype)
        return F.linear(x, weight, base.bias)

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs).clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.setar_ratio:
                rows = [row for row, other in enumerate(adapter_names) if other == name]
                result[rows] = self._add(result[rows], x[rows], [self.factors(name)])
        return result

    def _add(self, result: Tensor, x: Tensor, adapters: Sequence[Factors]) -> Tensor:
        dtype = result.dtype
        for factors in adapters:
            if not factors.is_nothing:
                result = result + adapter_output(self._cast_input_dtype(x, factors.b0.dtype), factors)
        return result.to(dtype)

    # These two are here, and not in `SeTARLayer`, because there those of `nn.Module` would come first.

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if not local_metadata.get("assign_to_params_buffers", False):
            self.make_room(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeTARLinear:
        if self._saved_base is not None:
            self._saved_base.apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __repr__(self) -> str:
        return "setar." + super().__repr__()

    def extra_repr(self) -> str:
        """The quantisation backend, if there is one."""
        return quantization_extra_repr(self)

"""A linear layer with SeTAR adapters: y = W x - B0 (A0 x), and + B (A x) when fine-tuned (paper, Eq. 6 to 8)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import quantization_extra_repr
from peft.utils.warning import PeftWarning
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from setar_peft.tuner.forward import Factors, adapter_output, removes_nothing, trained_output
from setar_peft.tuner.kept_weight import check_is_cheaper, may_be_gone_round
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
            return self._base(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        # `keys()`, and no property of the factors: torch.compile follows neither before torch 2.10.
        names = [name for name in self.active_adapters if name in self.setar_ratio.keys()]  # noqa: SIM118
        if self.merged or not names:
            return self._base(x, *args, **kwargs)
        adapters = [factors for factors in map(self.factors, names) if not removes_nothing(factors)]
        weight = None if args or kwargs or not adapters else self._kept_weight_of(adapters, x)
        if weight is not None:
            result = F.linear(x, weight, self._base.bias)
            trained = [factors for factors in adapters if factors.b is not None]
            return self._add(result, x, trained, trained_output)
        result = self._base(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return self._add(result, x, adapters, adapter_output)

    def _kept_weight_of(self, adapters: Sequence[Factors], x: Tensor) -> Tensor | None:
        base = self._base
        if self.quantization_backend is not None or not may_be_gone_round(base) or not self.keeps_weight:
            return None
        if any(factors.b0.is_inference() or factors.a0.is_inference() for factors in adapters):
            return None  # nobody counts how often they are written
        tokens, rank = x.numel() // max(1, x.shape[-1]), sum(factors.b0.shape[1] for factors in adapters)
        if base.weight.device.type == "cpu" and not check_is_cheaper(tokens, rank, self.shape):
            return None
        try:
            return self._kept_weight.of(base.weight, adapters, transposed=isinstance(base, Conv1D))
        except torch.OutOfMemoryError:
            self.keeps_weight = False
            warnings.warn(
                f"There is no memory to keep W - B0 A0 of a layer {self.shape}; the layer multiplies by W, B0 and A0 "
                "instead, which is slower. Set keeps_weight = True on the layer to have it tried again.",
                PeftWarning,
                stacklevel=2,
            )
            return None

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
        result = self._base(x, *args, **kwargs).clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.setar_ratio:
                rows = [row for row, other in enumerate(adapter_names) if other == name]
                result[rows] = self._add(result[rows], x[rows], [self.factors(name)], adapter_output)
        return result

    def _add(
        self, result: Tensor, x: Tensor, adapters: Sequence[Factors], output: Callable[[Tensor, Factors], Tensor]
    ) -> Tensor:
        dtype = result.dtype
        for factors in adapters:
            if not removes_nothing(factors):
                result = result + output(self._cast_input_dtype(x, factors.b0.dtype), factors)
        return result.to(dtype)

    # These are here, and not in `SeTARLayer`, because there those of `nn.Module` would come first.

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if not local_metadata.get("assign_to_params_buffers", False):
            self.make_room(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeTARLinear:
        self._kept_weight.drop()
        saved = self._saved_base
        is_written = saved is not None and saved.is_written(self)
        if saved is not None:
            saved.apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if saved is not None and is_written:
            saved.remember(self)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept_weight.drop()  # saving may need the memory
        super()._save_to_state_dict(*args, **kwargs)

    def __repr__(self) -> str:
        return "setar." + super().__repr__()

    def extra_repr(self) -> str:
        """The quantisation backend, if there is one."""
        return quantization_extra_repr(self)

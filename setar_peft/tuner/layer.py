"""A linear layer with SeTAR adapters: y = W x - B0 (A0 x), and + B (A x) when fine-tuned (paper, Eq. 6 to 8)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from setar_peft.decomposition import Residual, decompose, residual_rank


class SplitSettings(NamedTuple):
    """What one layer's residual is computed from, apart from its weight."""

    rank_ratio: float
    prune: str
    seed: int
    name: str


def formed_weight_is_cheaper(tokens: int, shape: tuple[int, int]) -> bool:
    """Whether forming W - B0 A0 once costs less than multiplying every token by both factors.

    With N tokens the factors cost 2 N r (m + n) operations and the formed weight 2 m n r, whatever the rank r, so
    the rule is N > m n / (m + n): 614 tokens for 3072 x 768.

    Args:
        tokens: Number N of input vectors.
        shape: (m, n) of the weight.
    """
    m, n = shape
    return tokens * (m + n) > m * n


class SeTARLayer(BaseTunerLayer):
    """The adapters of one linear layer.

    The frozen factors and the rank ratio are buffers, so that a training-free adapter has no parameter; they are
    named in `other_param_names` because PEFT makes whatever stands in `adapter_layer_names` trainable.
    """

    adapter_layer_names: tuple[str, ...] = ("setar_A", "setar_B")
    other_param_names: tuple[str, ...] = ("setar_A0", "setar_B0", "setar_ratio")

    base_layer: Any  # torch types what is stored in a module as "Tensor | Module"

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.setar_A = nn.ParameterDict()
        self.setar_B = nn.ParameterDict()
        self.setar_A0 = BufferDict(persistent=True)
        self.setar_B0 = BufferDict(persistent=True)
        self.setar_ratio = BufferDict(persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        # The weight as it was before merging: what unmerging puts back, to the bit.
        self._original_weight: Tensor | None = None
        # Adapters whose factors are expected from a file; they are computed if the layer is used before.
        self._awaiting: dict[str, SplitSettings] = {}
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(
                f"A SeTAR adapter cannot be put on a {type(self.get_base_layer()).__name__}; "
                "target torch.nn.Linear or transformers' Conv1D layers."
            )
        self.in_features, self.out_features = in_features, out_features

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight matrix W: outputs, inputs."""
        return self.out_features, self.in_features

    def update_layer(
        self,
        adapter_name: str,
        settings: SplitSettings,
        residual: Residual | None,
        *,
        finetune: bool,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: Name of the adapter.
            settings: Rank ratio and strategy of the residual.
            residual: The removed components B0 (m, r), A0 (r, n). `None` leaves room for factors that are about
                to be loaded.
            finetune: Add trainable factors B, A.
            init_weights: Start B, A at B0, A0 (the adapter is then the identity) rather than at random.
            inference_mode: Freeze B, A.
        """
        rank = residual_rank(self.shape, settings.rank_ratio)
        device, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = torch.float64 if base_dtype == torch.float64 else torch.float32
        if device is None or device.type == "meta":
            device = torch.device("cpu")
        if residual is None:
            self._awaiting[adapter_name] = settings
            m, n = self.shape
            residual = Residual(
                torch.full((m, rank), torch.nan, dtype=dtype, device=device),
                torch.full((rank, n), torch.nan, dtype=dtype, device=device),
            )
        self.setar_ratio[adapter_name] = torch.tensor(settings.rank_ratio, dtype=torch.float64, device=device)
        self._set_factors(adapter_name, residual, finetune=finetune, init_weights=init_weights)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def split_base_weight(self, settings: SplitSettings) -> Residual:
        """Compute the residual of the base weight: one singular value decomposition.

        Raises:
            ValueError: If the weight cannot be read or split; the message names the layer.
        """
        if settings.rank_ratio == 0:
            m, n = self.shape
            weight = self.weight
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            device = "cpu" if weight.is_meta else weight.device
            return Residual(
                torch.zeros(m, 0, dtype=dtype, device=device), torch.zeros(0, n, dtype=dtype, device=device)
            )
        base_layer = self.get_base_layer()
        with gather_params_ctx(base_layer.parameters()):
            weight = self.base_matrix()
            if weight.is_meta:
                raise ValueError(
                    f"{settings.name} is on the meta device, so its weight cannot be decomposed. Load the base model's "
                    "weights before creating an adapter, or load a saved adapter."
                )
            decomposition = decompose(weight, settings.prune, seed=settings.seed, name=settings.name)  # type: ignore[arg-type]
        return decomposition.residual(settings.rank_ratio)

    def base_matrix(self) -> Tensor:
        """The base weight as the matrix W, (m, n): dequantised, and transposed where the layer stores it so."""
        return self._oriented(self.get_base_weight())

    def residual(self, adapter_name: str) -> Residual:
        """The removed components of an adapter, B0 (m, r) and A0 (r, n)."""
        self._ensure_factors(adapter_name)
        return Residual(self.setar_B0[adapter_name], self.setar_A0[adapter_name])

    def is_finetuned(self, adapter_name: str) -> bool:
        """Whether the adapter has trainable factors B, A."""
        return adapter_name in self.setar_B

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the base weight: -B0 A0 (+ B A), in the base weight's shape and the factors' dtype."""
        weight = self.weight
        zeros = torch.zeros(self.shape, dtype=self.residual(adapter).b0.dtype, device=weight.device)
        return self._oriented(self._effective_weight(zeros, [adapter]))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the kept weight into the base layer, computed in float32 and rounded once.

        Args:
            safe_merge: Refuse a merged weight with NaN or infinity.
            adapter_names: Adapters to merge; the active ones by default.

        Raises:
            ValueError: If the weight is not finite (`safe_merge`), or its backend cannot be merged into. The layer
                is then unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.setar_ratio]
        if not names:
            return
        merged = self.merged_weight([*self.merged_adapters, *names], check_finite=safe_merge)
        if self._original_weight is None:
            self._original_weight = self._stored_weight()
        self.set_base_weight(merged)
        self.merged_adapters.extend(names)

    def merged_weight(self, adapter_names: Sequence[str], *, check_finite: bool = False) -> Tensor:
        """The weight that merging these adapters stores, in the base weight's dtype and orientation.

        Raises:
            ValueError: If it is not finite and `check_finite` is set, or if the base cannot be merged into.
        """
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"Weights quantised with {backend.backend_name} cannot be merged into. Keep the adapter unmerged, or "
                "merge into the model in floating point."
            )
        base = self.base_matrix() if self._original_weight is None else self._original_matrix()
        with torch.no_grad():
            merged = self._effective_weight(base, adapter_names).to(base.dtype)
        if check_finite and not torch.isfinite(merged).all():
            raise ValueError(
                f"Merging {', '.join(adapter_names)} would store NaN or infinity in a weight; the adapter is broken. "
                "Nothing was merged: load the adapter again."
            )
        return self._oriented(merged).contiguous()

    def unmerge(self) -> None:
        """Put the base weight back as it was before merging, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._original_weight is not None:
            self._restore_weight(self._original_weight)
        self._original_weight = None
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; a merged layer is unmerged first, for the deleted adapter must not live on in it."""
        if adapter_name in self.merged_adapters:
            warnings.warn(f"Adapter {adapter_name} is merged. Unmerging the layer before deleting it.", stacklevel=2)
            self.unmerge()
        self._awaiting.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def scale_layer(self, scale: float) -> None:
        """Refuse to scale: half of a truncation is not a SeTAR adapter."""
        if scale != 1:
            warnings.warn("A SeTAR adapter cannot be scaled; it stays at scale 1.", stacklevel=2)

    def unscale_layer(self, scale: float | None = None) -> None:
        """There is no scale to undo."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A SeTAR adapter is additive, and so is a LoRA of rank r (2 r when fine-tuned)."""
        return True

    def _get_available_adapters(self) -> set[str]:
        # PEFT counts the containers of trainable tensors only; a training-free adapter would be inactive unnoticed.
        return set(self.setar_ratio.keys())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to the base's dtype, and a factor rounded to bfloat16 on loading is another adapter.
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is None or device.type == "meta":
            return
        for container_name in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, container_name)
            if adapter_name in container and not container[adapter_name].is_meta:
                container[adapter_name] = container[adapter_name].to(device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in list(self._awaiting):
            if f"{prefix}setar_B0.{name}" in state_dict:
                del self._awaiting[name]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _ensure_factors(self, adapter_name: str) -> None:
        settings = self._awaiting.pop(adapter_name, None)
        if settings is None or torch.isfinite(self.setar_B0[adapter_name]).all():
            return
        finetune = self.is_finetuned(adapter_name)
        self._set_factors(adapter_name, self.split_base_weight(settings), finetune=finetune, init_weights=True)

    def _set_factors(self, adapter_name: str, residual: Residual, *, finetune: bool, init_weights: bool) -> None:
        self.setar_B0[adapter_name], self.setar_A0[adapter_name] = residual.b0, residual.a0
        if not finetune:
            return
        b, a = residual.b0.clone(), residual.a0.clone()
        if not init_weights and residual.rank:
            nn.init.kaiming_uniform_(b, a=5**0.5)
            nn.init.kaiming_uniform_(a, a=5**0.5)
        self.setar_B[adapter_name] = nn.Parameter(b)
        self.setar_A[adapter_name] = nn.Parameter(a)

    def _effective_weight(self, base: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """W - B0 A0 (+ B A) for all the adapters, (m, n), in the factors' dtype; differentiable in B and A."""
        weight = base
        for name in adapter_names:
            b0, a0 = self.residual(name)
            weight = weight.to(b0.dtype)
            if b0.shape[1] == 0:
                continue
            weight = torch.addmm(weight, b0, a0, alpha=-1)
            if self.is_finetuned(name):
                weight = torch.addmm(weight, self.setar_B[name], self.setar_A[name])
        return weight

    def _oriented(self, matrix: Tensor) -> Tensor:
        return matrix.T if isinstance(self.get_base_layer(), Conv1D) else matrix

    def _stored_weight(self) -> Any:
        return (
            self.get_base_layer().weight if self.quantization_backend is not None else self.get_base_layer().weight.data
        )

    def _restore_weight(self, stored: Any) -> None:
        if self.quantization_backend is not None:
            self.get_base_layer().weight = stored
        else:
            self.get_base_layer().weight.data = stored

    def _original_matrix(self) -> Tensor:
        current = self._stored_weight()
        self._restore_weight(self._original_weight)
        try:
            return self.base_matrix()
        finally:
            self._restore_weight(current)


class SeTARLinear(nn.Module, SeTARLayer):
    """`nn.Linear` or transformers' `Conv1D`, quantised or not, with SeTAR adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        SeTARLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to x, (..., n); returns (..., m) in the base layer's output dtype."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.setar_ratio]
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if self._can_form_weight() and formed_weight_is_cheaper(x.numel() // max(1, x.shape[-1]), self.shape):
            return self._forward_formed(x, names)
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return self._add_factored(result, x, names)

    def _can_form_weight(self) -> bool:
        base = self.base_layer
        plain = type(base).forward in (nn.Linear.forward, Conv1D.forward)
        return plain and self.quantization_backend is None and not base._forward_hooks and not base._forward_pre_hooks

    def _forward_formed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        # Under autocast the product of the factors would be rounded before it is subtracted.
        with torch.autocast(x.device.type, enabled=False):
            weight = self._effective_weight(self._oriented(self.base_layer.weight), names).to(
                self.base_layer.weight.dtype
            )
        return F.linear(x, weight, self.base_layer.bias)

    def _add_factored(self, result: Tensor, x: Tensor, names: Sequence[str]) -> Tensor:
        dtype = result.dtype
        for name in names:
            b0, a0 = self.residual(name)
            if b0.shape[1] == 0:
                continue
            if self.is_finetuned(name):
                b0 = torch.cat([self.setar_B[name], -b0], dim=1)
                a0 = torch.cat([self.setar_A[name], a0], dim=0)
                result = result + F.linear(F.linear(self._cast_input_dtype(x, a0.dtype), a0), b0)
            else:
                result = result - F.linear(F.linear(self._cast_input_dtype(x, a0.dtype), a0), b0)
        return result.to(dtype)

    def __repr__(self) -> str:
        return "setar." + super().__repr__()

    def extra_repr(self) -> str:
        """The quantisation backend, if there is one."""
        return quantization_extra_repr(self)

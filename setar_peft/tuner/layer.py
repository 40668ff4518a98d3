"""The adapters of one layer: their factors, how they come into being, and merging them into the base weight."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from peft.utils.integrations import gather_params_ctx
from peft.utils.warning import PeftWarning
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from setar_peft.decomposition import KnownSplit, Residual, SplitSettings, decompose, residual_rank, tensor_digest
from setar_peft.tuner.base_weight import SavedBaseWeight, check_mergeable, original_matrix
from setar_peft.tuner.forward import Factors, effective_weight
from setar_peft.tuner.kept_weight import KeptWeight


class SeTARLayer(BaseTunerLayer):
    """The adapters of one linear layer.

    The frozen factors and the rank ratio are buffers, so that a training-free adapter has no parameter; they are
    named in `other_param_names` because PEFT makes whatever stands in `adapter_layer_names` trainable.

    Several active adapters add up: W - B0 A0 - B0' A0' (+ B A + B' A'). With fine-tuned ones that is the sum of what
    each has learned. Two training-free ones take the components that both remove away twice, which is no
    truncation any more (W - 2 B0 A0 has them with the sign turned); a warning says so.

    Attributes:
        setar_B0: Adapter name -> removed components B0, (m, r).
        setar_A0: Adapter name -> removed components A0, (r, n).
        setar_ratio: Adapter name -> rank ratio, ().
        setar_B: Adapter name -> trained factor B, (m, r); only of fine-tuned adapters.
        setar_A: Adapter name -> trained factor A, (r, n); only of fine-tuned adapters.
        keeps_weight: Whether W - B0 A0 is formed once and kept, which makes a training-free layer as fast as its base
            and costs the memory of one more weight a layer. Set it to False on the class, or on a layer, to save that
            memory: every token is then multiplied by W, A0 and B0.
    """

    keeps_weight: bool = True

    adapter_layer_names: tuple[str, ...] = ("setar_A", "setar_B")
    other_param_names: tuple[str, ...] = ("setar_A0", "setar_B0", "setar_ratio")

    # torch types what it does not know of a module as "Tensor | Module".
    _modules: Any
    active_adapters: Any
    _cast_input_dtype: Any

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self._kept_weight = KeptWeight()
        self._modules["base_layer"] = base_layer
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
        self._saved_base: SavedBaseWeight | None = None
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(
                f"A SeTAR adapter cannot be put on a {type(self.get_base_layer()).__name__}; "
                "target torch.nn.Linear or transformers' Conv1D layers."
            )
        self.in_features, self.out_features = in_features, out_features

    @property
    def base_layer(self) -> Any:
        """The layer that the adapters are on. Whoever asks for it may be about to write to it."""
        if not torch.compiler.is_compiling():
            self._kept_weight.doubt()
        return self._base

    @property
    def _base(self) -> Any:
        return self._modules["base_layer"]

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
            residual: The removed components B0 (m, r), A0 (r, n). `None` where a file will bring them: tensors on the
                meta device, which take no memory, stand for all factors until then.
            finetune: Add trainable factors B, A, unless the ratio is so small that there is nothing to train.
            init_weights: Start B, A at B0, A0 (the adapter is then the identity) rather than at random.
            inference_mode: Freeze B, A.
        """
        device, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = torch.float64 if base_dtype == torch.float64 else torch.float32
        if device is None or device.type == "meta":
            device = torch.device("cpu")
        if residual is None:
            (m, n), rank, device = self.shape, residual_rank(self.shape, settings.rank_ratio), torch.device("meta")
            residual = Residual(
                torch.empty(m, rank, dtype=dtype, device=device), torch.empty(rank, n, dtype=dtype, device=device)
            )
        # float32, for some devices have no float64; the exact ratio stands in the config.
        self.setar_ratio[adapter_name] = torch.tensor(settings.rank_ratio, dtype=torch.float32, device=device)
        self.setar_B0[adapter_name], self.setar_A0[adapter_name] = residual.b0, residual.a0
        if finetune and residual.rank:  # FSDP cannot shard empty parameters
            b, a = residual.b0.clone(), residual.a0.clone()
            if not init_weights:
                nn.init.kaiming_uniform_(b, a=5**0.5)
                nn.init.kaiming_uniform_(a, a=5**0.5)
            self.setar_B[adapter_name] = nn.Parameter(b)
            self.setar_A[adapter_name] = nn.Parameter(a)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def split_base_weight(self, settings: SplitSettings, known: KnownSplit | None = None) -> Residual:
        """Compute the residual of the base weight: one singular value decomposition, unless it is known.

        Args:
            settings: Rank ratio and strategy of the residual.
            known: A residual from before; it serves if it is of the same weight and settings.

        Raises:
            ValueError: If the weight cannot be read or split; the message names the layer.
        """
        if settings.rank_ratio == 0:
            (m, n), weight = self.shape, self.weight
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            device = "cpu" if weight.is_meta else weight.device
            return Residual(
                torch.zeros(m, 0, dtype=dtype, device=device), torch.zeros(0, n, dtype=dtype, device=device)
            )
        with gather_params_ctx(self.get_base_layer().parameters()):
            try:
                weight = self.base_matrix()
            except (ValueError, TypeError, NotImplementedError) as error:
                raise ValueError(f"The weight of {settings.name} cannot be decomposed: {error}") from error
            if weight.is_meta:
                raise ValueError(
                    f"{settings.name} is on the meta device, so its weight cannot be decomposed. Load the base model's "
                    "weights before creating an adapter, or load a saved adapter."
                )
            if known is not None and known.settings == settings and known.digest == tensor_digest(weight):
                return Residual(known.residual.b0.to(weight.device), known.residual.a0.to(weight.device))
            decomposition = decompose(weight, settings.prune, seed=settings.seed, name=settings.name)  # type: ignore[arg-type]
        return decomposition.residual(settings.rank_ratio)

    def base_matrix(self) -> Tensor:
        """The base weight as the matrix W, (m, n): dequantised, gathered, and transposed where it is stored so.

        Raises:
            ValueError: If it is not whole: a shard of it is all that this process holds.
        """
        weight = self.get_base_weight()
        if hasattr(weight, "full_tensor"):  # a DTensor (FSDP2, tensor parallelism)
            weight = weight.full_tensor()
        if weight.dim() == 2 and self._oriented(weight).shape == self.shape:
            return self._oriented(weight)
        raise ValueError(
            f"it has shape {tuple(weight.shape)} where {self.shape} is expected, which is a shard of the weight. "
            "Make the adapter, or merge it, before the model is sharded, or gather the weight first."
        )

    def readable_base_matrix(self) -> Tensor | None:
        """`base_matrix`, or `None` where it is not in memory or its quantisation cannot be undone."""
        backend = self.quantization_backend
        if self.weight.is_meta or (backend is not None and not backend.supports_merge):
            return None
        return self.base_matrix()

    def awaits_factors(self, adapter_name: str) -> bool:
        """Whether an adapter's factors are still to come from a file."""
        return bool(self.setar_B0[adapter_name].is_meta) and not self.weight.is_meta

    def residual(self, adapter_name: str) -> Residual:
        """The removed components of an adapter, B0 (m, r) and A0 (r, n).

        Raises:
            ValueError: If they were to come from a file, and none was loaded.
        """
        if self.awaits_factors(adapter_name):
            raise ValueError(
                f"The adapter {adapter_name!r} was made empty (low_cpu_mem_usage=True) for factors that a file brings, "
                "and none was loaded. Load its file, or make it without low_cpu_mem_usage."
            )
        return Residual(self.setar_B0[adapter_name], self.setar_A0[adapter_name])

    def factors(self, adapter_name: str) -> Factors:
        """All the factors of an adapter."""
        residual = self.residual(adapter_name)
        if not self.is_finetuned(adapter_name):
            return Factors(*residual)
        return Factors(*residual, self.setar_B[adapter_name], self.setar_A[adapter_name])

    def is_finetuned(self, adapter_name: str) -> bool:
        """Whether the adapter has trainable factors B, A."""
        return adapter_name in self.setar_B.keys()  # noqa: SIM118 - torch.compile cannot follow `in` on a module

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the base weight: -B0 A0 (+ B A), in the base weight's shape and the factors' dtype."""
        factors = self.factors(adapter)
        zeros = torch.zeros(self.shape, dtype=factors.b0.dtype, device=factors.b0.device)
        return self._oriented(effective_weight(zeros, [factors]))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the kept weight into the base layer, computed in float32 and rounded once.

        Args:
            safe_merge: Refuse a merged weight with NaN or infinity.
            adapter_names: Adapters to merge; the active ones by default.

        Raises:
            ValueError: If the weight is not finite (`safe_merge`), or the base cannot be merged into (its quantisation
                backend, a shard, a weight that is computed or offloaded). The layer is then unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.setar_ratio]
        if not names:
            return
        check_mergeable(self)
        saved = self._saved_base
        # Inference mode would leave tensors behind that no backward can use.
        with torch.inference_mode(False), torch.no_grad():
            if all(self.residual(name).rank == 0 for name in names):
                pass  # most layers of a searched adapter: no second weight is worth it
            elif saved is None or saved.is_written(self):
                merged = self.merged_weight([*self.merged_adapters, *names], check_finite=safe_merge)
                self._saved_base = saved or SavedBaseWeight(self)
                self._saved_base.write(self, merged)
            else:  # changed by others since, which a new start from what merging replaced would undo
                self.set_base_weight(self._weight_with(self.base_matrix(), names, check_finite=safe_merge))
        self._kept_weight.drop()
        self.merged_adapters.extend(names)
        self._warn_of_double_truncation(self.merged_adapters)

    def merged_weight(self, adapter_names: Sequence[str], *, check_finite: bool = False) -> Tensor:
        """The weight that merging these adapters stores, in the base weight's dtype and orientation.

        Raises:
            ValueError: If it is not finite and `check_finite` is set, or if the base cannot be merged into.
        """
        check_mergeable(self)
        with torch.no_grad():
            return self._weight_with(original_matrix(self), adapter_names, check_finite=check_finite)

    def _weight_with(self, base: Tensor, adapter_names: Sequence[str], *, check_finite: bool) -> Tensor:
        merged = effective_weight(base, [self.factors(name) for name in adapter_names]).to(base.dtype)
        if check_finite and not torch.isfinite(merged).all():
            raise ValueError(
                f"Merging {', '.join(adapter_names)} would store NaN or infinity in a weight; the adapter is broken. "
                "Nothing was merged: load the adapter again."
            )
        return self._oriented(merged).contiguous()

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again.

        What merging replaced comes back, to the bit. Where the weight has been written since by others, their change
        stays: what merging added is subtracted instead, which is exact to rounding, and a warning says so.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        saved = self._saved_base
        if saved is not None:
            check_mergeable(self)
        with torch.inference_mode(False), torch.no_grad():
            if saved is None:
                pass  # nothing but adapters of rank 0
            elif saved.is_written(self):
                saved.restore(self)
            else:
                warnings.warn(
                    f"A base weight {self.shape} was changed while {', '.join(self.merged_adapters)} was merged into "
                    "it. The change is kept and the adapter's part subtracted, which is exact only to rounding.",
                    PeftWarning,
                    stacklevel=2,
                )
                current = self.base_matrix()
                weight = effective_weight(current, [self.factors(name).negated for name in self.merged_adapters])
                saved.restore(self)
                self.set_base_weight(self._oriented(weight.to(current.dtype)).contiguous())
        self._saved_base = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, bare, for PEFT's `unload` and `merge_and_unload`; adapters of other tuners go as ours do."""
        layer: Any = self
        while merge and isinstance(layer, BaseTunerLayer):
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            if layer._get_available_adapters().intersection(wanted).difference(layer.merged_adapters):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return self.get_base_layer()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters (see `BaseTunerLayer.set_adapter`); warns where two training-free ones would add up."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._warn_of_double_truncation(self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; a merged layer is unmerged first, for the deleted adapter must not live on in it."""
        if adapter_name in self.merged_adapters:
            warnings.warn(f"Adapter {adapter_name} is merged. Unmerging the layer before deleting it.", stacklevel=2)
            self.unmerge()
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

    def make_room(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Give factors that a state dict is about to bring memory to be copied into.

        Args:
            state_dict: Tensors by their names in the whole model.
            prefix: What this layer's names begin with.
        """
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is None or device.type == "meta":
            device = torch.device("cpu")
        for container_name in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, container_name)
            for name, tensor in list(container.items()):
                if tensor.is_meta and f"{prefix}{container_name}.{name}" in state_dict:
                    empty = torch.empty_like(tensor, device=device)
                    trained = isinstance(tensor, nn.Parameter)
                    container[name] = nn.Parameter(empty, tensor.requires_grad) if trained else empty

    def _warn_of_double_truncation(self, adapter_names: Sequence[str]) -> None:
        fixed = [
            name
            for name in adapter_names
            if name in self.setar_ratio and not self.is_finetuned(name) and self.setar_B0[name].shape[1]
        ]
        if len(fixed) > 1:
            warnings.warn(
                f"The training-free adapters {', '.join(fixed)} are active together on one layer: components that both "
                "remove are subtracted twice. Activate one of them, or make one adapter with the larger ratio.",
                PeftWarning,
                stacklevel=3,
            )

    def _oriented(self, matrix: Tensor) -> Tensor:
        return matrix.T if isinstance(self.get_base_layer(), Conv1D) else matrix

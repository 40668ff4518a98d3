"""The tuner: puts SeTAR layers into a model, checks what is loaded, and merges whole models or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, _get_submodules
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from setar_peft.backbones import default_target_modules
from setar_peft.decomposition import Residual
from setar_peft.tuner.checkpoint import check_adapter_tensors, check_base
from setar_peft.tuner.config import SeTARConfig
from setar_peft.tuner.layer import SeTARLayer, SeTARLinear, SplitSettings
from setar_peft.tuner.targets import resolve_rank_ratios, targeted_modules


class SeTARModel(BaseTuner):
    """A model with SeTAR adapters (see `SeTARConfig`); what `get_peft_model` returns wraps one of these."""

    prefix = "setar_"
    tuner_layer_cls = SeTARLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    # `search_rank_ratios`; the package sets it, since the search stands above the tuner.
    search: ClassVar[Callable[..., Any] | None] = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model, or leave the model as it was (see `BaseTuner.inject_adapter`)."""
        # Everything that can fail on the user's input is computed before the first module is replaced.
        self._residuals: dict[str, Residual] = {}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            remove_adapter(model, adapter_name)
            raise
        finally:
            self._residuals = {}
        config = self.peft_config[adapter_name]
        config.objective = None
        config.factors_created = True

    def _check_new_adapter_config(self, config: SeTARConfig) -> None:
        super()._check_new_adapter_config(config)
        merged = [
            name for name, module in self.model.named_modules() if isinstance(module, SeTARLayer) and module.merged
        ]
        if merged:
            raise ValueError(
                f"An adapter is merged into {merged[0]}, so a new one would be made from a truncated weight. "
                "Call unmerge_adapter() first."
            )
        if config.rank_ratios is None and config.objective is None:
            raise ValueError(
                "SeTARConfig has neither rank_ratios nor an objective. Pass the ratios, for example "
                "SeTARConfig(rank_ratios=0.2), or an objective to search them with, for example "
                "SeTARConfig(objective=LoCoOpObjective(...))."
            )

    def _prepare_adapter_config(self, peft_config: SeTARConfig, model_config: dict[str, Any]) -> SeTARConfig:
        if peft_config.target_modules is None:
            if isinstance(peft_config.rank_ratios, dict):
                peft_config.target_modules = set(peft_config.rank_ratios)
            else:
                peft_config.target_modules = default_target_modules(model_config.get("model_type"))
        return peft_config

    def _prepare_model(self, peft_config: SeTARConfig, model: nn.Module) -> None:
        if peft_config.rank_ratios is None:
            search = type(self).search
            if search is None:
                raise RuntimeError("No search is known to the tuner; import setar_peft, not only setar_peft.tuner.")
            result = search(model, peft_config.objective, peft_config)
            peft_config.rank_ratios = result.rank_ratios
            self._residuals.update(result.residuals)
        targets = targeted_modules(peft_config, model)
        if not targets:
            return  # PEFT says why nothing matched
        peft_config.rank_ratios = resolve_rank_ratios(peft_config.rank_ratios, targets)
        for name, module in targets.items():
            layer = module if isinstance(module, SeTARLayer) else self._new_layer(module, "unused")
            saved_shape = peft_config.saved_shapes.get(name)
            if saved_shape is not None and saved_shape != layer.shape:
                raise ValueError(
                    f"The adapter's factors for {name} are made for a weight {saved_shape}, this model's is {layer.shape}. "
                    f"Load the base model that the adapter was made from ({peft_config.base_model_name_or_path})."
                )
            if not peft_config.awaits_factors and name not in self._residuals:
                self._residuals[name] = layer.split_base_weight(self._settings(peft_config, name))

    def _settings(self, config: SeTARConfig, name: str) -> SplitSettings:
        assert isinstance(config.rank_ratios, dict)
        return SplitSettings(config.rank_ratios[name], config.prune, config.seed, name)

    def _create_and_replace(
        self,
        peft_config: SeTARConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, SeTARLayer) else self._new_layer(target, adapter_name)
        layer.update_layer(
            adapter_name,
            self._settings(peft_config, current_key),
            self._residuals.get(current_key),
            finetune=peft_config.finetune,
            init_weights=peft_config.init_weights,
            inference_mode=peft_config.inference_mode,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, target: nn.Module, adapter_name: str) -> SeTARLinear:
        return SeTARLinear(target, adapter_name, **self._backend_kwargs())

    def _backend_kwargs(self) -> dict[str, Any]:
        return get_quantization_kwargs(self.model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, in every layer or in none (see `BaseTuner.merge_adapter`)."""
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for layer in _layers(self.model).values():
            names = layer.active_adapters if adapter_names is None else adapter_names
            backend = layer.quantization_backend
            if safe_merge or (backend is not None and not backend.supports_merge):
                layer.merged_weight([name for name in names if name in layer.setar_ratio], check_finite=safe_merge)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # The factors are float32 from the start; without autocast PEFT's users expect the base layer's dtype.
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for layer in _layers(self.model).values():
            for kind in ("setar_A", "setar_B"):
                factors = getattr(layer, kind)
                if adapter_name in factors and layer.weight.is_floating_point():
                    factors[adapter_name] = factors[adapter_name].to(layer.weight.dtype)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        for layer in _layers(model).values():
            if adapter_name in layer.setar_ratio:
                layer.residual(adapter_name)
        return super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **kwargs
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        try:
            check_adapter_tensors(state_dict, config.rank_ratios, finetune=config.finetune)
            layers = {name.removeprefix("base_model.model."): layer for name, layer in _layers(model).items()}
            tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in state_dict.items()}
            check_base(
                (
                    (name, layers[name], Residual(tensors[f"{name}.setar_B0"], tensors[f"{name}.setar_A0"]))
                    for name in config.rank_ratios
                ),
                strict=config.strict_base,
            )
        except BaseException:
            remove_adapter(model, adapter_name)
            raise
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of a model; a layer that is left without one becomes the base layer again."""
    for name, layer in _layers(model).items():
        for container_name in layer.adapter_layer_names + layer.other_param_names:
            container = getattr(layer, container_name)
            if adapter_name in container:
                del container[adapter_name]
        layer._awaiting.pop(adapter_name, None)
        if not len(layer.setar_ratio):
            parent, _, target_name = _get_submodules(model, name)
            setattr(parent, target_name, layer.base_layer)


def _layers(model: nn.Module) -> dict[str, SeTARLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SeTARLayer)}

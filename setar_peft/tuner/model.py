"""The tuner: puts SeTAR layers into a model, checks what is loaded, and merges whole models or nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_submodules, onload_layer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_quantization_kwargs
from torch import Tensor, nn

from setar_peft.backbones import default_target_modules
from setar_peft.decomposition import Residual
from setar_peft.tuner.checkpoint import (
    check_adapter_tensors,
    check_base,
    check_names,
    check_other_tensors,
    check_shapes,
)
from setar_peft.tuner.config import SeTARConfig, objective_settings
from setar_peft.tuner.layer import SeTARLayer, SplitSettings
from setar_peft.tuner.linear import SeTARLinear
from setar_peft.tuner.targets import resolve_rank_ratios, targeted_modules

# What torch.compile and FSDP put into the names of modules.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.")


class SeTARModel(BaseTuner):
    """A model with SeTAR adapters (see `SeTARConfig`); what `get_peft_model` returns wraps one of these.

    Not possible, because PEFT lists the methods for it in its own code: `get_peft_model(..., mixed=True)` and
    hot-swapping an adapter.

    Sharding: DistributedDataParallel needs a trainable parameter, which a training-free adapter does not have; use the
    model as it is in each process then. With FSDP2 adapters can be made before or after sharding, but not merged after.
    Under DeepSpeed ZeRO-3 the weight is gathered around the decomposition; this is untested.
    """

    prefix = "setar_"
    tuner_layer_cls = SeTARLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    # `search_rank_ratios`; the package sets it, since the search stands above the tuner.
    search: ClassVar[Callable[..., Any] | None] = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model, or leave the model as it was (see `BaseTuner.inject_adapter`)."""
        if "." in adapter_name:
            raise ValueError(f"The adapter's name is {adapter_name!r}; PEFT needs a name without a dot.")
        config = self.peft_config[adapter_name]
        settings = dict(vars(config))
        # PEFT takes the modules from the names of these tensors, where they are given, and not from the config.
        self._saved_ratios = _ratios(kwargs.get("state_dict") or {})
        config.trainable_before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        # Everything that can fail on the user's input is computed before the first module is replaced.
        self._residuals: dict[str, Residual] = {}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            remove_adapter(model, adapter_name, config.trainable_before)
            vars(config).update(settings)
            raise
        finally:
            self._residuals, self._saved_ratios = {}, {}
        config.card.objective = objective_settings(config.objective) or config.card.objective
        config.objective, config.known_splits = None, {}
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
        if config.rank_ratios is None and config.objective is None and not self._saved_ratios:
            raise ValueError(
                "SeTARConfig has neither rank_ratios nor an objective. Pass the ratios, for example "
                "SeTARConfig(rank_ratios=0.2), or an objective to search them with, for example "
                "SeTARConfig(objective=LoCoOpObjective(...))."
            )

    def _prepare_adapter_config(self, peft_config: SeTARConfig, model_config: dict[str, Any]) -> SeTARConfig:
        if peft_config.rank_ratios is None and self._saved_ratios:
            peft_config.rank_ratios = dict(self._saved_ratios)
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
            peft_config.rank_ratios, peft_config.known_splits = result.rank_ratios, result.config.known_splits
        if self._saved_ratios:
            targets = {name: module for name, module in model.named_modules() if name in self._saved_ratios}
        else:
            targets = targeted_modules(peft_config, model)
        if not targets:
            return  # PEFT says why nothing matched
        peft_config.rank_ratios = resolve_rank_ratios(peft_config.rank_ratios, targets)
        layers = {
            name: module if isinstance(module, SeTARLayer) else self._new_layer(module, "unused")
            for name, module in targets.items()
        }
        if peft_config.saved_shapes is not None:
            check_shapes(peft_config.saved_shapes.weights, layers)
            check_other_tensors(peft_config.saved_shapes.others, peft_config.modules_to_save or (), model)
        for name, layer in layers.items():
            if not peft_config.awaits_factors:
                known = peft_config.known_splits.get(name)
                self._residuals[name] = layer.split_base_weight(self._settings(peft_config, name), known)

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
            # Not by PEFT's `_replace_module`, which moves the layer to its base's device: it is there, and on an 8-bit
            # base that fails on the placeholders of `low_cpu_mem_usage`.
            setattr(parent, target_name, layer)

    def _new_layer(self, target: nn.Module, adapter_name: str) -> SeTARLinear:
        return SeTARLinear(target, adapter_name, **self._backend_kwargs())

    def _backend_kwargs(self) -> dict[str, Any]:
        return get_quantization_kwargs(self.model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, in every layer or in none (see `BaseTuner.merge_adapter`)."""
        with self._all_or_none():
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
            with self._all_or_none():
                for layer in _layers(self.model).values():
                    with onload_layer(layer):
                        layer.unload_and_optionally_merge_module(True, safe_merge, adapter_names)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Merges that fail on the way are taken back: every layer has merged what it had before."""
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            yield
        except BaseException:
            for layer, names in reversed(list(zip(layers, before, strict=True))):
                if layer.merged_adapters != names:
                    with onload_layer(layer):
                        layer.unmerge()
                        if names:
                            layer.merge(adapter_names=names)
            raise

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Tell the layers which adapter each item of a batch goes through, for as long as the context lasts.

        Raises:
            ValueError: If the model is in training mode, or a name is no adapter's.
        """
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(adapter_names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        hook = partial(_pass_adapter_names, names=list(adapter_names), beams=kwargs.get("num_beams") or 1)
        handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (SeTARLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
            shapes = check_adapter_tensors(state_dict, config.rank_ratios, finetune=config.finetune)
            check_names(state_dict, model)
            layers = {
                _WRAPPERS.sub("", name).removeprefix("base_model.model."): layer
                for name, layer in _layers(model).items()
                if adapter_name in layer.setar_ratio
            }
            check_shapes(shapes, layers)
            tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in state_dict.items()}
            check_base(
                (
                    (name, layers[name], Residual(tensors[f"{name}.setar_B0"], tensors[f"{name}.setar_A0"]))
                    for name in config.rank_ratios
                ),
                strict=config.strict_base,
            )
        except BaseException:
            # An adapter that was there before, trained perhaps, is not lost because a file does not fit it.
            if any(adapter_name in layer._awaiting for layer in _layers(model).values()):
                get_base_model: Any = getattr(model, "get_base_model", None)
                remove_adapter(get_base_model() if get_base_model else model, adapter_name, config.trainable_before)
            raise
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )


def remove_adapter(model: nn.Module, adapter_name: str, trainable: set[str]) -> None:
    """Take an adapter out of a model; a layer that is left without one becomes the base layer again.

    Args:
        model: The base model.
        adapter_name: Name of the adapter.
        trainable: Names of the parameters that required gradients before the adapter came.
    """
    for name, layer in _layers(model).items():
        for container_name in layer.adapter_layer_names + layer.other_param_names:
            container = getattr(layer, container_name)
            if adapter_name in container:
                del container[adapter_name]
        layer._awaiting.pop(adapter_name, None)
        if not len(layer.setar_ratio):
            parent, _, target_name = _get_submodules(model, name)
            setattr(parent, target_name, layer.base_layer)
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            del module.modules_to_save[adapter_name]
            if not len(module.modules_to_save):
                parent, _, target_name = _get_submodules(model, name)
                setattr(parent, target_name, module.original_module)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in trainable)
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    if not configs:
        if hasattr(model, "peft_config"):
            del model.peft_config
        if hasattr(model, "_hf_peft_config_loaded"):  # set by transformers' add_adapter beforehand
            model._hf_peft_config_loaded = False  # type: ignore[assignment]


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: list[str], beams: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # In beam search the decoder sees each item once a beam, an encoder once.
    repeated = beams if args and len(args[0]) == len(names) * beams else 1
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(repeated)]}


def _ratios(state_dict: dict[str, Tensor]) -> dict[str, float]:
    suffix = ".setar_ratio"
    return {
        key.removesuffix(suffix).removeprefix("base_model.model."): float(value)
        for key, value in state_dict.items()
        if key.endswith(suffix)
    }


def _layers(model: nn.Module) -> dict[str, SeTARLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SeTARLayer)}

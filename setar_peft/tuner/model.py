"""The tuner: puts SeTAR layers into a model, checks what is loaded, and merges whole models or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    check_target_module_exists,
    onload_layer,
)
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs
from torch import Tensor, nn

from setar_peft.backbones import default_target_modules
from setar_peft.decomposition import Residual, SplitSettings
from setar_peft.tuner.adapter_file import SavedShapes
from setar_peft.tuner.adapter_layers import adapter_layers, layers_of_adapter, remove_adapter
from setar_peft.tuner.checkpoint import (
    TensorFacts,
    check_adapter_tensors,
    check_base,
    check_names,
    check_other_tensors,
    check_shapes,
    unprefixed,
)
from setar_peft.tuner.config import SeTARConfig, objective_settings
from setar_peft.tuner.layer import SeTARLayer
from setar_peft.tuner.linear import SeTARLinear
from setar_peft.tuner.loading import CURRENT, plain_name
from setar_peft.tuner.targets import check_are_called, resolve_rank_ratios, targeted_modules


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

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, low_cpu_mem_usage: bool = False, **kwargs: Any
    ) -> None:
        """Put an adapter into the model, or leave the model as it was (see `BaseTuner.inject_adapter`).

        The config that was given stays as it is: `peft_config` gets a copy with what is resolved here. Only on loading
        it is the one that was read or passed for the load, as PEFT has it.
        """
        if "." in adapter_name:
            raise ValueError(f"The adapter's name is {adapter_name!r}; PEFT needs a name without a dot.")
        given = self.peft_config[adapter_name]
        fields = dict(vars(given))
        # PEFT takes the modules from the names of these tensors, where they are given, and not from the config.
        self._saved_ratios = _ratios(kwargs.get("state_dict") or {})
        # PEFT makes parameters on the meta device for a first adapter without saying so in an argument.
        self._expects_file = CURRENT.get() is not None or low_cpu_mem_usage or nn.LayerNorm(1).weight.is_meta
        # Everything that can fail on the user's input is computed before the first module is replaced.
        self._residuals: dict[str, Residual] = {}
        self._new_layers: dict[str, SeTARLinear] = {}
        self._adding = adapter_name
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        try:
            config = self.peft_config[adapter_name] = _own_config(given)
            super().inject_adapter(model, adapter_name, *args, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
        except BaseException:
            self.peft_config[adapter_name] = given
            vars(given).update(fields)
            remove_adapter(model, adapter_name, trainable)
            raise
        finally:
            self._residuals, self._new_layers, self._saved_ratios = {}, {}, {}
        settings = objective_settings(config.objective) or config.card.objective
        config.card = replace(config.card, objective=settings)
        config.objective, config.known_splits = None, {}
        config.factors_saved = True

    def _check_new_adapter_config(self, config: SeTARConfig) -> None:
        super()._check_new_adapter_config(config)
        merged = [name for name, layer in adapter_layers(self.model).items() if layer.merged]
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
            check_are_called(targeted_modules(peft_config, model), model)  # before a search that may take hours
            result = search(model, peft_config.objective, peft_config)
            peft_config.rank_ratios, peft_config.known_splits = result.rank_ratios, result.config.known_splits
        if self._saved_ratios:
            targets = {name: module for name, module in model.named_modules() if name in self._saved_ratios}
        else:
            targets = targeted_modules(peft_config, model, self._check_target_module_exists)
        if not targets:
            return  # PEFT says why nothing matched
        check_are_called(targets, model)
        ratios = peft_config.rank_ratios
        if isinstance(ratios, dict):
            ratios = {plain_name(name): ratio for name, ratio in ratios.items()}
        peft_config.rank_ratios = resolve_rank_ratios(ratios, map(plain_name, targets))
        settings = get_quantization_kwargs(self.model)
        self._new_layers = {
            plain_name(name): SeTARLinear(module, self._adding, **settings)
            for name, module in targets.items()
            if not isinstance(module, SeTARLayer)
        }
        layers = {
            name: module if isinstance(module, SeTARLayer) else self._new_layers[name]
            for name, module in zip(map(plain_name, targets), targets.values(), strict=True)
        }
        if peft_config.saved_shapes is not None and CURRENT.get() is not None:
            shapes, others = peft_config.saved_shapes
            check_shapes(shapes, {name: layer.shape for name, layer in layers.items()})
            check_other_tensors(others, peft_config.modules_to_save or (), model)
        load = CURRENT.get()
        if load is not None and load.strongest is not None:
            self._check_base(layers, load.by_module(load.strongest), strict=peft_config.strict_base)
        if not self._expects_file:
            for name, layer in layers.items():
                known = peft_config.known_splits.get(name)
                self._residuals[name] = layer.split_base_weight(self._settings(peft_config, name), known)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        """Whether a module is a target: by PEFT's rules for a new adapter, by its ratio for one that was saved."""
        name = plain_name(key)
        result = check_target_module_exists(peft_config, name)
        is_saved = isinstance(peft_config, SeTARConfig) and peft_config.factors_saved
        if not is_saved or isinstance(result, _ExcludedModule):
            return result
        assert isinstance(peft_config.rank_ratios, dict)
        return name in peft_config.rank_ratios

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
        layer = target if isinstance(target, SeTARLayer) else self._new_layers[plain_name(current_key)]
        layer.update_layer(
            adapter_name,
            self._settings(peft_config, plain_name(current_key)),
            self._residuals.get(plain_name(current_key)),
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
                for layer in adapter_layers(self.model).values():
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
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}; there are "
                f"{', '.join(self.peft_config)}."
            )
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
        for layer in adapter_layers(self.model).values():
            for kind in ("setar_A", "setar_B"):
                factors = getattr(layer, kind)
                if adapter_name in factors and layer.weight.is_floating_point():
                    factors[adapter_name] = factors[adapter_name].to(layer.weight.dtype)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        for name, layer in adapter_layers(model).items():
            if adapter_name in layer.setar_ratio:
                layer.residual(adapter_name)
            # PEFT saves the base weight of an output layer that is adapted (`lm_head`). It is not the adapter's, and
            # loading must not write it. This dictionary is what PEFT takes it from afterwards.
            for key in [key for key in state_dict if key.startswith(f"{name}.base_layer.")]:
                del state_dict[key]
        return super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **kwargs
        )

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return super()._remove_adapter_name_from_key(plain_name(key), adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_names(state_dict, model)
        load = CURRENT.get()
        if load is None or load.strongest is None:  # else the file was checked, and compared with the base
            facts = {name: TensorFacts.of(tensor) for name, tensor in state_dict.items()}
            shapes = check_adapter_tensors(facts, config.rank_ratios, finetune=config.finetune)
            layers = layers_of_adapter(model, adapter_name)
            check_shapes(shapes, {name: layer.shape for name, layer in layers.items()})
            tensors = unprefixed(state_dict)
            residuals = {name: Residual(tensors[f"{name}.setar_B0"], tensors[f"{name}.setar_A0"]) for name in shapes}
            cls._check_base(layers, residuals, strict=config.strict_base)
        # Adapters that were saved with a ratio in float64 do not go onto every device.
        state_dict = {k: v.float() if k.endswith(".setar_ratio") else v for k, v in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )

    @classmethod
    def check_loaded(cls, model: nn.Module, config: SeTARConfig, adapter_name: str) -> None:
        """Check an adapter whose factors were put into a model by others.

        Args:
            model: The model with the adapter in place.
            config: The adapter's config.
            adapter_name: Its name.

        Raises:
            ValueError: If factors are missing, not finite, or `strict_base` is set and the base is not known to be
                the one that they came from.
        """
        layers = layers_of_adapter(model, adapter_name)
        missing = [name for name, layer in layers.items() if layer.awaits_factors(adapter_name)]
        if missing:
            raise ValueError(
                f"The adapter's file has no factors for {', '.join(missing[:8])} ({len(missing)} of {len(layers)} "
                "layers). Load the two files that were saved together."
            )
        facts = {
            f"{name}.{kind}": TensorFacts.of(container[adapter_name])
            for name, layer in layers.items()
            for kind in layer.adapter_layer_names + layer.other_param_names
            if adapter_name in (container := getattr(layer, kind))
        }
        assert isinstance(config.rank_ratios, dict)
        check_adapter_tensors(facts, config.rank_ratios, finetune=config.finetune)
        load = CURRENT.get()
        if load is None or load.strongest is None:
            residuals = {name: layer.residual(adapter_name) for name, layer in layers.items()}
            cls._check_base(layers, residuals, strict=config.strict_base)

    @staticmethod
    def _check_base(layers: Mapping[str, SeTARLayer], residuals: Mapping[str, Residual], *, strict: bool) -> None:
        load = CURRENT.get()
        strict = strict or (load is not None and load.strict_base)
        check_base(
            ((name, layers[name].readable_base_matrix(), residual) for name, residual in residuals.items()),
            strict=strict,
        )


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: list[str], beams: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # In beam search the decoder sees each item once a beam, an encoder once.
    repeated = beams if args and len(args[0]) == len(names) * beams else 1
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(repeated)]}


def _ratios(state_dict: dict[str, Tensor]) -> dict[str, float]:
    suffix = ".setar_ratio"
    return {
        # Back from float32 to the number that was meant.
        key.removesuffix(suffix).removeprefix("base_model.model."): round(float(value), 7)
        for key, value in state_dict.items()
        if key.endswith(suffix)
    }


def _own_config(given: SeTARConfig) -> SeTARConfig:
    """The config for one model to resolve and keep; that of a load gets the names that modules have in this model."""
    load = CURRENT.get()
    if load is None:
        config = copy.deepcopy(given)
        config.objective, config.known_splits = given.objective, given.known_splits
        return config
    if given.factors_saved and isinstance(given.rank_ratios, dict):
        ratios = load.by_module(given.rank_ratios)
        if ratios != given.rank_ratios:
            given.rank_ratios, given.target_modules = ratios, set(ratios)
        if given.saved_shapes is not None:
            shapes, others = given.saved_shapes
            given.saved_shapes = SavedShapes(
                load.by_module(shapes), {plain_name(load.rename(name)): shape for name, shape in others.items()}
            )
    return given

"""The layers that hold adapters in a model, and taking an adapter out of them, so that the model is what it was."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import _get_submodules
from peft.utils import ModulesToSaveWrapper
from torch import nn

from setar_peft.tuner.layer import SeTARLayer
from setar_peft.tuner.loading import plain_name


def adapter_layers(model: nn.Module) -> dict[str, SeTARLayer]:
    """The layers with SeTAR adapters in a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SeTARLayer)}


def layers_of_adapter(model: nn.Module, adapter_name: str) -> dict[str, SeTARLayer]:
    """The layers that have an adapter, by the names that their modules have in the base model."""
    return {
        plain_name(name).removeprefix("base_model.model."): layer
        for name, layer in adapter_layers(model).items()
        if adapter_name in layer.setar_ratio
    }


def remove_adapter(model: nn.Module, adapter_name: str, trainable: set[str]) -> None:
    """Take an adapter out of a model; a layer that is left without one becomes the base layer again.

    Args:
        model: The base model.
        adapter_name: Name of the adapter.
        trainable: Names of the parameters that required gradients before the adapter came.
    """
    for name, layer in adapter_layers(model).items():
        for container_name in layer.adapter_layer_names + layer.other_param_names:
            container = getattr(layer, container_name)
            if adapter_name in container:
                del container[adapter_name]
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
        vars(model).pop("_hf_peft_config_loaded", None)  # set by transformers beforehand; its class says False

"""Model families. A new one is one file here and one line in `_BACKBONES`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from setar_peft.backbones.base import (
    Backbone,
    Location,
    Tower,
    TowerInput,
    TowerState,
)
from setar_peft.backbones.bert import BertBackbone
from setar_peft.backbones.clip import CLIPBackbone
from setar_peft.backbones.deit import DeiTBackbone
from setar_peft.backbones.dinov2 import Dinov2Backbone, Dinov2WithRegistersBackbone
from setar_peft.backbones.features import ClassWeights, ImageFeatures, Logits
from setar_peft.backbones.grid import PatchGrid
from setar_peft.backbones.inputs import named_inputs
from setar_peft.backbones.roberta import RobertaBackbone
from setar_peft.backbones.siglip import SiglipBackbone
from setar_peft.backbones.siglip2 import Siglip2Backbone
from setar_peft.backbones.swin import SwinBackbone
from setar_peft.backbones.swinv2 import Swinv2Backbone
from setar_peft.backbones.vit import ViTBackbone

__all__ = [
    "Backbone",
    "ClassWeights",
    "ImageFeatures",
    "Location",
    "Logits",
    "PatchGrid",
    "Tower",
    "TowerInput",
    "TowerState",
    "backbone_of",
    "base_of",
    "default_target_modules",
    "model_classes",
    "named_inputs",
]

_BACKBONES: dict[str, type[Backbone]] = {
    cls.model_type: cls
    for cls in (
        CLIPBackbone,
        SiglipBackbone,
        Siglip2Backbone,
        SwinBackbone,
        Swinv2Backbone,
        ViTBackbone,
        DeiTBackbone,
        Dinov2Backbone,
        Dinov2WithRegistersBackbone,
        BertBackbone,
        RobertaBackbone,
    )
}


def base_of(model: nn.Module) -> Any:
    """The model beneath PEFT's wrapper, with the adapters' layers in it; a model without a wrapper itself."""
    return getattr(model, "get_base_model", lambda: model)()


def backbone_of(model: nn.Module) -> Backbone:
    """The backbone of a model.

    Args:
        model: A stock transformers model, or a PEFT model around one.

    Raises:
        ValueError: If its family is not known, or it is another kind of model of that family.
    """
    model = base_of(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    advice = "Give a callable objective `model -> float`, which works for any model."
    if model_type not in _BACKBONES:
        raise ValueError(
            f"{type(model).__name__} (model type {model_type!r}) is no known backbone; known are "
            f"{', '.join(sorted(_BACKBONES))}. {advice}"
        )
    backbone = _BACKBONES[model_type]
    if not {cls.__name__ for cls in type(model).__mro__} & set(backbone.model_classes):
        raise ValueError(
            f"{type(model).__name__} does not classify as the {model_type} backbone does; load it as "
            f"{' or '.join(backbone.model_classes)}. {advice}"
        )
    return backbone(model)


def model_classes(model_type: str | None) -> Sequence[str]:
    """Names of transformers' classes that a model type is loaded as; empty if it is not known."""
    return _BACKBONES[model_type].model_classes if model_type in _BACKBONES else ()


def default_target_modules(model_type: str | None) -> set[str]:
    """W_up of a model type: what is adapted where the user names nothing.

    Raises:
        ValueError: If the model type's W_up is not known.
    """
    if model_type not in _BACKBONES:
        raise ValueError(
            f"The weight W_up of model type {model_type!r} is not known; known are {', '.join(sorted(_BACKBONES))}. "
            "Name the layers to adapt in target_modules, for example target_modules=['mlp.fc1']."
        )
    return _BACKBONES[model_type].default_targets()

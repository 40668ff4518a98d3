"""Model families. A new one is one file here and one line in `_BACKBONES`."""

from __future__ import annotations

from torch import nn

from setar_peft.backbones.base import Backbone, ImageFeatures, Location, Logits, Tower, TowerInput
from setar_peft.backbones.clip import CLIPBackbone

__all__ = [
    "Backbone",
    "CLIPBackbone",
    "ImageFeatures",
    "Location",
    "Logits",
    "Tower",
    "TowerInput",
    "backbone_of",
    "default_target_modules",
]

_BACKBONES: dict[str, type[Backbone]] = {cls.model_type: cls for cls in (CLIPBackbone,)}


def backbone_of(model: nn.Module) -> Backbone:
    """The backbone of a model.

    Args:
        model: A stock transformers model.

    Raises:
        ValueError: If its family is not known.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _BACKBONES:
        raise ValueError(
            f"{type(model).__name__} (model type {model_type!r}) is no known backbone; known are "
            f"{', '.join(sorted(_BACKBONES))}. Give a callable objective `model -> float`, which works for any model."
        )
    return _BACKBONES[model_type](model)


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
    return {_BACKBONES[model_type].weight_names["W_up"]}

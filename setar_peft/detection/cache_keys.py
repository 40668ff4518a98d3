"""What features and figures that a cache keeps depend on, as digests."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from setar_peft.backbones import ClassWeights, backbone_of, base_of
from setar_peft.data.inputs import Inputs
from setar_peft.detection.adapters import AS_IT_IS, active_adapters
from setar_peft.detection.scoring import Score, ScoresInUse
from setar_peft.hub.digests import adapter_digest, facts_digest, model_digest, tensors_digest
from setar_peft.objectives.class_prompts import ClassPrompts
from setar_peft.versions import versions


def fingerprints(model: nn.Module, adapters: dict[str, str | None]) -> dict[str, str]:
    """By name of a variant, a digest of weights and configuration as one adapter of a model makes it compute.

    Other adapters do not count, nor does a wrapper: the base of a PEFT model is the stock model. A forward that was
    replaced by hand is not seen.

    Args:
        model: A stock model, or a PEFT model.
        adapters: Name of a variant -> its adapter, None for the base without any, `AS_IT_IS` for those that are active.

    Raises:
        ValueError: If an adapter is merged, or a weight is not in memory.
    """
    base = base_of(model)
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    weights = model_digest(model)
    found = {}
    for variant, adapter in adapters.items():
        named = [] if adapter is None else active_adapters(model) if adapter == AS_IT_IS else [adapter]
        found[variant] = facts_digest(
            type=type(base).__qualname__,
            config=base.config.to_dict(),
            attention=getattr(base.config, "_attn_implementation", None),
            weights=weights,
            adapters=[[name, configs[name].to_dict(), adapter_digest(model, name)] for name in named],
        )
    return found


def key_of_set(model: str, inputs: str, batch_size: int, device: str) -> str:
    """The key of a set as one model reads it, from the digests of both.

    The batch size is in it, as it moves the last digits: what a cache gives is what was computed, to the bit.
    """
    return facts_digest(
        model=model,
        inputs=inputs,
        batch_size=batch_size,
        device=device,
        autocast=torch.is_autocast_enabled(device),
        versions=versions(),
    )


def keys_of_scores(
    model: nn.Module,
    classes: ClassPrompts | ClassWeights,
    scores: ScoresInUse,
    fit_inputs: Inputs | None,
) -> dict[str, str]:
    """Name -> key, of the scores that can be kept, and under "" of the predictions.

    A score of the user's own cannot: nobody knows whether its function is what it was yesterday.
    """
    described = _classes(model, classes)
    fit = None if fit_inputs is None else fit_inputs.digest()
    keys = {"": facts_digest(classes=described)}
    for name, (score, given) in scores.items():
        identity = _identity(score)
        if identity is not None:
            data = fit if score.needs_fit else None
            keys[name] = facts_digest(classes=described, score=identity, given=dict(given), fit=data)
    return keys


def _identity(score: Score) -> Any:
    """What a score is, as plain values, with the score that it is made of; None for one that nobody knows."""
    modules = [type(score).__module__, getattr(score.function, "__module__", None)]
    values, tensors = score.state()
    is_known = all(str(module).startswith("setar_peft.") for module in modules)
    if not is_known or (score.needs_fit and not values):
        return None
    inner = getattr(score, "score", None)
    parts = _identity(inner) if isinstance(inner, Score) else []
    if parts is None:
        return None
    function = getattr(score.function, "__qualname__", None)
    return [type(score).__qualname__, function, score.name, values, tensors_digest(tensors), parts]


def _classes(model: nn.Module, classes: ClassPrompts | ClassWeights) -> Any:
    """What the map from features to logits is made of; prompts are tokenised, and not encoded."""
    if isinstance(classes, ClassWeights):
        return tensors_digest(classes.tensors())
    backbone = backbone_of(model)
    tokens: dict[str, Any] = {}
    if backbone.needs_prompts:
        # It warns again where the prompts are encoded.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = {name: tensor.tolist() for name, tensor in classes.tokens(backbone).items()}
    return [classes.class_names, classes.prompts, classes.negative_labels, tokens]

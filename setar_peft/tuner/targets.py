"""Which modules are adapted, and with which ratio (invariant: a key is never guessed at)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D


def targeted_modules(
    config: PeftConfig, model: nn.Module, is_target: Callable[[PeftConfig, str], object] = check_target_module_exists
) -> dict[str, nn.Module]:
    """The modules that a config targets, by full name; what lies inside adapters is left out.

    Args:
        config: A config with `target_modules`; "all-linear" in it is spelled out, in place.
        model: The model.
        is_target: Says of a module's full name whether the config targets it; by default PEFT's rules.

    Raises:
        TypeError: If a target is no linear layer, or stands in several places.
    """
    config = _maybe_include_all_linear_layers(config, model)
    targets: dict[str, nn.Module] = {}
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    inside: str | None = None  # an adapter layer; what lies inside follows it at once
    for name, module in model.named_modules():
        if not name or (inside is not None and name.startswith(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{name}."
        if not is_target(config, name):
            continue
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        # torch's attention takes the weight out of its output layer and never calls it.
        is_linear = isinstance(base, (nn.Linear, Conv1D)) and not isinstance(base, NonDynamicallyQuantizableLinear)
        if not is_linear and resolve_quantization_backend(base, **get_quantization_kwargs(model)) is None:
            raise TypeError(
                f"{name} is a {type(base).__name__}; a SeTAR adapter goes on torch.nn.Linear and transformers' "
                "Conv1D layers. Change target_modules or exclude_modules."
            )
        if places[id(module)] > 1:
            names = [other for other, same in model.named_modules(remove_duplicate=False) if same is module]
            raise TypeError(
                f"{', '.join(names)} are one module, of which PEFT would adapt the first name alone, and merging would "
                "change the others. Give each name a module of its own (they may share the weight), or take them out "
                "of target_modules."
            )
        targets[name] = module
    return targets


def check_are_called(names: Iterable[str], model: nn.Module) -> None:
    """Refuse layers whose weights torch reads without calling them, so that an adapter would have no effect.

    Args:
        names: Full names of the layers that are to be adapted; a search, which exchanges weights, may try them.
        model: The model.

    Raises:
        TypeError: If one lies in an `nn.TransformerEncoderLayer` with its fast path.
    """
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        # What torch asks for beside this changes from call to call.
        fast = isinstance(parent, nn.TransformerEncoderLayer) and parent.self_attn.batch_first
        if fast and torch.backends.mha.get_fastpath_enabled():
            raise TypeError(
                f"{name} lies in a TransformerEncoderLayer, which in evaluation mode hands the layer's weight to a "
                "fast path and does not call the layer, so that an adapter would have no effect. Call "
                "torch.backends.mha.set_fastpath_enabled(False) first, or take the layer out of target_modules."
            )


def resolve_rank_ratios(rank_ratios: float | Mapping[str, float], targets: Iterable[str]) -> dict[str, float]:
    """Give every target its rank ratio.

    Args:
        rank_ratios: One ratio for all, or a mapping whose keys are full module names or suffixes of them. A full
            name wins over a suffix.
        targets: Full names of the targeted modules.

    Returns:
        Module name -> ratio, in the order of `targets`; 0 where no key matches.

    Raises:
        ValueError: If a key matches no target, or two suffixes match one target.
    """
    names = list(targets)
    if not isinstance(rank_ratios, Mapping):
        return dict.fromkeys(names, float(rank_ratios))
    exact = rank_ratios.keys() & set(names)
    matched = set(exact)
    resolved = {}
    for name in names:
        if name in exact:
            resolved[name] = float(rank_ratios[name])
            continue
        keys = [key for key in _suffixes(name) if key in rank_ratios and key not in exact]
        if len(keys) > 1:
            raise ValueError(
                f"rank_ratios has several keys that match {name!r}: {', '.join(map(repr, sorted(keys)))}. "
                "Keep one, or add the full name."
            )
        matched.update(keys)
        resolved[name] = float(rank_ratios[keys[0]]) if keys else 0.0
    unmatched = sorted(rank_ratios.keys() - matched)
    if unmatched:
        raise ValueError(
            f"rank_ratios has keys that match no targeted module: {', '.join(map(repr, unmatched))}. "
            f"Give full names or suffixes of: {_some(names)}."
        )
    return resolved


def _suffixes(name: str) -> list[str]:
    """The suffixes of a name that begin behind a dot."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} modules)"

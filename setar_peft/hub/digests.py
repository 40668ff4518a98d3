"""Digests of weights, wherever they lie, and of plain values: what a detector or a cache was made with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from setar_peft.backbones import base_of
from setar_peft.tuner.checkpoint import unprefixed
from setar_peft.tuner.loading import plain_name

_BLOCK = 1 << 24
# What PEFT calls a layer, or a module trained in full, that it has put an adapter's around.
_WRAPPED = re.compile(r"(?<=\.)(?:base_layer|original_module)\.")


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights: names, dtypes, shapes and values; those of its adapters are left out.

    It is the same on every device, and whether the model has adapters or not, as long as none is merged.

    Args:
        model: A model, with PEFT's adapters around or in it or without.

    Raises:
        ValueError: If an adapter is merged, or a weight is not in memory.
    """
    return tensors_digest(base_tensors(model))


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by their names, without those of its adapters.

    Args:
        model: A model, with PEFT's adapters around or in it or without.

    Raises:
        ValueError: If an adapter is merged.
    """
    base = base_of(model)
    adapters: list[str] = []
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                raise ValueError(
                    f"An adapter is merged into {plain_name(name)}, so that the base's weights are not there to be "
                    "told. Call unmerge_adapter() first."
                )
            adapters += [f"{name}.{kind}" for kind in (*module.adapter_layer_names, *module.other_param_names)]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            adapters += [f"{name}.{kind}" for kind in module.adapter_layer_names]
    left_out = tuple(f"{prefix}." for prefix in adapters)
    return {
        _WRAPPED.sub("", plain_name(name)): tensor
        for name, tensor in base.state_dict().items()
        if not name.startswith(left_out)
    }


def adapter_digest(model: nn.Module, adapter_name: str) -> str:
    """SHA-256 of an adapter's tensors, as `tensors_digest` has it of those in the adapter's file.

    Args:
        model: A model with PEFT's adapters around or in it.
        adapter_name: Which of them.
    """
    tensors: Mapping[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=False
    )
    return tensors_digest(unprefixed(tensors))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, dtypes, shapes and values, in whatever order they are given.

    Raises:
        ValueError: If a tensor is not in memory.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name].detach())
    return digest.hexdigest()


def facts_digest(**facts: Any) -> str:
    """SHA-256 of plain values by name.

    Args:
        facts: The values. One that JSON does not know counts by its type, a set by what is in it: the same in every
            process.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else type(value).__qualname__


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} is not in memory (on the meta device), so that nobody can tell what it is. Load it.")
    if hasattr(tensor, "__tensor_flatten__"):  # quantised: what it is made of
        for part in _parts(tensor):
            _add(digest, f"{name}.{part}", getattr(tensor, part))
        return
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    values = tensor.reshape(-1)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK].cpu().contiguous()
        digest.update(block.view(torch.uint8).numpy().data)


def _parts(tensor: Any) -> Iterable[str]:
    names, _ = tensor.__tensor_flatten__()
    return sorted(names)

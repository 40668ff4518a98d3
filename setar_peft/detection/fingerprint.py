"""What a model computes with, as a digest: the key under which its results may be kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from setar_peft.detection.adapters import AS_IT_IS


def fingerprint(model: nn.Module, adapter: str | None = AS_IT_IS) -> str:
    """SHA-256 of a model's weights and configuration as one of its adapters makes it compute, in hexadecimal.

    Other adapters do not count, nor does a wrapper: the base of a PEFT model is the stock model. A forward that was
    replaced by hand is not seen.

    Args:
        model: A stock model, or a PEFT model.
        adapter: Name of the adapter, None for the base without any, `AS_IT_IS` for those that are active.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    named = [] if adapter is None else [adapter]
    used = [name for name in (active_adapters(model) if adapter == AS_IT_IS else named) if name in configs]
    settings = {
        "type": type(base).__qualname__,
        "config": base.config.to_dict() if hasattr(base, "config") else None,
        "adapters": {name: configs[name].to_dict() for name in used},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    for name, tensor in _tensors(base, set(used), set(configs)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that compute, in whichever wrapper; none where they are disabled."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return list(dict.fromkeys(name for layer in layers if not layer.disable_adapters for name in layer.active_adapters))


def _tensors(base: nn.Module, used: set[str], known: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that compute, by their names in the stock model or beside it."""
    wrappers = {
        name for name, module in base.named_modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    for key, tensor in base.state_dict().items():
        parts = key.split(".")
        owner = next((depth for depth in range(1, len(parts)) if ".".join(parts[:depth]) in wrappers), None)
        if owner is not None:
            rest = parts[owner:]
            if rest[0] in ("base_layer", "original_module"):
                key = ".".join([*parts[:owner], *rest[1:]])
            elif not used & set(rest) and known & set(rest):
                continue
        if isinstance(tensor, Tensor):
            yield key, tensor


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor's values, as something that can be digested."""
    if tensor.is_meta:
        return b"meta"
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()

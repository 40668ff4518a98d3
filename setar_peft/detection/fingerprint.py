"""What a model computes with, as a digest: the key under which its results may be kept."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from setar_peft.backbones import base_of
from setar_peft.detection.adapters import AS_IT_IS, active_adapters
from setar_peft.hub.digests import adapter_digest, model_digest


def key_of(**facts: Any) -> str:
    """A digest of what something depends on, in hexadecimal.

    Args:
        facts: Plain values by name.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A value that JSON does not know, the same in every process: no address, and no order of a set."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else type(value).__qualname__


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
        found[variant] = key_of(
            type=type(base).__qualname__,
            config=base.config.to_dict() if hasattr(base, "config") else None,
            attention=getattr(getattr(base, "config", None), "_attn_implementation", None),
            weights=weights,
            adapters=[[name, configs[name].to_dict(), adapter_digest(model, name)] for name in named],
        )
    return found

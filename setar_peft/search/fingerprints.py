"""What a search is of: its settings, and digests of a model, its configuration, and a set of examples."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import transformers
from torch import Tensor, nn

from setar_peft.decomposition import tensor_digest
from setar_peft.objectives.base import Objective
from setar_peft.tuner.config import SeTARConfig
from setar_peft.versions import versions


def search_settings(config: SeTARConfig, objective: Any, model: nn.Module, data: str | None) -> dict[str, Any]:
    """Everything that a resumed search has to have in common with the one it continues, and the versions.

    Args:
        config: The search's config.
        objective: An `Objective`, of which the settings are taken, or a callable, of which only the name is known.
        model: The base: its values and its configuration are taken.
        data: A digest of the data, if they are known.

    Raises:
        ValueError: If the objective's settings are no plain values.
    """
    searched = {name: value for name, value in config.to_dict().items() if name in _SEARCH_FIELDS}
    named = getattr(objective, "__qualname__", type(objective).__qualname__)
    settings = {
        **searched,
        "objective": objective.settings() if isinstance(objective, Objective) else {"callable": named},
        "model": model_fingerprint(model),
        "model_config": model_configuration(model),
        "data": data,
        "versions": versions(),
    }
    try:
        # As they come out of a file: what is compared with them does.
        return dict(json.loads(json.dumps(plain_values(settings), allow_nan=False)))
    except TypeError as error:
        raise ValueError(
            f"settings() of {named} holds what a trace cannot: {error}. Give texts, numbers, lists and mappings."
        ) from error


_SEARCH_FIELDS = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("prune", "seed", "candidate_ratios", "search", "verify", "evaluations", "order", "passes", "criterion"),
)


def plain_values(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite, which JSON has none of, as texts."""
    if isinstance(value, dict):
        return {name: plain_values(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


_Item = TypeVar("_Item")

_MODULUS = 2**128


def model_fingerprint(model: nn.Module) -> str:
    """A digest of every parameter and buffer: names, shapes, dtypes and values."""
    state = model.state_dict()
    digests = in_threads(tensor_digest, state.values())
    return _combined(f"{name} {digest}" for name, digest in zip(state, digests, strict=True))


def model_configuration(model: nn.Module) -> dict[str, Any] | None:
    """What the configuration of a transformers model says of its computation; None where there is no configuration.

    Left out are where it came from, with which version, its dtype, which the fingerprint knows, and names of classes.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, transformers.PretrainedConfig):
        return None

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(part) for name, part in value.items() if not _says_nothing(name)}
        return value

    return dict(kept(json.loads(config.to_json_string(use_diff=False))))


def _says_nothing(name: str) -> bool:
    return name.startswith("_") or name in (
        *("transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id"),
    )


class SetFingerprint:
    """A digest of a set of labelled examples; neither their order nor how they are batched or sharded changes it."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, inputs: Mapping[str, Tensor], labels: Tensor) -> None:
        """Add a batch.

        Args:
            inputs: Tensors with one row an example.
            labels: (examples,).
        """

        def digest_of(index: int) -> str:
            return _combined(
                [str(int(labels[index])), *(tensor_digest(inputs[name][index]) for name in sorted(inputs))]
            )

        for digest in in_threads(digest_of, range(len(labels))):
            self.value = (self.value + int(digest, 16)) % _MODULUS

    @staticmethod
    def combined(values: list[int]) -> str:
        """The digest of the union of several processes' shards."""
        return f"{sum(values) % _MODULUS:032x}"


def in_threads(digest: Callable[[_Item], str], items: Iterable[_Item]) -> list[str]:
    """Digests of many things, in their order; hashing large buffers leaves other threads room to run."""
    with ThreadPoolExecutor(thread_name_prefix="setar_peft-digest") as pool:
        return list(pool.map(digest, items))


def _combined(parts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

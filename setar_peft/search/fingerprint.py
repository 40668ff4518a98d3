"""Fingerprints: what tells one model, or one set of images, from another when a search is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor, nn

from setar_peft.decomposition import tensor_digest

_Item = TypeVar("_Item")

_MODULUS = 2**128


def model_fingerprint(model: nn.Module) -> str:
    """A digest of every parameter and buffer: names, shapes, dtypes and values."""
    state = model.state_dict()
    digests = in_threads(tensor_digest, state.values())
    return _combined(f"{name} {digest}" for name, digest in zip(state, digests, strict=True))


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

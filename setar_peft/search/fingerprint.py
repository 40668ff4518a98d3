"""Fingerprints: what tells one model, or one set of images, from another when a search is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

_Item = TypeVar("_Item")
_Digest = TypeVar("_Digest")

_MODULUS = 2**128


def model_fingerprint(model: nn.Module) -> str:
    """A digest of every parameter and buffer: names, shapes, dtypes and values."""

    def digest_of(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        return _digest(f"{name} {tuple(tensor.shape)} {tensor.dtype}", [tensor])

    digest = hashlib.blake2b(digest_size=16)
    for part in in_threads(digest_of, model.state_dict().items()):
        digest.update(part)
    return digest.hexdigest()


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

        def digest_of(index: int) -> bytes:
            return _digest(str(int(labels[index])), [inputs[name][index] for name in sorted(inputs)])

        for digest in in_threads(digest_of, range(len(labels))):
            self.value = (self.value + int.from_bytes(digest, "big")) % _MODULUS

    @staticmethod
    def combined(values: list[int]) -> str:
        """The digest of the union of several processes' shards."""
        return f"{sum(values) % _MODULUS:032x}"


def in_threads(digest: Callable[[_Item], _Digest], items: Iterable[_Item]) -> list[_Digest]:
    """Digests of many things, in their order; hashing large buffers leaves other threads room to run."""
    with ThreadPoolExecutor(thread_name_prefix="setar_peft-digest") as pool:
        return list(pool.map(digest, items))


def _digest(label: str, tensors: Iterable[Tensor]) -> bytes:
    digest = hashlib.blake2b(label.encode(), digest_size=16)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()

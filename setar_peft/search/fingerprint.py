"""Fingerprints: what tells one model, or one set of images, from another when a search is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_MODULUS = 2**128


def model_fingerprint(model: nn.Module) -> str:
    """A digest of every parameter and buffer: names, shapes, dtypes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
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
        for index in range(len(labels)):
            digest = hashlib.blake2b(str(int(labels[index])).encode(), digest_size=16)
            for name in sorted(inputs):
                digest.update(_bytes(inputs[name][index]))
            self.value = (self.value + int.from_bytes(digest.digest(), "big")) % _MODULUS

    @staticmethod
    def combined(values: list[int]) -> str:
        """The digest of the union of several processes' shards."""
        return f"{sum(values) % _MODULUS:032x}"


def _bytes(tensor: Tensor) -> memoryview | bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""

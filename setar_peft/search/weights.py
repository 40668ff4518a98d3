"""Trying out weights: a module's weight is exchanged, never written to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class SwappableWeight:
    """The weight of one linear layer, which can be exchanged for the length of a search.

    The layer's parameter object itself is put aside and put back, so that what the search leaves behind is the same
    parameter with the same values.

    Args:
        name: Full name of the module.
        module: A `torch.nn.Linear` or transformers' `Conv1D`.

    Raises:
        ValueError: If the module is something else, or its weight is no plain parameter.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        if not isinstance(module, (nn.Linear, Conv1D)) or "weight" not in module._parameters:
            raise ValueError(
                f"{name} is a {type(module).__name__}; the search tries out weights of plain torch.nn.Linear and "
                "transformers' Conv1D layers. Search before quantising or adding adapters, or take it out of "
                "target_modules."
            )
        self.name = name
        self.module = module
        self._transposed = isinstance(module, Conv1D)
        self._original = module._parameters["weight"]

    @property
    def original(self) -> Tensor:
        """The untouched weight as a matrix W, (m, n)."""
        assert self._original is not None
        return self._oriented(self._original.detach())

    def set(self, matrix: Tensor) -> None:
        """Let the module compute with another matrix, (m, n), rounded to the weight's dtype."""
        weight = self._oriented(matrix).to(self.original.dtype)
        self.module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def restore(self) -> None:
        """Put the original parameter back."""
        self.module._parameters["weight"] = self._original

    @contextmanager
    def holding(self, matrix: Tensor) -> Iterator[None]:
        """Compute with another matrix, (m, n), and go back to the present one."""
        present = self.module._parameters["weight"]
        self.set(matrix)
        try:
            yield
        finally:
            self.module._parameters["weight"] = present

    def _oriented(self, matrix: Tensor) -> Tensor:
        return matrix.T if self._transposed else matrix

"""A search that runs out of memory goes on with half the batch, and takes the same decisions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from setar_peft.decomposition import Residual
from setar_peft.losses import LossValues
from setar_peft.search.evaluate import Evaluator, Progress

_Value = TypeVar("_Value")


class SmallerBatches:
    """An evaluator that is built again, with half the largest batch, when it runs out of memory.

    Args:
        build: `largest batch -> evaluator`; None leaves the batches as the objective makes them.
    """

    def __init__(self, build: Callable[[int | None], Evaluator]) -> None:
        self._build = build
        self._chosen: dict[str, float] = {}
        self._largest: int | None = None
        self._evaluator = self._retrying(lambda: build(self._largest))

    @property
    def residuals(self) -> dict[str, Residual]:
        """The removed components of the layers that are truncated at present, by module name."""
        return self._evaluator.residuals

    @property
    def data_fingerprint(self) -> str | None:
        """A digest of the data, where the evaluator knows them."""
        return self._evaluator.data_fingerprint

    def initial(self) -> LossValues:
        """Losses of the model as it is."""
        return self._retrying(lambda: self._evaluator.initial())

    def losses(self, layer: str, ratios: Sequence[float], progress: Progress) -> list[LossValues]:
        """Losses with one layer truncated by each of the ratios."""
        return self._retrying(lambda: self._evaluator.losses(layer, ratios, progress))

    def choose(self, layer: str, rank_ratio: float) -> None:
        """Truncate a layer for all later evaluations."""
        self._chosen[layer] = rank_ratio
        self._evaluator.choose(layer, rank_ratio)

    def restore(self) -> None:
        """Put every original weight back."""
        self._evaluator.restore()

    def _retrying(self, compute: Callable[[], _Value]) -> _Value:
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError as error:  # noqa: PERF203 - the loop is the retrying
                self._halve(error)

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        evaluator = getattr(self, "_evaluator", None)
        present = evaluator.batch_size if evaluator is not None else self._largest
        if present is None or present <= 1:
            raise error
        self._largest = present // 2
        warnings.warn(
            f"Out of memory with {present} images a batch; the search goes on with {self._largest}.",
            RuntimeWarning,
            stacklevel=4,
        )
        self.restore()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._evaluator = self._build(self._largest)
        for layer, ratio in self._chosen.items():
            self._evaluator.choose(layer, ratio)

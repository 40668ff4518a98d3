"""A search that runs out of memory goes on with half the batch, and takes the same decisions."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from setar_peft.decomposition import Residual
from setar_peft.losses import LossValues
from setar_peft.search.evaluate import Evaluator, Progress
from setar_peft.search.processes import OutOfMemoryElsewhere, Processes

_Value = TypeVar("_Value")


class SmallerBatches:
    """An evaluator that is built again, with half the largest batch, when it or another process runs out of memory.

    Args:
        build: `largest batch -> evaluator`; None leaves the batches as the objective makes them.
        processes: Those that take part in the search: all halve, or none.
    """

    def __init__(self, build: Callable[[int | None], Evaluator], processes: Processes) -> None:
        self._build = build
        self._processes = processes
        self._chosen: dict[str, float] = {}
        self._largest: int | None = None
        self._present: Evaluator | None = None
        self._retrying(lambda: self._evaluator)

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
        self._retrying(lambda: self._evaluator.choose(layer, rank_ratio))
        self._chosen[layer] = rank_ratio

    def restore(self) -> None:
        """Put every original weight back."""
        if self._present is not None:
            self._present.restore()

    @property
    def _evaluator(self) -> Evaluator:
        if self._present is None:
            self._present = self._build(self._largest)
            for layer, ratio in self._chosen.items():
                self._present.choose(layer, ratio)
        return self._present

    def _retrying(self, compute: Callable[[], _Value]) -> _Value:
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError as error:  # noqa: PERF203 - the loop is the retrying
                if not isinstance(error, OutOfMemoryElsewhere):
                    self._processes.tell_out_of_memory()
                # What the interrupted frames hold would otherwise stay in memory beside what replaces it.
                traceback.clear_frames(error.__traceback__)
                self._halve(error)

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        present = self._largest if self._present is None else self._present.batch_size
        present = max(size or 0 for size in self._processes.gathered(present))
        if present <= 1:
            raise error
        self._largest = present // 2
        warnings.warn(
            f"Out of memory with {present} images a batch; the search goes on with {self._largest}.",
            RuntimeWarning,
            stacklevel=4,
        )
        self.restore()
        self._present = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

"""How the loss of a candidate is computed, and by how much it is predicted to change: of a callable, in full."""

from __future__ import annotations

import math
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from setar_peft.backbones import Backbone
from setar_peft.backbones.untouched import left_as_it_was
from setar_peft.decomposition import Residual
from setar_peft.objectives.base import Objective
from setar_peft.objectives.loss import LossValues
from setar_peft.processes import OutOfMemoryElsewhere, Processes
from setar_peft.search.decisions import Prediction
from setar_peft.search.plan import Costs
from setar_peft.search.weights import TruncatedLayers

# Called once for each candidate and batch, with the ratio and the share of the layer's work now done.
Progress = Callable[[float, float], None]


class Evaluator(TruncatedLayers, ABC):
    """Computes losses of a model with layers truncated.

    Attributes:
        data_fingerprint: A digest of the data, where the evaluator knows them.
        batch_size: Images or prompts in the largest batch, where there are batches.
        costs: What `present` took when it was last called.
    """

    data_fingerprint: str | None = None
    batch_size: int | None = None
    costs: Costs

    @abstractmethod
    def present(self) -> LossValues:
        """Losses with the layers truncated that are at present."""

    @abstractmethod
    def losses(self, layer: str, ratios: Sequence[float], progress: Progress) -> list[LossValues]:
        """Losses with one layer truncated by each of the ratios."""

    @abstractmethod
    def gradients(self, criterion: str) -> dict[str, Tensor]:
        """The gradient of what is minimised by each layer's weight, with the layers truncated that are at present.

        Returns:
            Layer -> (m, n), in float32 or better.

        Raises:
            ValueError: If there is no gradient.
        """

    def predictions(
        self, criterion: str, candidates: Mapping[str, Sequence[float]]
    ) -> dict[str, dict[float, Prediction]]:
        """What each layer's candidates, and its whole weight, are predicted to change against its present ratio.

        Args:
            criterion: "total", "id" or "ood".
            candidates: Layer -> ratios, each above 0.

        Returns:
            Layer -> ratio, 0 included -> prediction.

        Raises:
            ValueError: If there is no gradient, it is not finite, or it is 0 for every layer.
        """
        try:
            gradients = self.gradients(criterion)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what ran without a gradient before
            raise ValueError(
                f"The gradient of the objective cannot be computed ({str(error).splitlines()[0]}). It has to be one "
                "real number, by operations that have a derivative, with nothing on the way written in place or kept "
                "for the next batch, and without backward() of its own. Or search with search='greedy' (--search "
                "greedy)."
            ) from error
        if not any(gradient.any() for gradient in gradients.values()):
            raise ValueError(
                "The gradient of the objective is 0 for every layer: it does not depend on their weights, or by counts "
                "alone, which have no gradient. Search with search='greedy' (--search greedy)."
            )
        predictions = {}
        for layer, ratios in candidates.items():
            predictions[layer] = self.predicted(layer, gradients.pop(layer), (0.0, *ratios))
        bad = [
            layer
            for layer, of_layer in predictions.items()
            if not all(math.isfinite(prediction.change) for prediction in of_layer.values())
        ]
        if bad:
            raise ValueError(
                f"The gradient of {bad[0]} holds NaN or infinity ({len(bad)} of {len(predictions)} layers), or is too "
                "large for a product with the weight, so it predicts nothing. Search with search='greedy' (--search "
                "greedy), which needs no gradient."
            )
        return predictions


class FullEvaluator(Evaluator):
    """A plain callable objective: the model is evaluated in full for each candidate, since nothing is known of it.

    Each evaluation begins with the same model and the same state of the random generators, whatever the last one did.
    """

    def __init__(self, objective: Callable[[nn.Module], float], model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self._objective = objective

    def present(self) -> LossValues:
        """What the objective says of the model as it is."""
        start = time.perf_counter()
        losses = self._losses()
        self.costs = Costs({}, time.perf_counter() - start)
        return losses

    def losses(self, layer: str, ratios: Sequence[float], progress: Progress) -> list[LossValues]:
        """What the objective says of the model with one layer truncated by each of the ratios."""
        losses = []
        for done, (ratio, matrix) in enumerate(zip(ratios, self.matrices(layer, ratios), strict=True), 1):
            with self.weights[layer].holding(matrix):
                losses.append(self._losses())
            progress(ratio, done / len(ratios))
        return losses

    def gradients(self, criterion: str) -> dict[str, Tensor]:
        """The gradient of the tensor that the objective returns, in the weights' dtype and then in float32."""
        del criterion  # a callable has one value
        with left_as_it_was(self.model, by_anything=True), self.as_leaves() as leaves, torch.enable_grad():
            value: Any = self._objective(self.model)
            if not isinstance(value, Tensor) or not value.requires_grad:
                what = "a tensor without a gradient" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ValueError(
                    f"The objective returned {what}, and a screened search follows its gradient. Return a tensor that "
                    "was computed from the model's weights, outside torch.no_grad() and without float(); or search "
                    "with search='greedy' (--search greedy); or give an Objective itself, if the callable calls one."
                )
            if value.numel() != 1:
                raise _no_number(value)
            found = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
        gradients = {}
        for (layer, leaf), gradient in zip(leaves.items(), found, strict=True):
            gradient = torch.zeros_like(leaf) if gradient is None else gradient
            gradients[layer] = self.weights[layer].oriented(
                gradient if gradient.dtype == torch.float64 else gradient.float()
            )
        return gradients

    def _losses(self) -> LossValues:
        with left_as_it_was(self.model, by_anything=True):
            value: Any = self._objective(self.model)
            try:
                return LossValues(float(value.detach() if isinstance(value, Tensor) else value))
            except (TypeError, ValueError, RuntimeError):
                raise _no_number(value) from None


def _no_number(value: object) -> ValueError:
    return ValueError(f"The objective returned {value!r}; a callable objective returns one number, which is minimised.")


def largest_batch(objective: Any, backbone: Backbone | None, processes: Processes) -> int:
    """Images or prompts in the first batch that an objective makes for this process; 1 for a callable."""
    if not isinstance(objective, Objective) or backbone is None:
        return 1
    if processes.count > 1:
        objective = objective.shard(processes.index, processes.count)
    images = next((len(labels) for _, labels in objective.batches()), 1)
    if not backbone.needs_prompts:
        return images
    prompts = len(objective.class_tokens(backbone)["input_ids"])
    return max(images, min(prompts, objective.prompt_batch_size or backbone.prompts_at_once))


_Value = TypeVar("_Value")


class SmallerBatches:
    """An evaluator that is built again, with half the largest batch, when it or another process runs out of memory.

    Args:
        build: `largest batch -> evaluator`; None leaves the batches as the objective makes them.
        processes: Those that take part in the search: all halve, or none.
        largest: The largest batch as the objective makes them; asked for where the first evaluator cannot be built.
    """

    def __init__(
        self, build: Callable[[int | None], Evaluator], processes: Processes, largest: Callable[[], int]
    ) -> None:
        self._build = build
        self._unhalved = largest
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

    @property
    def costs(self) -> Costs:
        """What `present` took when it was last called."""
        return self._evaluator.costs

    def present(self) -> LossValues:
        """Losses with the layers truncated that are at present."""
        return self._retrying(lambda: self._evaluator.present())

    def losses(self, layer: str, ratios: Sequence[float], progress: Progress) -> list[LossValues]:
        """Losses with one layer truncated by each of the ratios."""
        return self._retrying(lambda: self._evaluator.losses(layer, ratios, progress))

    def predictions(
        self, criterion: str, candidates: Mapping[str, Sequence[float]]
    ) -> dict[str, dict[float, Prediction]]:
        """What each layer's candidates are predicted to change: what the first process finds holds for all."""
        found = self._retrying(lambda: self._evaluator.predictions(criterion, candidates))
        return self._processes.gathered(found)[0]

    def choose(self, layer: str, rank_ratio: float) -> None:
        """Truncate a layer for all later evaluations, if it is not so truncated already."""
        if self._chosen.get(layer, 0.0) == rank_ratio:
            return
        self._retrying(lambda: self._evaluator.choose(layer, rank_ratio))
        self._chosen[layer] = rank_ratio

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
        present = self._largest or self._unhalved() if self._present is None else self._present.batch_size
        present = max(size or 0 for size in self._processes.gathered(present))
        if present <= 1:
            raise error
        self._largest = present // 2
        warnings.warn(
            f"Out of memory with {present} images or prompts a batch; the search goes on with {self._largest}.",
            RuntimeWarning,
            stacklevel=4,
        )
        if self._present is not None:
            self._present.restore()
        self._present = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

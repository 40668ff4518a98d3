"""How the loss of a candidate is computed: by replay through a backbone's towers, or by a callable, in full."""

from __future__ import annotations

import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from setar_peft.backbones import Backbone, ClassWeights, ImageFeatures, Tower, TowerInput, named_inputs
from setar_peft.backbones.untouched import left_as_it_was
from setar_peft.decomposition import Residual
from setar_peft.objectives.base import Objective
from setar_peft.objectives.loss import LossValues
from setar_peft.processes import OutOfMemoryElsewhere, Processes
from setar_peft.search.plan import Costs
from setar_peft.search.recording import MemoryBudget, Recording
from setar_peft.search.replay import SharedPrefix
from setar_peft.search.trace import SetFingerprint
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

    def _losses(self) -> LossValues:
        with left_as_it_was(self.model, by_anything=True):
            value: Any = self._objective(self.model)
            try:
                return LossValues(float(value))
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(
                    f"The objective returned {value!r}; a callable objective returns one number, which is minimised."
                ) from None


class ReplayEvaluator(Evaluator):
    """An `Objective` on a backbone: nothing that a candidate leaves unchanged is computed for it.

    The blocks below the searched layer are replayed from a recording, what runs before the layer within its block is
    shared between candidates, and the other tower's features are kept until that tower changes.
    """

    def __init__(
        self,
        objective: Objective,
        backbone: Backbone,
        *args: Any,
        recording_memory: float | None = None,
        processes: Processes | None = None,
        largest_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone.model, *args, **kwargs)
        self._largest_batch = largest_batch
        self._objective = objective
        self._backbone = backbone
        self._device = backbone.device
        self._processes = processes or Processes(self._device)
        self._budget = MemoryBudget(self._device, recording_memory)
        self._labels: list[Tensor] = []
        self._data = SetFingerprint()
        # The images, or the texts where texts are classified.
        self._images = self._record(backbone.input_tower, self._image_inputs())
        self._prompts = None
        if backbone.needs_prompts:
            self._prompts = self._record("text", self._prompt_inputs())
        self._class_weights: ClassWeights | None = None
        self.data_fingerprint = SetFingerprint.combined(self._processes.gathered(self._data.value))
        self.batch_size = max(self._images.largest_batch, self._prompts.largest_batch if self._prompts else 1)

    def present(self) -> LossValues:
        """Losses with the layers truncated that are at present; on the way the towers' hidden states are recorded."""
        start = self._now()
        classes = self._classes()
        of_prompts = self._now() - start
        of_images = of_loss = 0.0
        sums = self._zeros(1)
        for batch, labels in enumerate(self._labels):
            start = self._now()
            features = self._embedded(self._images.features(batch))
            middle = self._now()
            sums[0] += self._objective.sums(features, classes, labels)
            of_images, of_loss = of_images + middle - start, of_loss + self._now() - middle
        passes = {self._images.tower.name: of_images / len(self._images.tower.blocks)}
        if self._prompts is not None:
            passes[self._prompts.tower.name] = of_prompts / len(self._prompts.tower.blocks)
        self.costs = Costs(passes, of_loss)
        return self._objective.values(self._processes.total(sums)[0])

    def losses(self, layer: str, ratios: Sequence[float], progress: Progress) -> list[LossValues]:
        """Losses with one layer truncated by each of the ratios."""
        matrices = list(self.matrices(layer, ratios))
        is_of_images = self._backbone.locate(layer).tower == self._backbone.input_tower
        evaluate = self._image_sums if is_of_images else self._prompt_sums
        sums = self._processes.total(evaluate(layer, ratios, matrices, progress))
        return [self._objective.values(candidate) for candidate in sums]

    def choose(self, layer: str, rank_ratio: float) -> None:
        """Truncate a layer for all later evaluations, and forget what was computed with its old weight."""
        super().choose(layer, rank_ratio)
        location = self._backbone.locate(layer)
        if location.tower == self._backbone.input_tower:
            self._images.forget_above(location.level)
        else:
            assert self._prompts is not None
            self._prompts.forget_above(location.level)
            self._class_weights = None

    def _image_sums(
        self, layer: str, ratios: Sequence[float], matrices: Sequence[Tensor], progress: Progress
    ) -> Tensor:
        classes = self._classes()
        sums = self._zeros(len(ratios))
        for batch, labels in enumerate(self._labels):
            for index, outputs in enumerate(self._candidates(self._images, batch, layer, matrices)):
                sums[index] += self._objective.sums(self._embedded(outputs), classes, labels)
                share = (batch * len(ratios) + index + 1) / (len(self._labels) * len(ratios))
                progress(ratios[index], share)
        return sums

    def _prompt_sums(
        self, layer: str, ratios: Sequence[float], matrices: Sequence[Tensor], progress: Progress
    ) -> Tensor:
        assert self._prompts is not None
        features: list[list[Tensor]] = [[] for _ in ratios]
        for batch in range(len(self._prompts)):
            for index, outputs in enumerate(self._candidates(self._prompts, batch, layer, matrices)):
                features[index].append(outputs[0])
        candidates = [self._backbone.class_weights(torch.cat(parts)) for parts in features]
        sums = self._zeros(len(ratios))
        images = self._features()
        for batch, (image_features, labels) in enumerate(zip(images, self._labels, strict=True)):
            for index, classes in enumerate(candidates):
                sums[index] += self._objective.sums(image_features, classes, labels)
                share = (batch * len(ratios) + index + 1) / (len(self._labels) * len(ratios))
                progress(ratios[index], share)
        return sums

    def _candidates(
        self, recording: Recording, batch: int, layer: str, matrices: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, ...]]:
        """The tower's features of one batch with each of the candidate weights."""
        tower = recording.tower
        level = self._backbone.locate(layer).level
        hidden = recording.input_at(batch, min(level, len(tower.blocks) - 1))
        weight = self.weights[layer]
        prefix = SharedPrefix(tower.modules_at(level), weight.module)
        for index, matrix in enumerate(matrices):
            with weight.holding(matrix), prefix.record() if index == 0 else prefix.replay():
                outputs = _features_from(tower, recording.entry(batch), level, hidden)
            yield outputs

    def _features(self) -> Iterator[ImageFeatures]:
        for batch in range(len(self._images)):
            yield self._embedded(self._images.features(batch))

    def _classes(self) -> ClassWeights:
        if self._class_weights is None:
            text = None
            if self._prompts is not None:
                text = torch.cat([self._prompts.features(batch)[0] for batch in range(len(self._prompts))])
            self._class_weights = self._backbone.class_weights(text)
        return self._class_weights

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _zeros(self, candidates: int) -> Tensor:
        exact = torch.float32 if self._device.type == "mps" else torch.float64
        return torch.zeros(candidates, self._objective.sums_size, dtype=exact, device=self._device)

    def _embedded(self, outputs: Sequence[Tensor]) -> ImageFeatures:
        return self._backbone.embedded(ImageFeatures(*outputs))

    def _record(self, tower: str, inputs: Iterable[Mapping[str, Tensor]]) -> Recording:
        return Recording(self._backbone.towers[tower], inputs, self._device, self._budget)

    def _image_inputs(self) -> Iterator[Mapping[str, Tensor]]:
        objective = self._objective
        if self._processes.count > 1:
            objective = objective.shard(self._processes.index, self._processes.count)
        for batch, batch_labels in objective.batches():
            inputs = named_inputs(batch)
            self._backbone.check(inputs)
            self._data.add(inputs, batch_labels)
            size = self._largest_batch or len(batch_labels)
            for start in range(0, len(batch_labels), size):
                part = slice(start, start + size)
                self._labels.append(batch_labels[part].to(self._device))
                yield {name: values[part] for name, values in inputs.items()}

    def _prompt_inputs(self) -> Iterator[dict[str, Tensor]]:
        tokens = self._objective.class_tokens(self._backbone)
        size = self._objective.prompt_batch_size or self._backbone.prompts_at_once
        size = min(size, self._largest_batch or size)
        for start in range(0, len(tokens["input_ids"]), size):
            yield {key: value[start : start + size] for key, value in tokens.items()}


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


def _features_from(tower: Tower, entry: TowerInput, level: int, hidden: Tensor) -> tuple[Tensor, ...]:
    """The tower's features from the input of block `level` (of the last block, for a level above it)."""
    for current in range(level, len(tower.blocks) - 1):
        hidden = tower.step(entry, current, hidden)
    return tower.finish(entry, hidden)


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

    def choose(self, layer: str, rank_ratio: float) -> None:
        """Truncate a layer for all later evaluations."""
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

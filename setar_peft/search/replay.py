"""An objective on a backbone: nothing that a candidate leaves unchanged is computed for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from setar_peft.backbones import Backbone, ClassWeights, ImageFeatures, Tower, TowerInput, named_inputs
from setar_peft.backbones.untouched import attributes_put_back
from setar_peft.objectives.base import Objective
from setar_peft.objectives.loss import LossValues
from setar_peft.processes import Processes
from setar_peft.search.evaluate import Evaluator, Progress
from setar_peft.search.fingerprints import SetFingerprint
from setar_peft.search.plan import Costs, lowest_levels
from setar_peft.search.prefix import SharedPrefix
from setar_peft.search.recording import MemoryBudget, Recording

# Share of a host's memory that the graph of one batch leaves free.
_LEAST_FREE = 0.05


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
        # Of all images with the layers truncated that are at present, once that was computed.
        self._sums: Tensor | None = None
        self._lowest = lowest_levels(backbone, map(backbone.locate, self.weights))
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
        self._sums = self._processes.total(sums)[0]
        return self._objective.values(self._sums)

    def losses(self, layer: str, ratios: Sequence[float], progress: Progress) -> list[LossValues]:
        """Losses with one layer truncated by each of the ratios."""
        matrices = list(self.matrices(layer, ratios))
        is_of_images = self._backbone.locate(layer).tower == self._backbone.input_tower
        evaluate = self._image_sums if is_of_images else self._prompt_sums
        sums = self._processes.total(evaluate(layer, ratios, matrices, progress))
        return [self._objective.values(candidate) for candidate in sums]

    def gradients(self, criterion: str) -> dict[str, Tensor]:
        """The gradient of the loss or a part of it by each layer's weight, summed over batches and processes.

        A tower takes part from its lowest searched block on. What the text tower's layers do is passed on by the class
        weights, whose gradient is summed over all images first. A half-precision model computes in float32 meanwhile.

        Returns:
            Layer -> (m, n), float32, or float64 for a model that is.
        """
        if self._sums is None:
            self.present()
        assert self._sums is not None
        slope, at_present = self._objective.slope(self._sums, criterion), self._classes()
        text = None
        if self._prompts is not None and self._prompts.tower.name in self._lowest:
            # By the model as it is: there may be no room to keep them, so that they are computed here.
            text = torch.cat([self._prompts.features(batch)[0].float() for batch in range(len(self._prompts))])
        with self._leaves() as leaves, torch.enable_grad():
            inputs: list[Tensor] = list(leaves.values())
            classes = at_present
            if text is not None:
                of_text = self._backbone.class_weights(text.requires_grad_())
                classes = of_text._replace(weight=of_text.weight.detach().requires_grad_())
                inputs.append(classes.weight)
            followed = self._zeros(1)[0, 0]
            for batch, labels in enumerate(self._labels):
                features = self._embedded(self._differentiable(self._images, batch))
                sums = self._objective.sums(features, classes, labels)
                # Of a batch in which nothing counts they may be constants.
                if sums.requires_grad:
                    torch.autograd.backward((sums * slope.to(sums)).sum(), inputs=inputs)
                    followed += 1
            if not self._processes.total(followed):
                raise ValueError(
                    f"{type(self._objective).__name__}.sums gives numbers without a gradient, and a screened "
                    "search follows it. Compute them from features and classes in torch, without detach() and "
                    "float(), or search with search='greedy' (--search greedy)."
                )
            if text is not None and classes.weight.grad is not None:
                (of_prompts,) = torch.autograd.grad(of_text.weight, text, classes.weight.grad)
                self._pass_on(of_prompts, list(leaves.values()))
        gradients = {}
        for layer, leaf in leaves.items():
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            gradients[layer] = self.weights[layer].oriented(self._processes.total(gradient))
        return gradients

    def _pass_on(self, of_prompts: Tensor, leaves: list[nn.Parameter]) -> None:
        """Pass a gradient by the prompts' features, (classes, d), on to the text tower's weights."""
        assert self._prompts is not None
        start = 0
        for batch in range(len(self._prompts)):
            features = self._differentiable(self._prompts, batch)[0]
            gradient = of_prompts[start : start + len(features)].to(features.dtype)
            torch.autograd.backward(features, gradient, inputs=leaves)
            start += len(features)

    def _differentiable(self, recording: Recording, batch: int) -> tuple[Tensor, ...]:
        """A tower's features of one batch, with a graph from its lowest searched block on, if it has one."""
        tower = recording.tower
        if tower.name not in self._lowest:
            return recording.features(batch)
        level = self._lowest[tower.name]
        entry = recording.entry(batch)
        args, kwargs, hidden = tree_map(_in_float32, (entry.args, entry.kwargs, recording.input_at(batch, level)))
        return _features_from(tower, replace(entry, args=args, kwargs=kwargs), level, hidden, self._check_room)

    def _check_room(self) -> None:
        """Run out of memory before the system does: on a CPU nothing else ends a graph that grows too large.

        Raises:
            torch.OutOfMemoryError: If little host memory is left; smaller batches have smaller graphs.
        """
        memory = psutil.virtual_memory()
        if self._device.type == "cpu" and memory.available < _LEAST_FREE * memory.total:
            raise torch.OutOfMemoryError(
                f"The graph of one batch leaves {memory.available / 2**30:.1f} GiB of {memory.total / 2**30:.1f} free."
            )

    @contextmanager
    def _leaves(self) -> Iterator[dict[str, nn.Parameter]]:
        """Compute with leaves of autograd in the layers' place and nothing else that takes a gradient, in float32."""
        modules = [
            module
            for name, lowest in self._lowest.items()
            for level in range(lowest, len(self._backbone.towers[name].blocks) + 1)
            for part in self._backbone.towers[name].parts(level).values()
            for module in part.modules()
        ]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with attributes_put_back(modules, ["_parameters", "_buffers"]):
            try:
                self.model.requires_grad_(False)
                for held in (held for module in modules for held in (module._parameters, module._buffers)):
                    for name, tensor in held.items():
                        held[name] = _in_float32(tensor)
                with self.as_leaves() as leaves:
                    yield leaves
            finally:
                for parameter in trained:
                    parameter.requires_grad_(True)

    def choose(self, layer: str, rank_ratio: float) -> None:
        """Truncate a layer for all later evaluations, and forget what was computed with its old weight."""
        super().choose(layer, rank_ratio)
        self._sums = None
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
            records = index == 0 and len(matrices) > 1
            with weight.holding(matrix), prefix.record() if records else prefix.replay():
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


def _in_float32(value: Any) -> Any:
    """A tensor in half precision in float32; everything else as it is."""
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


def _features_from(
    tower: Tower, entry: TowerInput, level: int, hidden: Tensor, before_block: Callable[[], None] = lambda: None
) -> tuple[Tensor, ...]:
    """The tower's features from the input of block `level` (of the last block, for a level above it)."""
    for current in range(level, len(tower.blocks) - 1):
        before_block()
        hidden = tower.step(entry, current, hidden)
    before_block()
    return tower.finish(entry, hidden)

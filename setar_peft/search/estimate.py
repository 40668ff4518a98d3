"""What a search will cost, before it starts: work by count, memory by size, time by a probe of two batches."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from setar_peft.backbones import Backbone, ClassWeights, named_inputs
from setar_peft.backbones.activations import fuse_activations
from setar_peft.backbones.untouched import left_as_it_was
from setar_peft.decomposition import residual_rank
from setar_peft.objectives.base import Objective
from setar_peft.processes import Processes
from setar_peft.search.passes import block_passes
from setar_peft.search.plan import SearchPlan, plan_search
from setar_peft.search.prefix import SharedPrefix
from setar_peft.search.recording import MemoryBudget
from setar_peft.search.replay import ReplayEvaluator
from setar_peft.tuner.config import SeTARConfig


@dataclass(frozen=True)
class CostEstimate:
    """What a search will cost at most; sharing within a block and early ends make it cheaper.

    Attributes:
        images: Images (or texts) of the objective.
        classes: Classes.
        layers: Layers searched.
        evaluations: Candidates evaluated; in the order "joint" whole rounds, of which the usual number is assumed.
        gradients: How often the gradient by all layers is computed; 0 for a search that needs none.
        block_passes: Passes of the whole set through one block, by tower.
        backward_passes: Passes back through one block, by tower, each of about twice the work.
        flops: Floating-point operations of those passes and of the towers' ends.
        recorded_bytes: Hidden states and features that the recordings would hold with room for all of them.
        kept_bytes: Those that they will hold in memory, within `recording_memory`; the rest is computed again.
        disk_bytes: Hidden states that stand for the images and go to a temporary file, where there is no room.
        weight_bytes: Decompositions, truncated weights and removed components held at once.
        activation_bytes: What one batch takes on its way through the towers and the loss.
        gradient_bytes: What one batch's graph and the layers' gradients take, where there are gradients.
        seconds: Predicted time on this machine.
    """

    images: int
    classes: int
    layers: int
    evaluations: int
    gradients: int
    block_passes: dict[str, int]
    backward_passes: dict[str, int]
    flops: float
    recorded_bytes: int
    kept_bytes: int
    disk_bytes: int
    weight_bytes: int
    activation_bytes: int
    gradient_bytes: int
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """The most memory that the tensors of a search take above the model's, on the device and the host together."""
        return self.kept_bytes + self.weight_bytes + max(self.activation_bytes, self.gradient_bytes)

    def table(self) -> str:
        """The estimate as lines of text."""
        passes, back = (
            ", ".join(f"{tower} {count}" for tower, count in counted.items())
            for counted in (self.block_passes, self.backward_passes)
        )
        lines = {
            "images": f"{self.images}",
            "classes": f"{self.classes}",
            "layers": f"{self.layers}",
            "candidates": f"{self.evaluations}",
            "block passes": passes,
            **({"gradients": f"{self.gradients}, with {back} block passes back"} if self.gradients else {}),
            "operations": f"{self.flops:.3g} FLOP",
            "recordings": f"{_size(self.kept_bytes)} of {_size(self.recorded_bytes)} kept",
            "disk": f"{_size(self.disk_bytes)} for a while, of hidden states that stand for the images",
            "memory": f"at most {_size(self.peak_bytes)} above the model's",
            "time": f"about {_duration(self.seconds)}",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:>{width}}  {value}" for name, value in lines.items())

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, and the peak of memory."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}


def estimate_cost(model: nn.Module, objective: Objective, config: SeTARConfig | None = None) -> CostEstimate:
    """Predict the cost of `search_rank_ratios` with the same arguments; the model is left as it was.

    Two batches are run through the towers: the first warms up, the second is timed. For a screened search the gradient
    is computed on the first, twice where there are several, to see its memory.

    Args:
        model: A model of a known family, without adapters.
        objective: An `Objective`.
        config: As for the search.

    Raises:
        ValueError: As the search does, or if the objective is a plain callable, whose cost nothing is known of.
    """
    config = SeTARConfig() if config is None else config
    plan = plan_search(model, objective, config)
    if not isinstance(objective, Objective) or plan.backbone is None:
        raise ValueError("The cost of a callable objective cannot be predicted; give an Objective.")
    with left_as_it_was(model):
        fuse_activations(model)
        return _estimate(plan, plan.backbone, objective, config)


@dataclass(frozen=True)
class _TowerCost:
    """What one pass of all rows costs, and what is kept of them; the activations are those of a single batch."""

    depth: int
    block_flops: float
    block_seconds: float
    end_seconds: float
    level_bytes: int
    feature_bytes: int
    activation_bytes: int


def _estimate(plan: SearchPlan, backbone: Backbone, objective: Objective, config: SeTARConfig) -> CostEstimate:
    device = backbone.device
    batches = [(named_inputs(inputs), labels) for inputs, labels in islice(objective.batches(), 2)]
    for inputs, _ in batches:
        backbone.check(inputs)
    images = len(objective) if hasattr(objective, "__len__") else sum(len(labels) for _, labels in objective.batches())
    costs = {
        backbone.input_tower: _probe(backbone, plan, backbone.input_tower, [batch for batch, _ in batches], images)
    }
    if backbone.needs_prompts:
        tokens = objective.class_tokens(backbone)
        at_once = objective.prompt_batch_size or backbone.prompts_at_once
        batch = {name: value[:at_once] for name, value in tokens.items()}
        costs["text"] = _probe(backbone, plan, "text", [batch, batch], len(tokens["input_ids"]))
    loss_seconds, loss_bytes, class_weights = _probe_loss(backbone, objective, batches[-1], images)

    passes = block_passes(plan, {name: cost.depth for name, cost in costs.items()})
    # On the way back activations and weights each take what the way there takes.
    work = {name: count + 2 * passes.backward[name] for name, count in passes.count.items()}
    flops = sum(costs[name].block_flops * count for name, count in work.items())
    seconds = sum(costs[name].block_seconds * count for name, count in work.items())
    seconds += (plan.evaluations() + 3 * plan.rounds) * loss_seconds
    seconds += _seconds_of_ends(plan, {name: cost.end_seconds for name, cost in costs.items()})
    budget = MemoryBudget(device, config.recording_memory)
    room = int(min(budget.left, 2**62))
    recorded = sum(cost.level_bytes * cost.depth + cost.feature_bytes for cost in costs.values())
    entries = sum(cost.level_bytes for cost in costs.values())
    most = max(map(len, plan.candidates.values()))
    if backbone.needs_prompts:  # the candidates' class weights, as they come out of the tower and in float32
        loss_bytes += most * (costs["text"].feature_bytes + _bytes([class_weights.weight]))
    return CostEstimate(
        images,
        len(class_weights.weight),
        len(plan.locations),
        plan.evaluations(),
        plan.rounds,
        passes.count,
        passes.backward,
        flops,
        recorded,
        int(budget.takes_at_most(recorded)),
        max(0, entries - room),
        _weight_bytes(plan, backbone.model),
        max(cost.activation_bytes for cost in costs.values()) + loss_bytes,
        _gradient_bytes(plan, backbone, objective, config, len(batches)) if plan.is_screened else 0,
        seconds,
    )


def _seconds_of_ends(plan: SearchPlan, of_one: Mapping[str, float]) -> float:
    """Seconds of the towers' ends, which every candidate goes through, from those of one by tower."""
    if plan.order == "joint":
        return plan.evaluations() * sum(of_one.values())
    if plan.order == "best_first":
        return plan.evaluations() * max(of_one.values())
    return sum(of_one[plan.locations[layer].tower] * plan.tried(layer) * plan.passes for layer in plan.locations)


def _gradient_bytes(
    plan: SearchPlan, backbone: Backbone, objective: Objective, config: SeTARConfig, batches: int
) -> int:
    """What the gradient takes, seen on the first batch: its graph, the prompts', and the layers' gradients.

    Where there are several batches that one comes twice: the gradients of those before stand beside its graph.
    """
    first = copy.copy(objective)
    first.batches = lambda: (batch for batch in islice(objective.batches(), 1) for _ in range(batches))  # type: ignore[method-assign]
    evaluator = ReplayEvaluator(
        first,
        backbone,
        list(plan.locations),
        config.prune,
        config.seed,
        keep_decompositions=True,
        processes=Processes(backbone.device, alone=True),
    )
    evaluator.present()
    with PeakMemory() as memory:
        evaluator.gradients(config.criterion)
    return memory.peak


def _weight_bytes(plan: SearchPlan, model: nn.Module) -> int:
    """Of one layer its decomposition and what is evaluated; of every layer what was chosen, with what that removes."""
    chosen, evaluated, decompositions = 0, 0, 0
    for layer, ratios in plan.candidates.items():
        weight: Tensor = model.get_submodule(layer).weight  # type: ignore[assignment]
        (m, n), exact = weight.shape, max(4, weight.element_size())
        rank = min(m, n)
        # By the Gram matrix the shorter side's vectors alone.
        by_gram = weight.is_cuda or plan.is_screened
        decomposition = rank * rank * exact if by_gram else (m + n) * rank * exact
        removed = residual_rank((m, n), max(ratios, default=0.0))
        chosen += m * n * weight.element_size() + (m + n) * removed * exact
        # While a candidate's kept part is formed, its factors are copied, the left one once more; before that, a
        # decomposition by the Gram matrix takes it and the weight in float64, and the eigenvectors twice.
        at_once = len(ratios) if plan.verify is None else 1
        candidates = (at_once * m * n + (2 * m + n) * rank) * exact
        evaluated = max(evaluated, decomposition + max(candidates, 8 * (m * n + 4 * rank * rank) if by_gram else 0))
        decompositions += decomposition
    return chosen + evaluated + (decompositions if plan.comes_back else 0)


def _on(device: torch.device, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def _probe(
    backbone: Backbone, plan: SearchPlan, name: str, batches: list[Mapping[str, Tensor]], rows: int
) -> _TowerCost:
    """The cost of a tower from two batches: the first warms up and shows the memory, the last is timed."""
    tower, device = backbone.towers[name], backbone.device
    searched = {at.level: layer for layer, at in plan.locations.items() if at.tower == name}
    shared = 0
    with PeakMemory() as memory:
        entry = tower.enter(_on(device, batches[0]))
        hidden = entry.hidden
        for level in range(len(tower.blocks)):
            prefix = SharedPrefix([], tower.blocks[level])
            if level in searched:
                prefix = SharedPrefix(tower.modules_at(level), backbone.model.get_submodule(searched[level]))
            with prefix.record():
                if level < len(tower.blocks) - 1:
                    hidden = tower.step(entry, level, hidden)
                else:
                    features = tower.finish(entry, hidden)
            shared = max(shared, prefix.size)
    entry = tower.enter(_on(device, batches[-1]))
    hidden, start = entry.hidden, _now(entry.hidden)
    for level in range(len(tower.blocks) - 1):
        hidden = tower.step(entry, level, hidden)
    middle = _now(hidden)
    tower.finish(entry, hidden)
    end = _now(hidden)
    with FlopCounterMode(display=False) as counter:
        tower.features({name: value[:1] for name, value in _on(device, batches[-1]).items()})
    depth = len(tower.blocks)
    block_seconds = (middle - start) / max(1, depth - 1) * rows / entry.rows
    return _TowerCost(
        depth,
        counter.get_total_flops() / depth * rows,
        block_seconds,
        max(0.0, (end - middle) * rows / entry.rows - block_seconds),
        _bytes([entry.hidden]) * rows // entry.rows,
        _bytes(features) * rows // len(features[0]),
        memory.peak + shared + _bytes(batches[0].values()),
    )


def _probe_loss(backbone: Backbone, objective: Objective, batch: Any, images: int) -> tuple[float, int, ClassWeights]:
    """Seconds and bytes that the loss of all images takes on top of the towers, and the class weights."""
    inputs, labels = batch
    device = backbone.device
    classes = objective.class_weights(backbone)
    features, labels = backbone.image_features(_on(device, inputs)), labels.to(device)
    with PeakMemory() as memory:
        embedded = backbone.embedded(features)
        objective.sums(embedded, classes, labels)
    start = _now(embedded.pooled)
    objective.sums(embedded, classes, labels)
    return (_now(embedded.pooled) - start) / len(labels) * images, memory.peak, classes


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
    """Counts the bytes of the tensors that are made while it is active, on any device.

    What a kernel allocates for itself is not seen.

    Attributes:
        live: Bytes of those that are alive.
        peak: The most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count its results, unless they are views of what was there before."""
        kwargs = dict(kwargs or {})
        there = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        results = func(*args, **kwargs)
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in there and storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata).atexit = False
        self.peak = max(self.peak, self.live)
        return results

    def _freed(self, storage: int) -> None:
        self.live -= self._sizes.pop(storage)

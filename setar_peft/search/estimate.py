"""What a search will cost, before it starts: work by count, memory by size, time by a probe of two batches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from setar_peft.backbones import Backbone, Tower, named_inputs
from setar_peft.objective import Objective
from setar_peft.search.layers import SearchPlan, plan_search
from setar_peft.search.recording import MemoryBudget
from setar_peft.search.untouched import left_as_it_was
from setar_peft.tuner.config import SeTARConfig


@dataclass(frozen=True)
class CostEstimate:
    """What a search will cost at most; sharing within a block and early ends make it cheaper.

    Attributes:
        images: Images (or texts) of the objective.
        classes: Classes.
        layers: Layers searched.
        evaluations: Candidates evaluated.
        block_passes: Passes of the whole set through one block, by tower.
        flops: Floating-point operations of those passes and of the towers' ends.
        recorded_bytes: Hidden states that the recordings would hold with room for all of them.
        kept_bytes: Hidden states that they will hold within `recording_memory`; the rest is computed again.
        weight_bytes: Truncated weights held at once.
        seconds: Predicted time on this machine.
    """

    images: int
    classes: int
    layers: int
    evaluations: int
    block_passes: dict[str, int]
    flops: float
    recorded_bytes: int
    kept_bytes: int
    weight_bytes: int
    seconds: float

    def table(self) -> str:
        """The estimate as lines of text."""
        passes = ", ".join(f"{tower} {count}" for tower, count in self.block_passes.items())
        lines = {
            "images": f"{self.images}",
            "classes": f"{self.classes}",
            "layers": f"{self.layers}",
            "candidates": f"{self.evaluations}",
            "block passes": passes,
            "operations": f"{self.flops:.3g} FLOP",
            "recordings": f"{_size(self.kept_bytes)} of {_size(self.recorded_bytes)} kept",
            "weights": f"{_size(self.weight_bytes)} at once",
            "time": f"about {_duration(self.seconds)}",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:>{width}}  {value}" for name, value in lines.items())

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def estimate_cost(model: nn.Module, objective: Objective, config: SeTARConfig | None = None) -> CostEstimate:
    """Predict the cost of `search_rank_ratios` with the same arguments; the model is left as it was.

    Two batches are run through the towers: the first warms up, the second is timed.

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
        return _estimate(plan, plan.backbone, objective, config)


@dataclass(frozen=True)
class _TowerCost:
    depth: int
    block_flops: float
    block_seconds: float
    end_seconds: float
    level_bytes: int


def _estimate(plan: SearchPlan, backbone: Backbone, objective: Objective, config: SeTARConfig) -> CostEstimate:
    device = next(backbone.model.parameters()).device
    batches = [(named_inputs(inputs), labels) for inputs, labels in islice(objective.batches(), 2)]
    images = len(objective) if hasattr(objective, "__len__") else sum(len(labels) for _, labels in objective.batches())
    probes = {backbone.input_tower: ([_on(device, inputs) for inputs, _ in batches], images)}
    classes = 0
    if backbone.needs_prompts:
        tokens = _on(device, objective.prompt_tokens(backbone))
        classes = len(tokens["input_ids"])
        probes["text"] = ([tokens, tokens], classes)
    costs = {name: _probe(backbone.towers[name], *probe) for name, probe in probes.items()}
    loss_seconds, classes = _probe_loss(backbone, objective, batches[-1], probes, images)

    passes = {name: 2 * cost.depth for name, cost in costs.items()}
    evaluations = 0
    for index, step in enumerate(plan.steps):
        competing = step if len(step) == 1 else step[: len(step) - index]
        for layer in competing:
            count = len(plan.candidates[layer]) * plan.passes
            evaluations += count
            passes[plan.locations[layer].tower] += plan.passes_of(layer) * count
    flops = sum(costs[name].block_flops * count for name, count in passes.items())
    seconds = sum(costs[name].block_seconds * count for name, count in passes.items()) + evaluations * loss_seconds
    seconds += sum(
        costs[plan.locations[layer].tower].end_seconds * len(plan.candidates[layer]) * plan.passes
        for layer in plan.locations
    )
    recorded = sum(cost.level_bytes * cost.depth for cost in costs.values())
    entries = sum(cost.level_bytes for cost in costs.values())
    room = MemoryBudget(device, config.recording_memory).left
    weights = max(
        weight.numel() * weight.element_size() * len(plan.candidates[layer])
        for layer in plan.locations
        for weight in [backbone.model.get_submodule(layer).weight]
    )
    kept = int(max(entries, min(recorded, room)))
    return CostEstimate(
        images, classes, len(plan.locations), evaluations, passes, flops, recorded, kept, weights, seconds
    )


def _on(device: torch.device, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def _probe(tower: Tower, batches: list[dict[str, Tensor]], rows: int) -> _TowerCost:
    """Operations and seconds of one pass of all rows through one block, from two batches."""
    for batch in batches:  # the first warms up, the last is what is measured
        entry = tower.enter(batch)
        hidden, start = entry.hidden, _now(entry.hidden)
        size = hidden.numel() * hidden.element_size() // len(hidden)
        for level in range(len(tower.blocks) - 1):
            hidden = tower.step(entry, level, hidden)
        middle = _now(hidden)
        tower.finish(entry, hidden)
        end = _now(hidden)
    with FlopCounterMode(display=False) as counter:
        tower.features({name: value[:1] for name, value in batches[-1].items()})
    flops = counter.get_total_flops()
    depth = len(tower.blocks)
    scale = rows / len(hidden)
    block_seconds = (middle - start) / max(1, depth - 1) * scale
    end_seconds = max(0.0, (end - middle) * scale - block_seconds)
    return _TowerCost(depth, flops / depth * rows, block_seconds, end_seconds, size * rows)


def _probe_loss(
    backbone: Backbone, objective: Objective, batch: Any, probes: Mapping[str, Any], images: int
) -> tuple[float, int]:
    """Seconds that the loss of all images takes on top of the towers, and the number of classes."""
    inputs, labels = batch
    device = next(backbone.model.parameters()).device
    text = backbone.text_features(probes["text"][0][0]) if "text" in probes and backbone.needs_prompts else None
    classes = backbone.class_weights(text)
    features = backbone.embedded(backbone.image_features(_on(device, inputs)))
    objective.sums(features, classes, labels.to(device))
    start = _now(features.pooled)
    objective.sums(features, classes, labels.to(device))
    return (_now(features.pooled) - start) / len(labels) * images, len(classes.weight)


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

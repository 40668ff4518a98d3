"""Which layers a search visits, where they sit, in which order, and how much work each is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from setar_peft.backbones import Backbone, Location, backbone_of, default_target_modules
from setar_peft.decomposition import residual_rank
from setar_peft.objectives.base import Objective
from setar_peft.tuner.config import SeTARConfig
from setar_peft.tuner.loading import plain_name
from setar_peft.tuner.targets import targeted_modules

# The layers that compete in each step of one pass (see `steps_of`).
Steps = list[list[str]]


@dataclass(frozen=True)
class Costs:
    """What the loss of the base took, from which the time that is left is told.

    Attributes:
        passes: Seconds of one pass of all inputs through one block, by tower; empty where the model runs in full.
        loss: Seconds of the rest: the loss from the towers' features, or a callable.
    """

    passes: dict[str, float]
    loss: float


@dataclass(frozen=True)
class SearchPlan:
    """What a search is going to do.

    Attributes:
        backbone: The model as towers; None where a callable objective meets an unknown model.
        locations: Where each searched layer sits, by full name.
        steps: The layers that compete in each step of a pass.
        candidates: Ratios to try for each layer: each removes something, and no two the same.
        passes: Times that the steps are gone through at most.
        left_out: Which ratios are not tried, since they remove nothing or what another one removes.
    """

    backbone: Backbone | None
    locations: dict[str, Location]
    steps: Steps
    candidates: dict[str, tuple[float, ...]]
    passes: int
    left_out: str = ""

    @property
    def comes_back(self) -> bool:
        """Whether a layer may be evaluated more than once."""
        return self.passes > 1 or any(len(step) > 1 for step in self.steps)

    def passes_of(self, layer: str) -> int:
        """Block passes that one candidate of a layer costs: its block and those above; 1 without towers."""
        if self.backbone is None:
            return 1
        location = self.locations[layer]
        return max(1, len(self.backbone.towers[location.tower].blocks) - location.level)

    def evaluations(self) -> int:
        """Candidates of the whole search at most; of layers that compete, those with the fewest are decided first."""
        count = 0
        for index, step in enumerate(self.steps):
            left = len(step) - index if len(step) > 1 else 1
            count += sum(sorted((len(self.candidates[layer]) for layer in step), reverse=True)[:left])
        return count * self.passes

    def work(self, costs: Costs) -> dict[str, float]:
        """Seconds of the whole search by tower, at most: of layers that compete, a mean one is decided first."""
        work: dict[str, float] = {}
        for index, step in enumerate(self.steps):
            share = (len(step) - index) / len(step) if len(step) > 1 else 1.0
            for layer in step:
                tower = self.locations[layer].tower
                seconds = share * self.passes * len(self.candidates[layer]) * self.seconds(layer, costs)
                work[tower] = work.get(tower, 0.0) + seconds
        return work

    def seconds(self, layer: str, costs: Costs) -> float:
        """Seconds that one candidate of a layer takes."""
        return costs.passes.get(self.locations[layer].tower, 0.0) * self.passes_of(layer) + costs.loss


def plan_search(model: nn.Module, objective: Any, config: SeTARConfig) -> SearchPlan:
    """Find the layers to search and their order.

    Args:
        model: A model without adapters.
        objective: What will be minimised.
        config: Targets, order, candidates and passes.

    Raises:
        ValueError: If the model has adapters, the objective is none or not one of the model's classes or has no such
            criterion, no layer or no order fits, candidates are given for weights that are not searched, or none of any
            layer removes anything.
    """
    adapted = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if adapted is not None:
        raise ValueError(
            f"The model has an adapter on {adapted}; the search starts from the base. Call unload() on the PEFT model "
            "first, or search before adding adapters."
        )
    backbone = _backbone(model, objective)
    criteria = objective.criteria if isinstance(objective, Objective) else ("total",)
    if config.criterion not in criteria:
        raise ValueError(
            f"criterion is {config.criterion!r}, and {type(objective).__name__} has no such part; give one of "
            f"{', '.join(map(repr, criteria))}."
        )
    layers = _layers_by_tower(model, config, backbone)
    locations = {name: location for tower in layers.values() for name, location in tower.items()}
    steps = steps_of(_order(config, layers), {tower: list(names) for tower, names in layers.items()})
    visited = {name for step in steps for name in step}
    locations = {name: location for name, location in locations.items() if name in visited}
    searched = {location.weight_type for location in locations.values()}
    if isinstance(config.candidate_ratios, dict) and (strange := set(config.candidate_ratios) - searched - {"default"}):
        raise ValueError(
            f"candidate_ratios names {', '.join(sorted(strange))}, which is not searched; searched are "
            f"{', '.join(sorted(searched))}. Write those, or 'default' for all others."
        )
    given = {name: config.candidates_of(location.weight_type) for name, location in locations.items()}
    candidates, left_out = _different_candidates(model, given)
    return SearchPlan(backbone, locations, steps, candidates, config.passes, left_out)


def _different_candidates(
    model: nn.Module, given: Mapping[str, Sequence[float]]
) -> tuple[dict[str, tuple[float, ...]], str]:
    """Of each layer the ratios that remove something, of those that remove the same the first; and what is left out."""
    different: dict[str, tuple[float, ...]] = {}
    left_out: dict[str, list[str]] = {}
    for name, ratios in given.items():
        shape: Any = getattr(getattr(model.get_submodule(name), "weight", None), "shape", ())
        if len(shape) != 2 or 0 in shape:  # evaluating the layer says what is wrong with it
            different[name] = tuple(ratios)
            continue
        by_rank: dict[int, float] = {}
        reasons = []
        for ratio in ratios:
            rank = residual_rank(shape, ratio)
            if rank == 0:
                reasons.append(f"{ratio:g} removes none")
            elif by_rank.setdefault(rank, ratio) != ratio:
                reasons.append(f"{ratio:g} the same {rank} as {by_rank[rank]:g}")
        different[name] = tuple(by_rank.values())
        if reasons:
            left_out.setdefault(f"of {min(shape)} components {', '.join(reasons)}", []).append(name)
    sentence = "; ".join(f"{reasons} ({_some(names)})" for reasons, names in left_out.items())
    if not any(different.values()):
        raise ValueError(f"No candidate of any layer removes anything: {sentence}. Give larger candidate_ratios.")
    return different, sentence


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"


def _backbone(model: nn.Module, objective: Any) -> Backbone | None:
    if isinstance(objective, Objective):
        backbone = backbone_of(model)
        objective.check_classes(backbone)
        return backbone
    if not callable(objective):
        raise ValueError(
            f"objective is a {type(objective).__name__}; give an Objective, such as LoCoOpObjective, or a callable "
            "`model -> float` whose value is to be minimised."
        )
    try:
        return backbone_of(model)
    except ValueError:
        return None


def _layers_by_tower(
    model: nn.Module, config: SeTARConfig, backbone: Backbone | None
) -> dict[str, dict[str, Location]]:
    """The layers to search by tower, each from the top down: later blocks first, and within a block what runs last."""
    config = copy.copy(config)
    if config.target_modules is None:
        config.target_modules = default_target_modules(getattr(getattr(model, "config", None), "model_type", None))
    names = list(reversed(targeted_modules(config, model)))
    if not names:
        wanted = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
        raise ValueError(
            f"target_modules {wanted} match no module of {type(model).__name__}; nothing can be searched. Name layers "
            "of the model (see model.named_modules())."
        )
    if backbone is None:
        return {"model": {name: Location("model", 0, name.rpartition(".")[2]) for name in names}}
    located = sorted(((name, backbone.locate(name)) for name in names), key=lambda item: -item[1].level)
    return {
        tower: layers
        for tower in backbone.towers
        if (layers := {name: location for name, location in located if location.tower == tower})
    }


def _order(config: SeTARConfig, layers: Mapping[str, Mapping[str, Location]]) -> str | Sequence[str]:
    # Without towers an order of towers can only mean: from the top down.
    if "model" in layers and isinstance(config.order, str) and config.order != "exhaustive":
        return list(layers["model"])
    if isinstance(config.order, str):
        return config.order
    names = {plain_name(name): name for tower in layers.values() for name in tower}
    return [names.get(name, name) for name in config.order]


def steps_of(order: str | Sequence[str], layers: Mapping[str, Sequence[str]]) -> Steps:
    """The steps of one pass.

    A step names the layers that compete in it: the search decides one of them, so that the usual orders have one
    layer a step, and the layer-exhaustive order offers every layer in every step.

    Args:
        order: "vision_text" (the paper's), "text_vision", "vision", "text", "interleaved" (the towers take turns, both
            from the top down), "exhaustive", or the layers' names in the order wanted.
        layers: Names of the layers to search by tower, each from the top down.

    Raises:
        ValueError: If the order names a tower or a layer that is not there, or towers of unequal depth are to be
            interleaved.
    """
    everything = list(chain.from_iterable(layers.values()))
    if not isinstance(order, str):
        unknown = sorted(set(order) - set(everything))
        if unknown or len(set(order)) != len(order):
            raise ValueError(
                f"order names layers that are not searched, or names one twice: {unknown or sorted(order)}. "
                "Name each of target_modules at most once."
            )
        return [[name] for name in order]
    if order == "exhaustive":
        return [everything] * len(everything)
    if order == "interleaved":
        towers = list(layers.values())
        if len({len(tower) for tower in towers}) > 1:
            depths = ", ".join(f"{name} {len(tower)}" for name, tower in layers.items())
            raise ValueError(
                f"order 'interleaved' needs as many layers in each tower; here: {depths}. Use 'vision_text', or choose "
                "layers with target_modules."
            )
        return [[name] for turn in zip(*towers, strict=True) for name in turn]
    wanted = order.split("_")
    # A model with one tower has nothing to take turns with: the paper's default order is then that tower.
    present = [tower for tower in wanted if tower in layers]
    if not present or (len(wanted) == 1 and wanted[0] not in layers):
        raise ValueError(
            f"order {order!r} finds no layer to search: there are layers in {', '.join(layers) or 'no tower'}. "
            "Change order or target_modules."
        )
    return [[name] for tower in present for name in layers[tower]]


class BlockPasses:
    """Counts block passes along the course of a search with room for every recording.

    A pass takes all inputs of a tower through one block. The first thing a search does is to take them through every
    block once, on the way to the loss of the base.

    Args:
        depths: Number of blocks by tower.

    Attributes:
        count: Passes so far, by tower.
    """

    def __init__(self, depths: Mapping[str, int]) -> None:
        self.count = dict(depths)
        self._depths = dict(depths)
        # The highest block whose input is recorded, and whether the tower's features are those of its weights.
        self._recorded = {tower: depth - 1 for tower, depth in depths.items()}
        self._has_features = dict.fromkeys(depths, True)

    def evaluate(self, tower: str, level: int, candidates: int) -> None:
        """Evaluate the candidates of a layer: each passes its block and those above; the other tower's features serve.

        Args:
            tower: The layer's tower.
            level: Its block, from the bottom; the number of blocks for a layer above them, which only the last block's
                pass leads to.
            candidates: How many there are.
        """
        for other in self._depths:
            if other != tower and not self._has_features[other]:
                self._record(other, self._depths[other] - 1)
                self.count[other] += 1
                self._has_features[other] = True
        level = min(level, self._depths[tower] - 1)
        self._record(tower, level)
        self.count[tower] += candidates * (self._depths[tower] - level)

    def change(self, tower: str, level: int) -> None:
        """Give a layer another weight: what was recorded above it is no longer so."""
        self._recorded[tower] = min(self._recorded[tower], level)
        self._has_features[tower] = False

    def _record(self, tower: str, level: int) -> None:
        self.count[tower] += max(0, level - self._recorded[tower])
        self._recorded[tower] = max(level, self._recorded[tower])


def block_passes(plan: SearchPlan, depths: Mapping[str, int]) -> dict[str, int]:
    """Block passes of a whole search by tower, at most: as if every decision changed its layer.

    In an order that lets layers compete, as if the cheapest to evaluate and the dearest to record were decided first.

    Args:
        plan: What the search is going to do.
        depths: Number of blocks by tower.
    """
    passes = BlockPasses(depths)
    for _ in range(plan.passes):
        for index, step in enumerate(plan.steps):
            competing = sorted(step, key=plan.passes_of, reverse=True)[: len(step) - index] if len(step) > 1 else step
            for layer in competing:
                tower, level, _ = plan.locations[layer]
                passes.evaluate(tower, level, len(plan.candidates[layer]))
            changed = [plan.locations[step[0]][:2]] if len(step) == 1 else [(tower, 0) for tower in depths]
            for tower, level in changed:
                passes.change(tower, level)
    return passes.count

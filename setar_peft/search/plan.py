"""Which layers a search visits, where they sit, in which order, and how much work each is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from setar_peft.backbones import Backbone, Location, backbone_of, default_target_modules
from setar_peft.decomposition import residual_rank
from setar_peft.objectives.base import Objective
from setar_peft.tuner.config import SeTARConfig
from setar_peft.tuner.config_checks import SCREENED_ORDERS
from setar_peft.tuner.loading import plain_name
from setar_peft.tuner.targets import targeted_modules

# Rounds of a joint search that its cost is told for: two that take something, and one that does not.
USUAL_ROUNDS = 3

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
        verify: Candidates of a layer that are evaluated, those that a gradient predicts best; None for all of them.
        order: "best_first" and "joint", whose steps follow the predictions; "steps" for the steps as they stand.
        most_evaluations: The most evaluations of the whole search; None for as many as it takes.
    """

    backbone: Backbone | None
    locations: dict[str, Location]
    steps: Steps
    candidates: dict[str, tuple[float, ...]]
    passes: int
    left_out: str = ""
    verify: int | None = None
    order: str = "steps"
    most_evaluations: int | None = None

    @property
    def is_screened(self) -> bool:
        """Whether a gradient says which candidates are evaluated."""
        return self.verify is not None

    @property
    def comes_back(self) -> bool:
        """Whether a layer's decomposition is needed more than once."""
        return self.is_screened or self.passes > 1 or any(len(step) > 1 for step in self.steps)

    @property
    def rounds(self) -> int:
        """How often gradients are computed, at most; in the order "joint" as often as is usual."""
        if not self.is_screened:
            return 0
        return min(USUAL_ROUNDS, self.most_evaluations or USUAL_ROUNDS) if self.order == "joint" else self.passes

    def tried(self, layer: str) -> int:
        """Candidates of a layer that are evaluated each time it is visited, at most."""
        count = len(self.candidates[layer])
        return count if self.verify is None else min(count, self.verify)

    def passes_of(self, layer: str) -> int:
        """Block passes that one candidate of a layer costs: its block and those above; 1 without towers."""
        if self.backbone is None:
            return 1
        location = self.locations[layer]
        return max(1, len(self.backbone.towers[location.tower].blocks) - location.level)

    def evaluations(self) -> int:
        """Candidates of the whole search at most; of layers that compete, those with the fewest are decided first.

        In the order "joint" all layers are candidates together, once a round.
        """
        if self.order == "joint":
            return self.rounds
        count = 0
        for index, step in enumerate(self.steps):
            left = len(step) - index if len(step) > 1 else 1
            count += sum(sorted(map(self.tried, step), reverse=True)[:left])
        return min(count * self.passes, self.most_evaluations or count * self.passes)

    def work(self, costs: Costs) -> dict[str, float]:
        """Seconds of the whole search by tower, at most: of layers that compete, a mean one is decided first.

        The work of the gradients, whose way back costs twice the way there, stands under "gradients".
        """
        if self.order == "joint":
            work = {"all": self.evaluations() * self.together_seconds(costs)}
        else:
            work = {}
            for index, step in enumerate(self.steps):
                share = (len(step) - index) / len(step) if len(step) > 1 else 1.0
                for layer in step:
                    tower = self.locations[layer].tower
                    seconds = share * self.passes * self.tried(layer) * self.seconds(layer, costs)
                    work[tower] = work.get(tower, 0.0) + seconds
        if self.is_screened:
            work["gradients"] = self.rounds * self.gradient_seconds(costs)
        return work

    def work_of(self, layers: Iterable[str], costs: Costs) -> dict[str, float]:
        """Seconds by tower that visiting some layers once takes at most."""
        work: dict[str, float] = {}
        for layer in layers:
            tower = self.locations[layer].tower
            work[tower] = work.get(tower, 0.0) + self.tried(layer) * self.seconds(layer, costs)
        return work

    def gradient_seconds(self, costs: Costs) -> float:
        """Seconds of one gradient by all layers: there and, twice as long, back."""
        if self.backbone is None:
            return 3 * costs.loss
        of_towers = (
            costs.passes.get(name, 0.0) * (len(self.backbone.towers[name].blocks) - lowest)
            for name, lowest in lowest_levels(self.backbone, self.locations.values()).items()
        )
        return 3 * (sum(of_towers) + costs.loss)

    def seconds(self, layer: str, costs: Costs) -> float:
        """Seconds that one candidate of a layer takes."""
        return costs.passes.get(self.locations[layer].tower, 0.0) * self.passes_of(layer) + costs.loss

    def together_seconds(self, costs: Costs) -> float:
        """Seconds of one evaluation in which every layer may have changed."""
        if self.backbone is None:
            return costs.loss
        towers = self.backbone.towers.items()
        return sum(costs.passes.get(name, 0.0) * len(tower.blocks) for name, tower in towers) + costs.loss


def lowest_levels(backbone: Backbone | None, locations: Iterable[Location]) -> dict[str, int]:
    """The lowest searched block by tower, where its gradient begins; the last one for layers above it."""
    lowest: dict[str, int] = {}
    for tower, level, _ in locations:
        top = len(backbone.towers[tower].blocks) - 1 if backbone else 0
        lowest[tower] = min(level, top, lowest.get(tower, top))
    return lowest


def plan_search(model: nn.Module, objective: Any, config: SeTARConfig) -> SearchPlan:
    """Find the layers to search and their order.

    Args:
        model: A model without adapters.
        objective: What will be minimised.
        config: Targets, order, candidates and passes.

    Raises:
        ValueError: If the model has adapters, the objective is none or not one of the model's classes or has no such
            criterion, no layer or no order fits, a screened search has no gradient to follow, candidates are given for
            weights that are not searched, or none of any layer removes anything.
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
    is_screened = config.search == "screened"
    if is_screened and torch.is_inference_mode_enabled():
        raise ValueError(
            "A screened search needs gradients, and within torch.inference_mode() there are none. Search outside of "
            "it; nothing else that the search computes keeps a graph."
        )
    if is_screened and isinstance(objective, Objective) and not objective.is_differentiable:
        raise ValueError(
            f"search is 'screened', which follows the gradient of the objective, and {type(objective).__name__} counts "
            "scores above thresholds, which has none. Take search='greedy' (--search greedy), or another objective "
            "(--criterion total, id or ood)."
        )
    searched = {location.weight_type for location in locations.values()}
    if isinstance(config.candidate_ratios, dict) and (strange := set(config.candidate_ratios) - searched - {"default"}):
        raise ValueError(
            f"candidate_ratios names {', '.join(sorted(strange))}, which is not searched; searched are "
            f"{', '.join(sorted(searched))}. Write those, or 'default' for all others."
        )
    given = {name: config.candidates_of(location.weight_type) for name, location in locations.items()}
    candidates, left_out = _different_candidates(model, given)
    order = config.order if config.order in SCREENED_ORDERS else "steps"
    assert isinstance(order, str)
    verify = config.verify or (1 if order == "best_first" else 2)
    return SearchPlan(
        backbone,
        locations,
        steps,
        candidates,
        config.passes,
        left_out,
        verify if is_screened else None,
        order,
        config.evaluations,
    )


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
    if config.order in SCREENED_ORDERS or (
        "model" in layers and isinstance(config.order, str) and config.order != "exhaustive"
    ):
        return [name for tower in layers.values() for name in tower]
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

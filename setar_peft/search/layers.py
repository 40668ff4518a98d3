"""Which layers a search visits, where they sit, in which order, and how much work each is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from setar_peft.backbones import Backbone, Location, backbone_of, default_target_modules
from setar_peft.objective import Objective
from setar_peft.search.orders import Steps, steps_of
from setar_peft.tuner.config import SeTARConfig
from setar_peft.tuner.targets import targeted_modules


@dataclass(frozen=True)
class SearchPlan:
    """What a search is going to do.

    Attributes:
        backbone: The model as towers; None where a callable objective meets an unknown model.
        locations: Where each searched layer sits, by full name.
        steps: The layers that compete in each step of a pass.
        candidates: Ratios to try for each layer, each above 0.
        passes: Times that the steps are gone through at most.
    """

    backbone: Backbone | None
    locations: dict[str, Location]
    steps: Steps
    candidates: dict[str, tuple[float, ...]]
    passes: int

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

    def work(self) -> float:
        """Block passes of the whole search at most, in one tower or the other."""
        work = 0.0
        for index, step in enumerate(self.steps):
            mean = sum(self.passes_of(layer) * len(self.candidates[layer]) for layer in step) / len(step)
            work += mean * (len(step) - index if len(step) > 1 else 1)
        return work * self.passes


def plan_search(model: nn.Module, objective: Any, config: SeTARConfig) -> SearchPlan:
    """Find the layers to search and their order.

    Args:
        model: A model without adapters.
        objective: What will be minimised.
        config: Targets, order, candidates and passes.

    Raises:
        ValueError: If the model has adapters, the objective is none, or no layer or no order fits.
    """
    adapted = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if adapted is not None:
        raise ValueError(
            f"The model has an adapter on {adapted}; the search starts from the base. Call unload() on the PEFT model "
            "first, or search before adding adapters."
        )
    backbone = _backbone(model, objective)
    layers = _layers_by_tower(model, config, backbone)
    locations = {name: location for tower in layers.values() for name, location in tower.items()}
    steps = steps_of(_order(config, layers), {tower: list(names) for tower, names in layers.items()})
    visited = {name for step in steps for name in step}
    locations = {name: location for name, location in locations.items() if name in visited}
    candidates = {name: config.candidates_of(location.weight_type) for name, location in locations.items()}
    return SearchPlan(backbone, locations, steps, candidates, config.passes)


def _backbone(model: nn.Module, objective: Any) -> Backbone | None:
    if isinstance(objective, Objective):
        return backbone_of(model)
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
    return config.order

"""The search for rank ratios: layers and order from the config, losses from the objective, decisions by greed."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from setar_peft.backbones import Backbone, Location, backbone_of, default_target_modules
from setar_peft.decomposition import Residual
from setar_peft.losses import LossValues
from setar_peft.objective import Objective
from setar_peft.search.evaluate import Evaluator, FullEvaluator, ReplayEvaluator
from setar_peft.search.greedy import Decision, greedy_search
from setar_peft.search.orders import Steps, steps_of
from setar_peft.search.progress import SearchProgress
from setar_peft.search.trace import SearchTrace, TraceCandidate, TraceRow
from setar_peft.tuner.config import SeTARConfig
from setar_peft.tuner.targets import targeted_modules


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        rank_ratios: Full module name -> ratio, for every layer searched; 0 for a layer that is left alone.
        trace: How it got there, one row a step.
        config: The config to make the adapter with.
        residuals: The removed components of every layer with a ratio above 0, by module name.
    """

    rank_ratios: dict[str, float]
    trace: SearchTrace
    config: SeTARConfig
    residuals: dict[str, Residual]


def search_rank_ratios(
    model: nn.Module,
    objective: Objective | Callable[[nn.Module], float],
    config: SeTARConfig | None = None,
    *,
    progress: bool = True,
    trace_path: str | Path | None = None,
) -> SearchResult:
    """Find the rank ratio of each layer by greedy search (paper, Algorithm 1).

    The model is left as it was, also when the search is interrupted: weights, buffers, hooks, training flags and the
    state of the random generators.

    Args:
        model: A model without adapters. An `Objective` needs one of a known family; a callable takes any model.
        objective: What is minimised: an `Objective`, or a callable `model -> float`, evaluated in full each time.
        config: Which layers, candidates and order; by default the paper's (W_up, 5 to 40 %, vision then text).
        progress: Show a progress bar on standard error.
        trace_path: Write the trace here after each step, whole or not at all.

    Raises:
        ValueError: If the model has adapters, no layer or no order fits, images do not fit the model, a weight is not
            finite, or the loss of the base is not finite.
    """
    config = SeTARConfig() if config is None else config
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
    trace = SearchTrace(LossValues(math.nan), settings=_settings(config))
    with (
        _left_as_it_was(model),
        torch.no_grad(),
        SearchProgress(_work(steps, locations, backbone, config), shown=progress) as bar,
    ):
        evaluator = _evaluator(model, objective, config, backbone, steps)
        try:
            trace.initial = evaluator.initial()
            if not math.isfinite(trace.initial.total):
                raise ValueError(
                    f"The loss of the base model is {trace.initial.total}, so no candidate can be compared with it. "
                    "Check the model's weights and the images."
                )
            bar.best(trace.initial.total)

            def losses(layer: str, ratios: Sequence[float]) -> list[LossValues]:
                work = _layer_work(locations[layer], backbone) * len(ratios)
                values = evaluator.losses(
                    layer, ratios, lambda name, ratio, done: bar.candidate(name, ratio, done * work)
                )
                bar.decided(
                    work,
                    min(best_so_far[0], *(value.total for value in values if math.isfinite(value.total))),
                )
                return values

            best_so_far = [trace.initial.total]
            rank_ratios = dict.fromkeys(locations, 0.0)
            for decision in greedy_search(
                steps, trace.initial, config.candidates, losses, evaluator.choose, config.passes
            ):
                best_so_far[0] = decision.losses.total
                rank_ratios[decision.layer] = decision.rank_ratio
                _record(trace, decision, locations[decision.layer])
                if trace_path is not None:
                    trace.save(trace_path)
        finally:
            evaluator.restore()
    found = copy.copy(config)
    found.rank_ratios, found.objective = dict(rank_ratios), None
    return SearchResult(rank_ratios, trace, found, evaluator.residuals)


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
        raise ValueError(
            f"target_modules {sorted(config.target_modules)} match no module of {type(model).__name__}; nothing can be "
            "searched. Name layers of the model (see model.named_modules())."
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


def _evaluator(
    model: nn.Module, objective: Any, config: SeTARConfig, backbone: Backbone | None, steps: Steps
) -> Evaluator:
    names = list(dict.fromkeys(name for step in steps for name in step))
    comes_back = config.passes > 1 or any(len(step) > 1 for step in steps)
    if isinstance(objective, Objective):
        assert backbone is not None
        return ReplayEvaluator(
            objective,
            backbone,
            names,
            config.prune,
            config.seed,
            keep_decompositions=comes_back,
            recording_memory=config.recording_memory,
        )
    return FullEvaluator(objective, model, names, config.prune, config.seed, keep_decompositions=comes_back)


def _layer_work(location: Location, backbone: Backbone | None) -> float:
    """Block passes of one candidate: the blocks from the layer's upwards, or one unit where there are no blocks."""
    if backbone is None:
        return 1.0
    return float(max(1, len(backbone.towers[location.tower].blocks) - location.level))


def _work(steps: Steps, locations: Mapping[str, Location], backbone: Backbone | None, config: SeTARConfig) -> float:
    work = 0.0
    for index, step in enumerate(steps):
        mean = sum(_layer_work(locations[name], backbone) for name in step) / len(step)
        work += mean * (len(step) - index if len(step) > 1 else 1)
    return work * len(config.candidates) * config.passes


def _settings(config: SeTARConfig) -> dict[str, Any]:
    kept = ("target_modules", "prune", "seed", "candidate_ratios", "order", "passes")
    settings = {name: value for name, value in config.to_dict().items() if name in kept}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}


def _record(trace: SearchTrace, decision: Decision, location: Location) -> None:
    step, losses = len(trace.rows), decision.losses
    trace.candidates.extend(
        TraceCandidate(step, candidate.layer, candidate.rank_ratio, *candidate.losses)
        for candidate in decision.candidates
    )
    trace.rows.append(
        TraceRow(
            step,
            location.tower,
            location.weight_type,
            None if location.weight_type == "W_p" else location.level,
            decision.rank_ratio,
            losses.total,
            losses.id_loss,
            losses.ood_loss,
            100 * losses.accuracy,
            100 * losses.ood_patch_share,
            decision.layer,
        )
    )


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with training flags and random generators put back at the end."""
    training = [module for module in model.modules() if module.training]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - what other code draws from
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])  # noqa: NPY002
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

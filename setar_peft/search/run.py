"""The search for rank ratios: layers and order from the config, losses from the objective, decisions by greed."""

from __future__ import annotations

import copy
import math
import platform
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from setar_peft.backbones.untouched import left_as_it_was
from setar_peft.decomposition import Residual, tensor_digest
from setar_peft.objectives.base import Objective
from setar_peft.objectives.loss import LossValues
from setar_peft.search.evaluate import Evaluator, FullEvaluator, ReplayEvaluator, SmallerBatches
from setar_peft.search.greedy import Decision, greedy_search
from setar_peft.search.plan import SearchPlan, plan_search
from setar_peft.search.processes import Processes
from setar_peft.search.progress import SearchProgress
from setar_peft.search.trace import SearchTrace, TraceCandidate, TraceRow, in_threads, model_fingerprint
from setar_peft.search.weights import SwappableWeight
from setar_peft.tuner.config import SeTARConfig
from setar_peft.tuner.layer import KnownSplit, SplitSettings

_CRITERIA = {"total": "total", "id": "id_loss", "ood": "ood_loss"}


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        rank_ratios: Full module name -> ratio, for every layer searched; 0 for a layer that is left alone.
        trace: How it got there, one row a step.
        config: The config to make the adapter with. Until it is copied or saved it carries the residuals, so that no
            weight is decomposed twice.
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
    resume: bool = False,
) -> SearchResult:
    """Find the rank ratio of each layer by greedy search (paper, Algorithm 1).

    The model is left as it was, also when the search is interrupted: weights, buffers, hooks, training flags and the
    state of the random generators. Under `accelerate launch` or torchrun each process evaluates a shard of the images,
    and all return the same result.

    Args:
        model: A model without adapters. An `Objective` needs one of a known family; a callable takes any model.
        objective: What is minimised: an `Objective`, or a callable `model -> float`, which is evaluated in full.
        config: Which layers, candidates and order; by default the paper's (W_up, 5 to 40 %, vision then text).
        progress: Show a progress bar on standard error.
        trace_path: Write the trace here after each step, whole or not at all.
        resume: Continue the trace at `trace_path` if there is one; the result is that of an uninterrupted search.

    Raises:
        ValueError: If the model has adapters, no layer or no order fits, inputs do not fit the model, a weight is not
            finite, the loss of the base is not finite, or the trace to resume is of another model, data or settings.
        torch.OutOfMemoryError: If not even one image fits; batches are halved before.
    """
    config = SeTARConfig() if config is None else config
    if resume and trace_path is None:
        raise ValueError("resume is set, but trace_path is not; say which trace to continue.")
    plan = plan_search(model, objective, config)
    processes = Processes(next((weight.device for weight in model.parameters()), torch.device("cpu")))
    shown = progress and processes.is_first
    with left_as_it_was(model), SearchProgress(plan.work(), shown=shown) as bar:
        evaluator = SmallerBatches(
            lambda largest: _evaluator(model, objective, config, plan, processes, largest), processes
        )
        try:
            trace = SearchTrace(LossValues(math.nan), settings=_settings(config, objective, evaluator, model))
            done = _resumed(trace, trace_path) if resume else SearchTrace(LossValues(math.nan))
            trace.initial = done.initial if done.rows else evaluator.initial()
            if not math.isfinite(trace.initial.total):
                raise ValueError(
                    f"The loss of the base model is {trace.initial.total}, so no candidate can be compared with it. "
                    "Check the model's weights and the images."
                )
            if isinstance(objective, Objective) and processes.is_first and not done.rows:
                objective.check_base(trace.initial)
            rank_ratios = _decide(plan, config, evaluator, bar, trace, done, trace_path if processes.is_first else None)
        finally:
            evaluator.restore()
    found = copy.copy(config)
    found.rank_ratios, found.target_modules, found.objective = dict(rank_ratios), set(rank_ratios), None
    found.known_splits = _known_splits(model, evaluator.residuals, found)
    return SearchResult(rank_ratios, trace, found, evaluator.residuals)


def _known_splits(model: nn.Module, residuals: dict[str, Residual], found: SeTARConfig) -> dict[str, KnownSplit]:
    assert isinstance(found.rank_ratios, dict)
    weights = [SwappableWeight(name, model.get_submodule(name)).original for name in residuals]
    return {
        name: KnownSplit(SplitSettings(found.rank_ratios[name], found.prune, found.seed, name), digest, residual)
        for (name, residual), digest in zip(residuals.items(), in_threads(tensor_digest, weights), strict=True)
    }


def _decide(
    plan: SearchPlan,
    config: SeTARConfig,
    evaluator: SmallerBatches,
    bar: SearchProgress,
    trace: SearchTrace,
    done: SearchTrace,
    trace_path: str | Path | None,
) -> dict[str, float]:
    """Run the greedy loop: steps that `done` holds are taken from it, the others evaluated; each fills the trace."""
    known = {(row.step, row.module, row.rank_ratio): LossValues(*row[3:]) for row in done.candidates}
    best = trace.initial.total
    bar.best(best)

    def criterion(losses: LossValues) -> float:
        return float(getattr(losses, _CRITERIA[config.criterion]))

    def evaluate(layer: str, ratios: Sequence[float]) -> list[LossValues]:
        step, work = len(trace.rows), plan.passes_of(layer) * len(ratios)
        if step < len(done.rows):
            values = [known[step, layer, ratio] for ratio in ratios]
        else:
            location = plan.locations[layer]
            values = evaluator.losses(
                layer, ratios, lambda _, ratio, share: bar.candidate(location, ratio, share, work)
            )
            _report_non_finite(layer, ratios, map(criterion, values))
        bar.decided(
            plan.locations[layer], work, min([best, *(value.total for value in values if math.isfinite(value.total))])
        )
        return values

    rank_ratios = dict.fromkeys(plan.locations, 0.0)
    decisions = greedy_search(
        plan.steps,
        trace.initial,
        lambda layer: plan.candidates[layer],
        evaluate,
        evaluator.choose,
        passes=config.passes,
        criterion=criterion,
    )
    for decision in decisions:
        best = decision.losses.total
        rank_ratios[decision.layer] = decision.rank_ratio
        _record(trace, decision, plan)
        if trace_path is not None and len(trace.rows) > len(done.rows):
            trace.save(trace_path)
    return rank_ratios


def _report_non_finite(layer: str, ratios: Sequence[float], values: Iterable[float]) -> None:
    bad = [f"{value} at ratio {ratio}" for ratio, value in zip(ratios, values, strict=True) if not math.isfinite(value)]
    if bad:
        warnings.warn(
            f"Of {layer} some candidates have no finite loss and cannot win: {', '.join(bad)}.",
            RuntimeWarning,
            stacklevel=2,
        )


def _evaluator(
    model: nn.Module,
    objective: Any,
    config: SeTARConfig,
    plan: SearchPlan,
    processes: Processes,
    largest_batch: int | None,
) -> Evaluator:
    common = (list(plan.locations), config.prune, config.seed)
    if not isinstance(objective, Objective):
        return FullEvaluator(objective, model, *common, keep_decompositions=plan.comes_back)
    assert plan.backbone is not None
    return ReplayEvaluator(
        objective,
        plan.backbone,
        *common,
        keep_decompositions=plan.comes_back,
        recording_memory=config.recording_memory,
        processes=processes,
        largest_batch=largest_batch,
    )


def _settings(config: SeTARConfig, objective: Any, evaluator: SmallerBatches, model: nn.Module) -> dict[str, Any]:
    """Everything that a resumed search has to have in common with the one it continues, and the versions."""
    kept = (
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("prune", "seed", "candidate_ratios", "order", "passes", "criterion"),
    )
    settings = {name: value for name, value in config.to_dict().items() if name in kept}
    named = getattr(objective, "__qualname__", type(objective).__qualname__)
    return {
        **{name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()},
        "objective": objective.settings() if isinstance(objective, Objective) else {"callable": named},
        "model": model_fingerprint(model),
        "data": evaluator.data_fingerprint,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }


def _resumed(trace: SearchTrace, path: str | Path | None) -> SearchTrace:
    """The trace to continue, or an empty one; it must be of the same search as `trace`."""
    if path is None or not Path(path).exists():
        return SearchTrace(LossValues(math.nan))
    done = SearchTrace.load(path)
    before, now = _flat(done.settings), _flat(trace.settings)
    differences = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} is the trace of another search: {'; '.join(differences)}. Search with what it was made with, or "
            "start anew with another trace_path."
        )
    return done


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a resumed search must share, those of the objective with their own names."""
    shared = {name: value for name, value in settings.items() if name not in ("versions", "objective")}
    return {**shared, **{f"objective.{name}": value for name, value in settings.get("objective", {}).items()}}


def _record(trace: SearchTrace, decision: Decision, plan: SearchPlan) -> None:
    step, losses, location = len(trace.rows), decision.losses, plan.locations[decision.layer]
    in_block = plan.backbone is not None and location.level < len(plan.backbone.towers[location.tower].blocks)
    trace.candidates.extend(
        TraceCandidate(step, candidate.layer, candidate.rank_ratio, *candidate.losses)
        for candidate in decision.candidates
    )
    trace.rows.append(
        TraceRow(
            step,
            location.tower,
            location.weight_type,
            location.level if in_block else None,
            decision.rank_ratio,
            losses.total,
            losses.id_loss,
            losses.ood_loss,
            100 * losses.accuracy,
            100 * losses.ood_patch_share,
            decision.layer,
        )
    )

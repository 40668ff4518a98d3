"""The search for rank ratios: layers and order from the config, losses from the objective, decisions by greed."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setar_peft.backbones.activations import fuse_activations
from setar_peft.backbones.untouched import left_as_it_was
from setar_peft.decomposition import KnownSplit, Residual, SplitSettings, tensor_digest
from setar_peft.objectives.base import Objective
from setar_peft.processes import Processes
from setar_peft.search.course import Course
from setar_peft.search.evaluate import Evaluator, FullEvaluator, SmallerBatches, largest_batch
from setar_peft.search.fingerprints import in_threads, search_settings
from setar_peft.search.plan import SearchPlan, plan_search
from setar_peft.search.progress import SearchProgress
from setar_peft.search.replay import ReplayEvaluator
from setar_peft.search.trace import SearchTrace, trace_to_continue
from setar_peft.search.weights import SwappableWeight
from setar_peft.tuner.config import SeTARConfig, objective_settings
from setar_peft.tuner.loading import plain_name


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
    objective: Objective | Callable[[nn.Module], float | Tensor],
    config: SeTARConfig | None = None,
    *,
    progress: bool = True,
    trace_path: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> SearchResult:
    """Find the rank ratio of each layer by greedy search (paper, Algorithm 1), or by a screened one (docs/search.md).

    The model is left as it was, also when the search is interrupted: weights, buffers, hooks, training flags and the
    state of the random generators. A callable may do to it what it likes: each of its evaluations begins with the same
    model and generators, for which a copy of the weights is kept in host memory (see `left_as_it_was`). Under
    `accelerate launch` or torchrun each process evaluates a shard of the images, and all return the same result.

    Args:
        model: A model without adapters. An `Objective` needs one of a known family; a callable takes any model.
        objective: What is minimised: an `Objective`, or a callable `model -> float`, which is evaluated in full. For a
            screened search the callable returns a tensor with a gradient.
        config: Which layers, candidates and order; by default the paper's (W_up, 5 to 40 %, vision then text).
        progress: Show a progress bar on standard error.
        trace_path: Write the trace here before the first step and after each, whole or not at all. What is there
            already is neither continued nor replaced unless that is asked for.
        resume: Continue the trace at `trace_path` if there is one; the result is that of an uninterrupted search. The
            losses of the base, and of the layers decided so far, are computed anew and compared.
        overwrite: Start anew and replace what is at `trace_path`.

    Warns:
        UserWarning: Of candidates that are not evaluated, since they remove nothing or what another one removes.

    Raises:
        ValueError: If the model has adapters, no layer or no order fits, inputs do not fit the model, a weight is not
            finite, the loss of the base is not finite, a screened search finds no gradient, there is a trace already,
            or the trace to resume is damaged or of another model, data, settings or losses.
        OSError: If the trace cannot be written; this is tried before anything is computed.
        torch.OutOfMemoryError: If not even one image fits; batches are halved before.
    """
    config = SeTARConfig() if config is None else config
    if (resume or overwrite) and trace_path is None:
        given = "resume" if resume else "overwrite"
        raise ValueError(f"{given} is set, but trace_path is not; say which trace is meant.")
    plan = plan_search(model, objective, config)
    processes = Processes(next((weight.device for weight in model.parameters()), torch.device("cpu")))
    if plan.left_out and processes.is_first:
        warnings.warn(f"Candidates that are not evaluated: {plan.left_out}.", UserWarning, stacklevel=2)
    done = _to_continue(trace_path, processes, resume=resume, overwrite=overwrite)
    shown = progress and processes.is_first
    with left_as_it_was(model), SearchProgress(shown=shown) as bar:
        # A callable meets the model's own modules: nothing is known of what it does with them.
        if isinstance(objective, Objective):
            fuse_activations(model)
        evaluator = SmallerBatches(
            lambda largest: _evaluator(model, objective, config, plan, processes, largest),
            processes,
            lambda: largest_batch(objective, plan.backbone, processes),
        )
        settings = search_settings(config, objective, model, evaluator.data_fingerprint)
        if done is not None:
            done.check_settings(settings, str(trace_path))
        initial = evaluator.present()
        if not math.isfinite(initial.total):
            raise ValueError(
                f"The loss of the base model is {initial.total}, so no candidate can be compared with it. "
                "Check the model's weights and the images."
            )
        if isinstance(objective, Objective) and processes.is_first and done is None:
            objective.check_base(initial)
        dtype = next(iter(model.parameters())).dtype
        course = Course(
            plan, config, evaluator, bar, trace_path, initial, settings, done, saves=processes.is_first, dtype=dtype
        )
        course.run()
    found = copy.copy(config)
    # As an adapter of the same model is named, and the same model before it was compiled.
    ratios = {plain_name(name): ratio for name, ratio in course.rank_ratios.items()}
    found.rank_ratios, found.target_modules, found.objective = ratios, set(ratios), None
    found.card = replace(config.card, objective=objective_settings(objective))
    found.known_splits = _known_splits(model, evaluator.residuals, found)
    residuals = {plain_name(name): residual for name, residual in evaluator.residuals.items()}
    return SearchResult(dict(ratios), course.trace, found, residuals)


def _to_continue(path: str | Path | None, processes: Processes, *, resume: bool, overwrite: bool) -> SearchTrace | None:
    """The trace to continue (see `trace_to_continue`): what the first process finds holds for all."""
    found: SearchTrace | Exception | None = None
    if path is not None and processes.is_first:
        try:
            found = trace_to_continue(path, resume=resume, overwrite=overwrite)
        except (ValueError, OSError) as error:
            found = error
    found = processes.gathered(found)[0]
    if isinstance(found, Exception):
        raise found
    return found


def _known_splits(model: nn.Module, residuals: dict[str, Residual], found: SeTARConfig) -> dict[str, KnownSplit]:
    assert isinstance(found.rank_ratios, dict)
    weights = [SwappableWeight(name, model.get_submodule(name)).original for name in residuals]
    return {
        name: KnownSplit(SplitSettings(found.rank_ratios[name], found.prune, found.seed, name), digest, residual)
        for name, residual, digest in zip(
            map(plain_name, residuals), residuals.values(), in_threads(tensor_digest, weights), strict=True
        )
    }


def _evaluator(
    model: nn.Module,
    objective: Any,
    config: SeTARConfig,
    plan: SearchPlan,
    processes: Processes,
    largest_batch: int | None,
) -> Evaluator:
    common = (list(plan.locations), config.prune, config.seed)
    by_gram = True if plan.is_screened else None
    if not isinstance(objective, Objective):
        return FullEvaluator(objective, model, *common, keep_decompositions=plan.comes_back, by_gram=by_gram)
    assert plan.backbone is not None
    return ReplayEvaluator(
        objective,
        plan.backbone,
        *common,
        keep_decompositions=plan.comes_back,
        by_gram=by_gram,
        recording_memory=config.recording_memory,
        processes=processes,
        largest_batch=largest_batch,
    )

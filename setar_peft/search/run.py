"""The search for rank ratios: layers and order from the config, losses from the objective, decisions by greed."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from setar_peft.backbones.activations import fuse_activations
from setar_peft.backbones.untouched import left_as_it_was
from setar_peft.decomposition import KnownSplit, Residual, SplitSettings, tensor_digest
from setar_peft.objectives.base import Objective
from setar_peft.objectives.loss import LossValues
from setar_peft.processes import Processes
from setar_peft.search.evaluate import Evaluator, FullEvaluator, ReplayEvaluator, SmallerBatches, largest_batch
from setar_peft.search.greedy import Decision, greedy_search
from setar_peft.search.plan import SearchPlan, plan_search
from setar_peft.search.progress import SearchProgress
from setar_peft.search.trace import (
    SearchTrace,
    TraceCandidate,
    TraceRow,
    in_threads,
    search_settings,
    trace_to_continue,
)
from setar_peft.search.weights import SwappableWeight
from setar_peft.tuner.config import SeTARConfig, objective_settings
from setar_peft.tuner.loading import plain_name

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
    overwrite: bool = False,
) -> SearchResult:
    """Find the rank ratio of each layer by greedy search (paper, Algorithm 1).

    The model is left as it was, also when the search is interrupted: weights, buffers, hooks, training flags and the
    state of the random generators. A callable may do to it what it likes: each of its evaluations begins with the same
    model and generators, for which a copy of the weights is kept in host memory (see `left_as_it_was`). Under
    `accelerate launch` or torchrun each process evaluates a shard of the images, and all return the same result.

    Args:
        model: A model without adapters. An `Objective` needs one of a known family; a callable takes any model.
        objective: What is minimised: an `Objective`, or a callable `model -> float`, which is evaluated in full.
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
            finite, the loss of the base is not finite, there is a trace already, or the trace to resume is damaged or
            of another model, data, settings or losses.
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
        course = _Course(
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


class _Course:
    """The course of one search: steps that `done` holds are taken from it, the others evaluated; each fills the trace.

    Args:
        plan: What is visited.
        config: The search's config.
        evaluator: Computes losses.
        bar: Shows where the search is.
        path: Where the trace is; None for nowhere.
        initial: Losses of the base.
        settings: What the trace is of.
        done: The trace to continue.
        saves: Whether to save the trace.
        dtype: Of the weights.

    Attributes:
        trace: What was done so far.
        rank_ratios: Layer -> the ratio that was decided, 0 before.

    Raises:
        ValueError: If the base has other losses than in `done`.
    """

    def __init__(
        self,
        plan: SearchPlan,
        config: SeTARConfig,
        evaluator: SmallerBatches,
        bar: SearchProgress,
        path: str | Path | None,
        initial: LossValues,
        settings: dict[str, Any],
        done: SearchTrace | None,
        *,
        saves: bool,
        dtype: torch.dtype,
    ) -> None:
        self._plan, self._config, self._evaluator, self._bar = plan, config, evaluator, bar
        self._path, self._saves = path, saves
        self._costs = evaluator.costs
        self._done = SearchTrace(initial) if done is None else done
        self.trace = SearchTrace(self._done.initial, settings=settings)
        self.rank_ratios = dict.fromkeys(plan.locations, 0.0)
        self._best = self.trace.initial
        self._known = {(row.step, row.module, row.rank_ratio): LossValues(*row[3:]) for row in self._done.candidates}
        self._tolerance = _tolerance(dtype)
        self._is_checked = not self._done.rows
        self._check("the base", initial)

    def run(self) -> None:
        """Decide layer after layer.

        Raises:
            ValueError: If the trace that is continued does not hold together, or its losses are not the model's.
            OSError: If the trace cannot be saved.
        """
        self._bar.begin(self._plan.work(self._costs), self._criterion(self._best))
        if not self._done.rows:
            self._save()
        for decision in greedy_search(
            self._plan.steps,
            self.trace.initial,
            lambda layer: self._plan.candidates[layer],
            self._losses,
            self._evaluator.choose,
            passes=self._config.passes,
            criterion=self._criterion,
        ):
            self._best = decision.losses
            self.rank_ratios[decision.layer] = decision.rank_ratio
            self._record(decision)
        if len(self.trace.rows) < len(self._done.rows):
            raise self._damaged(f"it has {len(self._done.rows)} steps, and the search {len(self.trace.rows)}")
        self._check_decided()

    def _criterion(self, losses: LossValues) -> float:
        return float(getattr(losses, _CRITERIA[self._config.criterion]))

    def _losses(self, layer: str, ratios: Sequence[float]) -> list[LossValues]:
        step, location = len(self.trace.rows), self._plan.locations[layer]
        seconds = len(ratios) * self._plan.seconds(layer, self._costs)
        is_known = step < len(self._done.rows)
        if is_known:
            missing = [ratio for ratio in ratios if (step, layer, ratio) not in self._known]
            if missing:
                raise self._damaged(f"it has no candidate of ratio {missing[0]:g} of {layer} in step {step}")
            values = [self._known[step, layer, ratio] for ratio in ratios]
        else:
            self._check_decided()
            values = self._evaluator.losses(
                layer, ratios, lambda ratio, share: self._bar.candidate(location, ratio, share, seconds)
            )
            _report_non_finite(layer, ratios, map(self._criterion, values))
        finite = filter(math.isfinite, map(self._criterion, [self._best, *values]))
        self._bar.decided(location, seconds, min(finite), evaluated=not is_known)
        return values

    def _check_decided(self) -> None:
        """Once the known steps are taken: is the loss of what they decided the one that they end with?"""
        if self._is_checked:
            return
        self._is_checked = True
        if any(self.rank_ratios.values()):
            self._check("the layers decided so far", self._evaluator.present())

    def _check(self, what: str, now: LossValues) -> None:
        before = self._best
        for name in ("total", "id_loss", "ood_loss"):
            was, is_now = getattr(before, name), getattr(now, name)
            close = math.isclose(was, is_now, rel_tol=self._tolerance, abs_tol=0.1 * self._tolerance)
            if not close and not (math.isnan(was) and math.isnan(is_now)):
                raise ValueError(
                    f"{self._path} is the trace of another search: for {what} it has {name} {was:.8g}, and here it is "
                    f"{is_now:.8g}. Search with the objective and the precision that it was made with (a callable has "
                    "to give the same value each time), or start anew with another trace_path (--output)."
                )

    def _record(self, decision: Decision) -> None:
        step, losses, location = len(self.trace.rows), decision.losses, self._plan.locations[decision.layer]
        backbone = self._plan.backbone
        in_block = backbone is not None and location.level < len(backbone.towers[location.tower].blocks)
        row = TraceRow(
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
        self.trace.candidates.extend(
            TraceCandidate(step, candidate.layer, candidate.rank_ratio, *candidate.losses)
            for candidate in decision.candidates
        )
        self.trace.rows.append(row)
        if step >= len(self._done.rows):
            self._save()
        elif repr(row) != repr(self._done.rows[step]):  # as text, for a part of a callable's loss is NaN
            raise self._damaged(f"rows[{step}] is {tuple(self._done.rows[step])}, and by its candidates {tuple(row)}")

    def _save(self) -> None:
        if self._saves and self._path is not None:
            self.trace.save(self._path)

    def _damaged(self, why: str) -> ValueError:
        return ValueError(
            f"{self._path} is no trace of this search, or a damaged one: {why}. Start anew with overwrite "
            "(--overwrite), or with another trace_path (--output)."
        )


def _tolerance(dtype: torch.dtype) -> float:
    """How far two evaluations of one loss may be apart, relatively: other batches and devices round otherwise."""
    return max(1e-4, 4 * torch.finfo(dtype).eps)


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

"""The course of one search: what is evaluated, decided and recorded, step by step, or taken from a trace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from setar_peft.objectives.loss import LossValues
from setar_peft.search.decisions import (
    Decision,
    Prediction,
    Predictions,
    by_gain,
    greedy_search,
    joint_search,
    screened,
)
from setar_peft.search.evaluate import SmallerBatches
from setar_peft.search.plan import SearchPlan, Steps
from setar_peft.search.progress import SearchProgress
from setar_peft.search.trace import SearchTrace, TraceCandidate, TracePrediction, TraceRow
from setar_peft.tuner.config import SeTARConfig


class Course:
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
        self._known = {(row.step, row.module, row.rank_ratio): LossValues(*row[3:8]) for row in self._done.candidates}
        self._predictions: Predictions = {}
        self._trials = 0
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
        for decisions in self._decisions():
            self._best = decisions[-1].losses
            self.rank_ratios.update({decision.layer: decision.rank_ratio for decision in decisions})
            self._record(decisions)
        if len(self.trace.rows) < len(self._done.rows):
            raise self._damaged(f"it has {len(self._done.rows)} steps, and the search {len(self.trace.rows)}")
        self._check_decided()

    def _decisions(self) -> Iterator[list[Decision]]:
        """What is decided, and told, at once: a layer, or all of them in a round."""
        candidates, choose = self._plan.candidates.__getitem__, self._evaluator.choose
        if self._plan.order == "joint":
            return joint_search(
                list(self._plan.locations),
                self.trace.initial,
                self._predict,
                candidates,
                self._losses_together,
                choose,
                evaluations=self._plan.most_evaluations,
                criterion=self._criterion,
            )
        greedy = greedy_search(
            self._steps_of_pass,
            self.trace.initial,
            candidates,
            self._losses_screened if self._plan.is_screened else self._losses,
            choose,
            passes=self._config.passes,
            criterion=self._criterion,
        )
        return ([decision] for decision in greedy)

    def _steps_of_pass(self) -> Steps:
        if len(self.trace.candidates) == self._plan.most_evaluations:  # a gradient would have nothing to choose
            return []
        if self._plan.is_screened:
            predictions = self._predict()
        if self._plan.order != "best_first":
            return self._plan.steps
        gains = by_gain(
            predictions, lambda layer: [ratio for ratio in predictions[layer] if ratio != self.rank_ratios[layer]]
        )
        left = self._plan.evaluations() - len(self.trace.candidates)
        self._bar.expect(self._plan.work_of(list(gains)[:left], self._costs))
        return [[layer] for layer in (*gains, *(layer for layer in predictions if layer not in gains))]

    def _criterion(self, losses: LossValues) -> float:
        return losses.part(self._config.criterion)

    def _predict(self) -> Predictions:
        """What is predicted of every candidate at the present ratios: by the gradient, or as the trace has it."""
        step, wanted = len(self.trace.rows), {layer: (0.0, *ratios) for layer, ratios in self._plan.candidates.items()}
        seconds = self._plan.gradient_seconds(self._costs)
        known = {
            (one.module, one.rank_ratio): Prediction(*one[3:]) for one in self._done.predictions if one.step == step
        }
        if known:
            missing = [(layer, ratio) for layer in wanted for ratio in wanted[layer] if (layer, ratio) not in known]
            if missing:
                raise self._damaged(f"it predicts nothing of ratio {missing[0][1]:g} of {missing[0][0]} in step {step}")
            self._predictions = {layer: {ratio: known[layer, ratio] for ratio in wanted[layer]} for layer in wanted}
        else:
            if step < len(self._done.rows):
                raise self._damaged(f"it predicts nothing in step {step}")
            self._check_decided()
            self._bar.predicting()
            self._predictions = self._evaluator.predictions(self._config.criterion, self._plan.candidates)
        self._bar.predicted(seconds, evaluated=not known)
        self.trace.predictions.extend(
            TracePrediction(step, layer, ratio, *prediction)
            for layer, of_layer in self._predictions.items()
            for ratio, prediction in of_layer.items()
        )
        return self._predictions

    def _losses_screened(self, layer: str, ratios: Sequence[float]) -> dict[float, LossValues]:
        """Losses of a layer's best-predicted candidates."""
        is_best_first, most = self._plan.order == "best_first", self._plan.tried(layer)
        if self._plan.most_evaluations is not None:
            most = min(most, self._plan.most_evaluations - len(self.trace.candidates))
        return screened(
            self._predictions[layer],
            ratios,
            lambda ratio: self._losses(layer, [ratio])[ratio],
            self._criterion(self._best),
            most=most,
            criterion=self._criterion,
            only_gains=is_best_first,
        )

    def _losses(self, layer: str, ratios: Sequence[float]) -> dict[float, LossValues]:
        """Losses with one layer truncated by each of the ratios."""
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
        return dict(zip(ratios, values, strict=True))

    def _losses_together(self, changes: Mapping[str, float]) -> LossValues:
        """Losses with several layers given other ratios than they have."""
        is_known = len(self.trace.rows) < len(self._done.rows)
        if is_known:
            trial = self._trials
            known = [one for one in self._done.candidates if one.trial == trial]
            losses_told = {repr(one[3:8]) for one in known}
            if {one.module: one.rank_ratio for one in known} != changes or len(losses_told) != 1:
                raise self._damaged(
                    f"its evaluation {trial} is not one of the {len(changes)} changes that its predictions lead to"
                )
            losses = LossValues(*known[0][3:8])
        else:
            self._check_decided()
            for layer, ratio in self.rank_ratios.items():
                self._evaluator.choose(layer, changes.get(layer, ratio))
            losses = self._evaluator.present()
            if not math.isfinite(self._criterion(losses)):
                _warn_of_non_finite(f"{len(changes)} changes at once have", f"{self._criterion(losses)}")
        self._trials += 1
        finite = filter(math.isfinite, map(self._criterion, [self._best, losses]))
        self._bar.decided_together(
            self._plan.together_seconds(self._costs), len(changes), min(finite), evaluated=not is_known
        )
        return losses

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

    def _record(self, decisions: Sequence[Decision]) -> None:
        """Put what was decided at once into the trace, and save it."""
        known = len(self.trace.rows) < len(self._done.rows)
        for decision in decisions:
            row = self._row(len(self.trace.rows), decision)
            self.trace.candidates.extend(
                TraceCandidate(row.step, tried.layer, tried.rank_ratio, *tried.losses, tried.trial)
                for tried in decision.candidates
            )
            self.trace.rows.append(row)
            before = self._done.rows[row.step : row.step + 1]
            if known and not before:
                raise self._damaged(f"it ends with rows[{row.step - 1}], within a round")
            # As text, for a part of a callable's loss is NaN.
            if known and repr(row) != repr(before[0]):
                raise self._damaged(f"rows[{row.step}] is {tuple(before[0])}, and by its candidates {tuple(row)}")
        if not known:
            self._save()

    def _row(self, step: int, decision: Decision) -> TraceRow:
        losses, location, backbone = decision.losses, self._plan.locations[decision.layer], self._plan.backbone
        in_block = backbone is not None and location.level < len(backbone.towers[location.tower].blocks)
        return TraceRow(
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
        _warn_of_non_finite(f"Of {layer} some candidates have", ", ".join(bad))


def _warn_of_non_finite(what: str, values: str) -> None:
    warnings.warn(f"{what} no finite loss and cannot win: {values}.", RuntimeWarning, stacklevel=2)

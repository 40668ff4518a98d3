"""What an objective may do while its gradient is followed, and the sentence that it gets for what it may not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from setar_peft import LoCoOpObjective, SeTARConfig, estimate_cost, search_rank_ratios
from setar_peft.backbones import ImageFeatures
from setar_peft.objectives.loss import LossValues
from setar_peft.search.trace import SearchTrace

Clip = Callable[..., CLIPModel]
Objective = Callable[..., LoCoOpObjective]

SCREENED = SeTARConfig(search="screened")


def _predicted(model: CLIPModel, objective: LoCoOpObjective) -> list[float]:
    trace: SearchTrace = search_rank_ratios(model, objective, SCREENED, progress=False).trace
    return [one.change for one in trace.predictions]


class _OfSome(LoCoOpObjective):
    """The cross entropy of the images of class 0 alone."""

    sums_size = 2

    def sums(self, features: ImageFeatures, classes: Any, labels: Tensor) -> Tensor:
        counted = labels == 0
        if not counted.any():
            return torch.zeros(2, dtype=torch.float64)
        losses = F.cross_entropy(classes.logits(features.pooled)[counted], labels[counted], reduction="none")
        return torch.stack([losses.sum(), counted.sum()])

    def values(self, sums: Tensor) -> LossValues:
        return LossValues(float(sums[0] / sums[1]))


def test_batches_in_which_nothing_counts_change_nothing(load_clip: Clip, clip_objective: Objective) -> None:
    """Whether an objective is followed does not depend on how the data is cut."""
    found = []
    for size in (24, 5, 1):
        objective = clip_objective(batch_size=size)
        objective.__class__ = _OfSome
        assert sum(not bool((labels == 0).any()) for _, labels in objective.batches()) == {24: 0, 5: 4, 1: 20}[size]
        found.append(_predicted(load_clip(), objective))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


class _Accumulating(LoCoOpObjective):
    """Hands back one tensor, which it adds to."""

    def sums(self, features: ImageFeatures, classes: Any, labels: Tensor) -> Tensor:
        sums = super().sums(features, classes, labels)
        self._kept = sums + 0 * getattr(self, "_kept", 0)
        return self._kept


class _OfRoots(LoCoOpObjective):
    """The sum of the cross entropies, and the root of what is 0."""

    def values(self, sums: Any) -> LossValues:
        return LossValues(float(sums[0]) + math.sqrt(float(sums[2])))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            _Accumulating,
            {},
            r"gradient of the objective cannot be computed \(Trying to backward .*kept for the next batch.*'greedy'",
        ),
        (
            _OfRoots,
            {"top_k": 6},
            r"_OfRoots\.values fails where sums\[2\] is -7\.6\S* and not 0 \(.*Override slope.*'greedy'",
        ),
    ],
)
def test_sums_and_values_that_cannot_be_followed_get_a_sentence(
    load_clip: Clip, clip_objective: Objective, kind: type[LoCoOpObjective], settings: dict[str, Any], message: str
) -> None:
    model, objective = load_clip(), clip_objective(batch_size=7, **settings)
    objective.__class__ = kind
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        search_rank_ratios(model, objective, SCREENED, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def _squares(model: nn.Module) -> Tensor:
    return (model(torch.linspace(-1, 1, 80).view(10, 8)) - 0.3).square().mean()


@torch.enable_grad()
def _passed_back(model: nn.Module) -> Tensor:
    value = _squares(model)
    value.backward()
    return value


def _written_over(model: Any) -> Tensor:
    hidden = model[1](model[0](torch.linspace(-1, 1, 80).view(10, 8)))
    value = model[2](hidden).square().mean()
    with torch.no_grad():
        hidden.zero_()
    return value


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (_passed_back, "Trying to backward through the graph a second time"),
        (_written_over, "modified by an inplace operation"),
        (lambda model: torch.complex(_squares(model), torch.zeros(())), "real scalar outputs but got torch.complex64"),
        (lambda model: torch.special.zeta(3 + _squares(model), 1.0), "derivative for 'zeta' is not implemented"),
    ],
)
def test_a_callable_that_cannot_be_followed_gets_a_sentence(objective: Any, reason: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    config = SeTARConfig(search="screened", target_modules=["0", "2"], candidate_ratios=[0.25, 0.5])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"gradient of the objective cannot be computed \(.*{reason}.*'greedy'"):
        search_rank_ratios(model, objective, config, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_budget_that_is_spent_takes_no_further_gradient(
    load_clip: Clip, clip_objective: Objective, tmp_path: Path
) -> None:
    """Nor does the search that a trace is resumed from, whose last pass it is."""
    config = SeTARConfig(search="screened", order="best_first", evaluations=3, passes=3)
    path = tmp_path / "trace.json"
    trace = search_rank_ratios(load_clip(), clip_objective(), config, progress=False, trace_path=path).trace
    assert len(trace.candidates) == 3
    assert len(trace.changed()) > 0
    assert {one.step for one in trace.predictions} == {0}
    assert len(trace.rows) == len({row.module for row in trace.rows})
    resumed = search_rank_ratios(
        load_clip(), clip_objective(), config, progress=False, trace_path=path, resume=True
    ).trace
    assert resumed == trace


def test_an_estimate_within_inference_mode_gets_the_searchs_sentence(
    load_clip: Clip, clip_objective: Objective
) -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match=r"within torch\.inference_mode\(\) there are none"):
        estimate_cost(load_clip(), clip_objective(), SCREENED)


def test_a_layer_without_inputs_is_predicted_to_change_nothing() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="Initializing zero-element tensors"):
        model = nn.ModuleDict({"full": nn.Linear(8, 4), "empty": nn.Linear(0, 4)})
    inputs = torch.linspace(-1, 1, 24).view(3, 8)
    trace = search_rank_ratios(
        model,
        lambda model: (model["full"](inputs) + model["empty"](inputs[:, :0])).square().mean(),
        SeTARConfig(search="screened", target_modules=["full", "empty"], candidate_ratios=[0.5]),
        progress=False,
    ).trace
    assert {one.change for one in trace.predictions if one.module == "empty"} == {0}
    assert {row.module: row.best_ratio for row in trace.rows}["empty"] == 0


def test_a_product_that_overflows_predicts_nothing() -> None:
    """Gradient and weight are finite, and what is summed is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    config = SeTARConfig(search="screened", target_modules=["0", "2"], candidate_ratios=[0.25, 0.5])
    with pytest.raises(ValueError, match=r"gradient of 0 holds NaN or inf.* \(1 of 2 layers\), or is too large"):
        search_rank_ratios(
            model,
            lambda model: sum(weight.double().sum() * 1e38 for weight in model.parameters()),
            config,
            progress=False,
        )

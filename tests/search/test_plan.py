"""Work, counted: block passes by the formula and decompositions once a layer, in every order and for every target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, CLIPModel

import setar_peft.search.weights
from setar_peft import LoCoOpObjective, PatchMetricObjective, SeTARConfig, estimate_cost, search_rank_ratios
from setar_peft.search.passes import BlockPasses
from tests.backbones import checks
from tests.conftest import GOLDEN

BOTTOM_UP = [f"vision_model.encoder.layers.{level}.mlp.fc1" for level in range(4)]
ALL = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
TURNS = [BOTTOM_UP[3], "text_model.encoder.layers.0.mlp.fc1", BOTTOM_UP[0], "text_model.encoder.layers.2.mlp.fc1"]


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each layer was decomposed."""
    counted: Counter[str] = Counter()
    original = setar_peft.search.weights.decompose

    def decompose(*args: Any, name: str, **settings: Any) -> Any:
        counted[name] += 1
        return original(*args, name=name, **settings)

    monkeypatch.setattr(setar_peft.search.weights, "decompose", decompose)
    return counted


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "vision_text"},
        {"order": "text_vision"},
        {"order": "vision"},
        {"order": "text"},
        {"order": "exhaustive"},
        {"order": BOTTOM_UP},
        {"order": TURNS},
        {"passes": 3},
        {"passes": 2, "order": "exhaustive"},
        {"target_modules": ["visual_projection", "text_projection", "mlp.fc1"]},
        {"target_modules": ["visual_projection", "text_projection"], "order": "interleaved"},
        {"target_modules": ["self_attn.q_proj", "self_attn.v_proj", "mlp.fc2"]},
        *(
            {"search": "screened", **settings}
            for settings in (
                {"verify": 1},
                {"verify": 2, "order": "text_vision"},
                {"verify": 99, "order": "exhaustive"},
                {"order": TURNS},
                {"order": "text"},
                {"passes": 3},
                {"target_modules": ["visual_projection", "text_projection"]},
                {"target_modules": ["visual_projection", "mlp.fc1"], "order": "best_first"},
                {"target_modules": ALL, "order": "best_first", "passes": 2},
                {"target_modules": ALL, "order": "best_first", "verify": 2, "evaluations": 5},
                {"target_modules": ALL, "order": "best_first", "evaluations": 1},
                {"order": BOTTOM_UP[2:]},
                {"order": "joint"},
                {"target_modules": ALL, "order": "joint", "evaluations": 4},
                {"target_modules": ["self_attn.k_proj"], "order": "joint"},
            )
        ),
    ],
    ids=str,
)
def test_every_order_takes_the_passes_of_the_formula(
    load_clip: Callable[..., CLIPModel],
    clip_objective: Callable[..., LoCoOpObjective],
    decompositions: Counter[str],
    settings: dict[str, Any],
) -> None:
    objective = clip_objective(batch_size=7)
    checks.takes_the_passes_of_the_formula(load_clip(), objective, **settings)
    assert set(decompositions.values()) == {1}


def test_towers_that_take_turns(
    load_clip: Callable[..., CLIPModel], golden_clip: dict[str, Any], class_names: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "cases" / "clip_tiny_eq")
    objective = LoCoOpObjective(
        tokenizer, class_names, golden_clip["pixel_values"], golden_clip["labels"], ood_weight=0.1, top_k=2
    )
    checks.takes_the_passes_of_the_formula(load_clip("clip_tiny_eq"), objective, order="interleaved")


def test_the_default_order_has_a_closed_form() -> None:
    """J N (N + 1) / 2 passes of candidates, N on the way to the base's loss, and N for features of decided weights."""
    candidates, depths = 8, {"vision": 12, "text": 12}
    passes = BlockPasses(depths)
    for tower in depths:
        for level in reversed(range(12)):
            passes.evaluate(tower, level, candidates)
            passes.change(tower, level)
    # What was decided last is the result's loss already: the second tower's features are not needed again.
    assert passes.count == {"vision": 8 * 78 + 24, "text": 8 * 78 + 12}


def _losses_of(model: nn.Module, seen: list[float]) -> float:
    seen.append(float(model[0].weight.square().sum()))
    return -seen[-1]


def test_candidates_that_remove_the_same_are_evaluated_once() -> None:
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2)), []
    config = SeTARConfig(target_modules=["0", "1"], candidate_ratios=[0.05, 0.3, 0.2, 0.25, 0.4, 0.35])
    with pytest.warns(UserWarning, match="not evaluated") as warned:
        trace = search_rank_ratios(model, lambda candidate: _losses_of(candidate, seen), config, progress=False).trace
    text = str(warned[0].message)
    for piece in (
        "of 8 components 0.05 removes none, 0.2 the same 2 as 0.3, 0.25 the same 2 as 0.3, 0.35 the same 3 as 0.4 (0)",
        "of 2 components 0.05 removes none, 0.2 removes none, 0.25 removes none, 0.4 the same 1 as 0.3, 0.35 the",
    ):
        assert piece in text
    assert {(candidate.module, candidate.rank_ratio) for candidate in trace.candidates} == {
        ("1", 0.3),
        ("0", 0.3),
        ("0", 0.4),
    }
    assert len(seen) == 1 + len(trace.candidates)
    assert [row.module for row in trace.rows] == ["1", "0"]


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ("callable", {"criterion": "id"}, "criterion is 'id', and function has no such part; give one of 'total'"),
        ("metric", {"criterion": "ood"}, "criterion is 'ood', and PatchMetricObjective has no such part"),
        (
            "loss",
            {"candidate_ratios": {"w_up": [0.2], "default": [0.1]}},
            "candidate_ratios names w_up, which is not searched; searched are W_up",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(
    load_clip: Callable[..., CLIPModel],
    clip_objective: Callable[..., LoCoOpObjective],
    objective: str,
    settings: dict[str, Any],
    message: str,
) -> None:
    given: Any = clip_objective()
    if objective == "callable":
        given = lambda _: 0.0  # noqa: E731
    elif objective == "metric":
        given = PatchMetricObjective(
            given._prompts._tokenizer, given.class_names, given.images._images, given.images.labels
        )
    with pytest.raises(ValueError, match=message):
        search_rank_ratios(load_clip(), given, SeTARConfig(**settings), progress=False)


def test_where_no_candidate_removes_anything_there_is_nothing_to_search() -> None:
    config = SeTARConfig(target_modules=["0"], candidate_ratios=[0.05, 0.1])
    with pytest.raises(
        ValueError, match=r"No candidate of any layer removes anything: of 4 components 0\.05 removes none, 0\.1"
    ):
        search_rank_ratios(nn.Sequential(nn.Linear(4, 4)), lambda _: 0.0, config, progress=False)


def test_the_estimate_counts_what_is_evaluated(
    load_clip: Callable[..., CLIPModel], clip_objective: Callable[..., LoCoOpObjective]
) -> None:
    """Of 64 components in one tower and 48 in the other, 0.25 and 0.255 are the same 16 and the same 12."""
    config = SeTARConfig(candidate_ratios=[0.005, 0.25, 0.255])
    estimate = estimate_cost(load_clip(), clip_objective(), config)
    same = r"of 64 components 0\.005 removes none, 0\.255 the same 16 as 0\.25 \(vision.* and 3 more\); of 48 .* 2 more"
    with pytest.warns(UserWarning, match=same):
        trace = search_rank_ratios(load_clip(), clip_objective(), config, progress=False).trace
    assert len(trace.candidates) == estimate.evaluations == 7

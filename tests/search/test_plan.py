"""Work, counted: block passes by the formula and decompositions once a layer, in every order and for every target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer, CLIPModel

import setar_peft.search.weights
from setar_peft import LoCoOpObjective
from setar_peft.search.plan import BlockPasses
from tests.backbones import checks
from tests.conftest import GOLDEN

BOTTOM_UP = [f"vision_model.encoder.layers.{level}.mlp.fc1" for level in range(4)]
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

"""The predicted cost against the work that a search then does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from transformers import CLIPModel

from setar_peft import LoCoOpObjective, SeTARConfig, estimate_cost, search_rank_ratios
from setar_peft.backbones import backbone_of

Clip = Callable[..., CLIPModel]
Objective = Callable[..., LoCoOpObjective]


@pytest.mark.parametrize("order", ["vision_text", "text", "exhaustive"])
def test_the_work_stays_within_the_estimate(load_clip: Clip, clip_objective: Objective, order: str) -> None:
    config = SeTARConfig(order=order, candidate_ratios=[0.1, 0.3])
    model, objective = load_clip(), clip_objective()
    estimate = estimate_cost(model, objective, config)
    passes: Counter[str] = Counter()
    for tower in backbone_of(model).towers.values():
        for block in tower.blocks:
            block.register_forward_hook(lambda *_, name=tower.name: passes.update([name]))
    trace = search_rank_ratios(model, objective, config, progress=False).trace
    assert len(trace.candidates) <= estimate.evaluations
    if order != "exhaustive":
        assert len(trace.candidates) == estimate.evaluations
        assert all(passes[tower] <= estimate.block_passes[tower] for tower in passes)
    assert estimate.images == 24
    assert estimate.classes == 6


def test_sizes_are_those_of_the_tensors(load_clip: Clip, clip_objective: Objective) -> None:
    estimate = estimate_cost(load_clip(), clip_objective(), SeTARConfig(order="vision", recording_memory=0.0))
    vision_level, text_level = 24 * 17 * 64 * 4, 6 * 14 * 48 * 4
    assert estimate.recorded_bytes == 4 * vision_level + 3 * text_level
    assert estimate.kept_bytes == vision_level + text_level
    assert estimate.weight_bytes == 8 * 256 * 64 * 4
    # Multiply-adds of the linear layers of a vision block for all images; attention comes on top.
    linear = 24 * 17 * 2 * (4 * 64 * 64 + 2 * 64 * 256)
    assert estimate.flops > 0.5 * linear * estimate.block_passes["vision"]
    assert "about" in estimate.table()
    assert estimate.to_dict()["layers"] == 4


def test_the_model_is_left_alone_and_callables_are_refused(load_clip: Clip, clip_objective: Objective) -> None:
    model = load_clip().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    estimate_cost(model, clip_objective())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"callable objective cannot be predicted; give an Objective"):
        estimate_cost(model, lambda _: 0.0)  # type: ignore[arg-type]

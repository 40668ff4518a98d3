"""The predicted cost against the work that a search then does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from setar_peft import LoCoOpObjective, SeTARConfig, estimate_cost, search_rank_ratios
from setar_peft.search.estimate import PeakMemory

Clip = Callable[..., CLIPModel]
Objective = Callable[..., LoCoOpObjective]


@pytest.mark.parametrize("order", ["vision_text", "text", "exhaustive"])
def test_candidates_are_counted(load_clip: Clip, clip_objective: Objective, order: str) -> None:
    config = SeTARConfig(order=order, candidate_ratios=[0.1, 0.3])
    model, objective = load_clip(), clip_objective()
    estimate = estimate_cost(model, objective, config)
    trace = search_rank_ratios(model, objective, config, progress=False).trace
    if order == "exhaustive":
        assert len(trace.candidates) <= estimate.evaluations
    else:
        assert len(trace.candidates) == estimate.evaluations
    assert (estimate.images, estimate.classes) == (24, 6)


def test_sizes_are_those_of_the_tensors(load_clip: Clip, clip_objective: Objective) -> None:
    estimate = estimate_cost(load_clip(), clip_objective(), SeTARConfig(order="vision", recording_memory=0.0))
    # Of the prompts, each of at most 14 tokens, the first 5 are the same: one row for them, and one for each prompt.
    vision_level, text_level = 24 * 17 * 64 * 4, (1 + 6) * (14 - 5) * 48 * 4
    features = 4 * 32 * (24 * 17 + 6)
    assert estimate.recorded_bytes == 4 * vision_level + 3 * text_level + features
    assert (estimate.kept_bytes, estimate.disk_bytes) == (0, vision_level + text_level)
    weight, rank = 256 * 64 * 4, 26  # 40 % of 64 components
    chosen = 4 * (weight + (256 + 64) * rank * 4)
    assert estimate.weight_bytes == chosen + 8 * weight + (2 * (256 + 64) + 256) * 64 * 4
    # Multiply-adds of the linear layers of a vision block for all images; attention comes on top.
    linear = 24 * 17 * 2 * (4 * 64 * 64 + 2 * 64 * 256)
    assert estimate.flops > 0.5 * linear * estimate.block_passes["vision"]
    assert "about" in estimate.table()
    assert estimate.to_dict()["layers"] == 4
    assert estimate.to_dict()["peak_bytes"] == estimate.peak_bytes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recording_memory": 0.0},
        {"recording_memory": 2e-4},
        {"order": "text_vision", "candidate_ratios": [0.4]},
        {"order": "exhaustive", "candidate_ratios": [0.1, 0.3], "recording_memory": 2e-4},
        {"passes": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [24, 5])
def test_memory_stays_within_the_estimate(
    load_clip: Clip, clip_objective: Objective, settings: dict[str, Any], batch_size: int
) -> None:
    model, objective, config = load_clip(), clip_objective(batch_size=batch_size), SeTARConfig(**settings)
    estimate = estimate_cost(model, objective, config)
    with PeakMemory() as memory:
        search_rank_ratios(model, objective, config, progress=False)
    assert 0.4 * estimate.peak_bytes < memory.peak <= estimate.peak_bytes


def test_with_a_budget_memory_does_not_grow_with_the_images(load_clip: Clip, clip_objective: Objective) -> None:
    """What stands for the images beyond the budget is on disk: ten times the images, the same peak."""

    def peak(images: int, memory: float | None) -> int:
        objective = clip_objective(batch_size=12)
        pixels = objective.images._images
        objective.images._images = pixels.repeat(images // len(pixels), 1, 1, 1)
        objective.images.labels = objective.images.labels.repeat(images // len(pixels))
        objective.images.numbers = range(len(objective.images.labels))
        config, model = SeTARConfig(candidate_ratios=[0.2], recording_memory=memory), load_clip()
        with PeakMemory() as measured:
            search_rank_ratios(model, objective, config, progress=False)
        return measured.peak

    assert peak(480, 2e-4) <= 1.05 * peak(48, 2e-4)
    assert peak(480, None) > 3 * peak(48, None)


def test_the_model_is_left_alone_and_callables_are_refused(load_clip: Clip, clip_objective: Objective) -> None:
    model = load_clip().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    estimate_cost(model, clip_objective())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    grey = LoCoOpObjective(None, ["a", "b"], torch.randn(2, 1, 8, 8), [0, 1])
    with pytest.raises(ValueError, match=r"The images have shape \(2, 1, 8, 8\); this model takes \(images, 3"):
        estimate_cost(model, grey)
    with pytest.raises(ValueError, match=r"callable objective cannot be predicted; give an Objective"):
        estimate_cost(model, lambda _: 0.0)  # type: ignore[arg-type]

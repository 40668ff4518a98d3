"""What the dry run says that a gradient takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import CLIPModel

from setar_peft import LoCoOpObjective, SeTARConfig, estimate_cost, search_rank_ratios
from setar_peft.backbones.untouched import left_as_it_was
from setar_peft.search.estimate import PeakMemory
from setar_peft.search.plan import plan_search
from setar_peft.search.replay import ReplayEvaluator

TARGETS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]


@pytest.mark.parametrize("batch_size", [1, 24])
def test_the_gradients_of_earlier_batches_stand_beside_a_batchs_graph(
    load_clip: Callable[..., CLIPModel], clip_objective: Callable[..., LoCoOpObjective], batch_size: int
) -> None:
    config = SeTARConfig(search="screened", order="vision", target_modules=TARGETS)
    objective = clip_objective(batch_size=batch_size)
    estimate = estimate_cost(load_clip(), objective, config)
    model = load_clip()
    plan = plan_search(model, objective, config)
    assert plan.backbone is not None
    with left_as_it_was(model):
        evaluator = ReplayEvaluator(
            objective, plan.backbone, list(plan.locations), "minor", 0, keep_decompositions=True
        )
        evaluator.present()
        with PeakMemory() as memory:
            evaluator.gradients("total")
    assert 0.95 * estimate.gradient_bytes < memory.peak <= estimate.gradient_bytes
    with PeakMemory() as memory:
        search_rank_ratios(load_clip(), objective, config, progress=False)
    assert memory.peak <= estimate.peak_bytes

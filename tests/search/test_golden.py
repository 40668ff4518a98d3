"""Every search of the published code on the tiny models: the same decisions, the same losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CLIPModel

import setar_peft.search.weights
from setar_peft import LoCoOpObjective, SeTARConfig, search_rank_ratios
from setar_peft.decomposition import decompose
from setar_peft.objectives.loss import LossValues
from setar_peft.search.decisions import greedy_search
from tests.conftest import GOLDEN, read_json

TARGETS = {"W_up": ["mlp.fc1"], "W_q": ["self_attn.q_proj"]}
ORDERS = {
    "visual_text": "vision_text",
    "text_visual": "text_vision",
    "visual_only": "vision",
    "layer_exhaustive": "exhaustive",
    "modality_interleaved": "interleaved",
}
SEARCHES = [
    "clip_vt_up_small",
    "clip_tv_up_small",
    "clip_v_up_small_k6_no_ood",
    "clip_vt_q_small",
    "clip_vt_up_large",
    "clip_vt_up_small_proj",
    "clip_exh_up_small",
]


@pytest.fixture(scope="module")
def loss_tolerance() -> float:
    """1e-5 where this machine's LAPACK repeats the published pruned weights, else their own float noise.

    A float32 decomposition differs in its last digits between LAPACKs; at a logit scale of 100 that moves a loss by up
    to 4e-5, which is what the published losses themselves differ by from a float64 computation.
    """
    from safetensors.torch import load_file

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tensors = load_file(GOLDEN / "tensors_clip_tiny.safetensors")
    model = CLIPModel.from_pretrained(GOLDEN / "cases" / "clip_tiny")
    name = "vision_model.encoder.layers.3.mlp.fc1"
    kept = decompose(model.get_submodule(name).weight).kept(0.3)
    torch.set_num_threads(threads)
    repeats = torch.allclose(kept, tensors[f"pruned_small.{name}.weight"], rtol=0, atol=3e-7)
    return 1e-5 if repeats else 4e-5


def _golden_losses(golden: dict[str, Any]) -> dict[tuple[Any, ...], list[float]]:
    return {tuple(row[:5]): row[5:] for row in golden["evals"]}


def _key(step: int, tower: str, weight: str, layer: int | None, ratio: float) -> tuple[Any, ...]:
    return step, {"vision": "visual"}.get(tower, tower), weight, layer, ratio


@pytest.fixture(params=["lapack", "gram"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """How near the published losses are, by the decomposition of CPUs and by that of GPUs.

    The latter is exact where the published figures carry the rounding of a float32 decomposition, up to 4e-5.
    """
    if request.param == "lapack":
        return request.getfixturevalue("loss_tolerance")

    def by_gram(*args: Any, **settings: Any) -> Any:
        return decompose(*args, **{**settings, "by_gram": True})

    monkeypatch.setattr(setar_peft.search.weights, "decompose", by_gram)
    return 5e-5


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.usefixtures("one_thread")
def test_search_repeats_the_published_code(
    name: str,
    load_clip: Callable[..., CLIPModel],
    clip_objective: Callable[..., LoCoOpObjective],
    tolerance: float,
) -> None:
    golden = read_json(GOLDEN / f"{name}.json")
    settings = golden["config"]
    targets = [*TARGETS[settings["weight_type"]]]
    if settings["with_proj"]:
        targets += ["visual_projection", "text_projection"]
    config = SeTARConfig(
        target_modules=targets,
        order=ORDERS[settings["searcher"]],
        prune={"small": "minor", "large": "principal"}[settings["prune"]],
        candidate_ratios=settings["ratios"],
    )
    objective = clip_objective(ood_weight=settings["lam"], top_k=settings["top_k"])

    trace = search_rank_ratios(load_clip(settings["model"]), objective, config, progress=False).trace

    decided = [list(_key(0, r.tower_type, r.weight_type, r.layer_num, r.best_ratio)[1:]) for r in trace.rows]
    assert decided == golden["chosen"]
    assert trace.rows[-1].total_loss == pytest.approx(golden["best_by_step"][-1][-1], abs=tolerance)
    expected = _golden_losses(golden)
    rows = {row.module: row for row in trace.rows}
    for candidate in trace.candidates:
        row = rows[candidate.module]
        losses = expected[_key(candidate.step, row.tower_type, row.weight_type, row.layer_num, candidate.rank_ratio)]
        assert candidate[3:6] == pytest.approx(losses[:3], abs=tolerance)
        assert 100 * candidate.accuracy == pytest.approx(losses[3], abs=1e-3)
        assert 100 * candidate.ood_patch_share == pytest.approx(losses[4], abs=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_interleaved_search_repeats_the_published_code(
    load_clip: Callable[..., CLIPModel],
    class_names: list[str],
    golden_clip: dict[str, torch.Tensor],
    loss_tolerance: float,
) -> None:
    from transformers import AutoTokenizer

    golden = read_json(GOLDEN / "eq_inter_up_small.json")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "cases" / "clip_tiny_eq")
    objective = LoCoOpObjective(
        tokenizer, class_names, golden_clip["pixel_values"], golden_clip["labels"], ood_weight=0.1, top_k=2
    )
    config = SeTARConfig(order="interleaved", candidate_ratios=golden["config"]["ratios"])
    trace = search_rank_ratios(load_clip("clip_tiny_eq"), objective, config, progress=False).trace
    decided = [list(_key(0, r.tower_type, r.weight_type, r.layer_num, r.best_ratio)[1:]) for r in trace.rows]
    assert decided == golden["chosen"]
    assert [row.total_loss for row in trace.rows] == pytest.approx(
        [row[-1] for row in golden["best_by_step"]], abs=loss_tolerance
    )


@pytest.mark.usefixtures("one_thread")
def test_random_pruning_has_the_published_losses(
    load_clip: Callable[..., CLIPModel], clip_objective: Callable[..., LoCoOpObjective], loss_tolerance: float
) -> None:
    """The published code draws anew at each evaluation and recorded what it drew: the same draw, the same loss."""
    golden = read_json(GOLDEN / "clip_vt_up_random_s5.json")
    objective, model = clip_objective(), load_clip()
    for row, dropped in zip(golden["evals"], golden["random_dropped_idx"], strict=True):
        pruned = {f"{name}.weight": _without(model, name, components) for name, components in dropped.items()}
        originals = {name: model.get_parameter(name).clone() for name in pruned}
        model.load_state_dict(pruned, strict=False)
        losses = objective.losses(model)
        model.load_state_dict(originals, strict=False)
        assert losses[:3] == pytest.approx(row[5:8], abs=loss_tolerance)


def _without(model: CLIPModel, name: str, components: list[int]) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(model.get_submodule(name).weight.detach(), full_matrices=False)
    kept = [index for index in range(len(s)) if index not in components]
    return (u[:, kept] * s[kept]) @ vh[kept]


def _decisions(golden: dict[str, Any]) -> list[float]:
    rows = [(row[1], row[3], row[4], row[5]) for row in golden["evals"]]
    losses = {(f"{tower}.{layer}", ratio): loss for tower, layer, ratio, loss in rows}
    layers = list(dict.fromkeys(f"{tower}.{layer}" for tower, layer, _, _ in rows))
    ratios = sorted({ratio for _, _, ratio, _ in rows} - {0.0})
    chosen: list[float] = []
    decisions = greedy_search(
        lambda: [[layer] for layer in layers],
        LossValues(losses[layers[0], 0.0]),
        lambda _: ratios,
        lambda layer, candidates: {ratio: LossValues(losses[layer, ratio]) for ratio in candidates},
        lambda _, ratio: chosen.append(ratio),
    )
    taken = [decision.rank_ratio for decision in decisions]
    assert chosen == [ratio for ratio in taken if ratio > 0]
    return taken


@pytest.mark.parametrize("name", ["authors_clip_base_imagenet1k", "clip_vt_up_random_s5"])
def test_greedy_loop_takes_the_recorded_decisions(name: str) -> None:
    """Driven by recorded losses alone; those of the authors are a real run on ImageNet."""
    golden = read_json(GOLDEN / f"{name}.json")
    expected = [ratio[-1] if isinstance(ratio, list) else ratio for ratio in golden["chosen"]]
    assert _decisions(golden) == expected
    # The comparison can fail: a loss moved below the winner's is another decision.
    golden["evals"][1][5] = min(row[5] for row in golden["evals"]) - 1
    assert _decisions(golden) != expected

"""What a search promises beyond its figures: no trace left behind, counted work, batches that change nothing."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import CLIPModel
from transformers.pytorch_utils import Conv1D

import setar_peft.search.replay
from setar_peft import LoCoOpObjective, SeTARConfig, search_rank_ratios
from setar_peft.search.trace import SearchTrace

Clip = Callable[..., CLIPModel]
Objective = Callable[..., LoCoOpObjective]


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()],
        "rng": (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
    }


def _assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, (identity, values, requires_grad) in before["parameters"].items():
        assert after["parameters"][name][0] == identity
        assert after["parameters"][name][2] == requires_grad
        assert torch.equal(after["parameters"][name][1], values)
    for name, values in before["buffers"].items():
        assert torch.equal(after["buffers"][name], values)
    assert before["training"] == after["training"]
    assert before["hooks"] == after["hooks"]
    assert torch.equal(before["rng"][0], after["rng"][0])
    assert before["rng"][1:] == after["rng"][1:]


def test_the_model_is_left_as_it_was(load_clip: Clip, clip_objective: Objective) -> None:
    model = load_clip()
    model.train()
    model.vision_model.encoder.layers[1].eval()
    before = _snapshot(model)
    result = search_rank_ratios(model, clip_objective(), progress=False)
    assert any(result.rank_ratios.values())
    _assert_same(before, _snapshot(model))


@pytest.mark.parametrize("stop_after", [0, 3, 40])
def test_an_interrupted_search_leaves_the_model_as_it_was(
    load_clip: Clip, clip_objective: Objective, stop_after: int
) -> None:
    class Interrupted(LoCoOpObjective):
        def sums(self, *args: Any) -> torch.Tensor:
            counted["sums"] += 1
            if counted["sums"] > stop_after:
                raise KeyboardInterrupt
            return super().sums(*args)

    counted: Counter[str] = Counter()
    objective = clip_objective()
    objective.__class__ = Interrupted
    model = load_clip()
    model.train()
    before = _snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        search_rank_ratios(model, objective, progress=False)
    _assert_same(before, _snapshot(model))


@pytest.mark.parametrize(
    "targets", [["mlp.fc1"], ["self_attn.q_proj"], ["visual_projection", "text_projection", "mlp.fc2"]]
)
def test_replay_computes_what_full_evaluation_computes(
    load_clip: Clip, clip_objective: Objective, targets: list[str]
) -> None:
    """An independent path: the model's whole forward for each candidate, through the objective as a plain callable."""
    objective = clip_objective(12)
    config = SeTARConfig(target_modules=targets, candidate_ratios=[0.1, 0.3])
    replayed = search_rank_ratios(load_clip(), objective, config, progress=False)
    full = search_rank_ratios(load_clip(), lambda model: objective(model), config, progress=False)
    assert replayed.rank_ratios == full.rank_ratios
    assert [c.total_loss for c in replayed.trace.candidates] == pytest.approx(
        [c.total_loss for c in full.trace.candidates], abs=2e-6
    )


def test_sharing_within_a_block_is_seen_to_be_right(
    load_clip: Clip, clip_objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without replay within the block every figure stays the same, and the attention runs once a candidate."""
    calls: Counter[str] = Counter()

    def losses() -> list[float]:
        model = load_clip()
        calls.clear()
        for block in model.vision_model.encoder.layers:
            block.self_attn.q_proj.register_forward_hook(lambda *_: calls.update(attention=1))
        trace = search_rank_ratios(model, clip_objective(), SeTARConfig(order="vision"), progress=False).trace
        return [candidate.total_loss for candidate in trace.candidates]

    shared = losses()
    with_sharing = calls["attention"]

    class NoSharing(setar_peft.search.replay.SharedPrefix):
        def __init__(self, modules: Any, target: nn.Module) -> None:
            super().__init__([], target)

    monkeypatch.setattr(setar_peft.search.replay, "SharedPrefix", NoSharing)
    assert losses() == pytest.approx(shared, abs=1e-7)
    # The last block's projections are called one by one: there a hook still sees a call that is only handed back.
    blocks, candidates = 3, 8
    assert calls["attention"] - with_sharing == blocks * (candidates - 1)


def test_images_are_decoded_once_and_prompts_tokenised_once(load_clip: Clip, clip_objective: Objective) -> None:
    objective = clip_objective(batch_size=5)
    calls: Counter[str] = Counter()
    batches, tokens = objective.batches, objective.class_tokens
    objective.batches = lambda: calls.update(batches=1) or batches()  # type: ignore[method-assign]
    objective.class_tokens = lambda backbone: calls.update(tokens=1) or tokens(backbone)  # type: ignore[method-assign]
    search_rank_ratios(load_clip(), objective, progress=False)
    assert calls == {"batches": 1, "tokens": 1}


def test_batch_size_and_order_change_nothing(load_clip: Clip, clip_objective: Objective) -> None:
    results = [search_rank_ratios(load_clip(), clip_objective(batch_size=size), progress=False) for size in (1, 7, 24)]
    shuffled = clip_objective(batch_size=7)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled.images._images, shuffled.images.labels = shuffled.images._images[order], shuffled.images.labels[order]
    results.append(search_rank_ratios(load_clip(), shuffled, progress=False))
    for result in results[1:]:
        assert result.rank_ratios == results[0].rank_ratios
        assert [row.total_loss for row in result.trace.rows] == pytest.approx(
            [row.total_loss for row in results[0].trace.rows], abs=1e-6
        )


@pytest.mark.parametrize("memory", [0.0, 3e-4])
def test_little_memory_costs_work_and_changes_nothing(
    load_clip: Clip, clip_objective: Objective, memory: float
) -> None:
    config = SeTARConfig(target_modules=["mlp.fc1"])
    roomy = search_rank_ratios(load_clip(), clip_objective(), config, progress=False)
    config.recording_memory = memory
    tight = search_rank_ratios(load_clip(), clip_objective(), config, progress=False)
    assert tight.rank_ratios == roomy.rank_ratios
    assert [c.total_loss for c in tight.trace.candidates] == [c.total_loss for c in roomy.trace.candidates]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bases_in_half_precision_search_too(load_clip: Clip, clip_objective: Objective, dtype: torch.dtype) -> None:
    model = load_clip(dtype=dtype)
    before = _snapshot(model)
    result = search_rank_ratios(model, clip_objective(), progress=False)
    assert result.trace.rows[-1].total_loss < result.trace.initial.total
    _assert_same(before, _snapshot(model))


def test_several_passes_never_get_worse_and_end_when_nothing_changes(
    load_clip: Clip, clip_objective: Objective
) -> None:
    once = search_rank_ratios(load_clip(), clip_objective(), progress=False)
    often = search_rank_ratios(load_clip(), clip_objective(), SeTARConfig(passes=9), progress=False)
    losses = [row.total_loss for row in often.trace.rows]
    assert losses[: len(once.trace.rows)] == [row.total_loss for row in once.trace.rows]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) < 9 * len(once.trace.rows)
    last = {row.module: row.best_ratio for row in often.trace.rows}
    assert last == often.rank_ratios
    objective = clip_objective()
    full = search_rank_ratios(load_clip(), lambda model: objective(model), SeTARConfig(passes=9), progress=False)
    assert full.rank_ratios == often.rank_ratios


def test_a_plain_callable_works_for_any_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Conv1D(4, 16))
    inputs, wanted = torch.randn(32, 8), torch.randn(32, 4)

    @torch.no_grad()
    def loss(candidate: nn.Module) -> float:
        return float(nn.functional.mse_loss(candidate(inputs), wanted))

    config = SeTARConfig(target_modules=["0", "2"], candidate_ratios=[0.25, 0.5])
    result = search_rank_ratios(model, loss, config, progress=False)
    assert [row.module for row in result.trace.rows] == ["2", "0"]
    assert result.trace.rows[-1].total_loss <= loss(model)
    with torch.no_grad():
        for name, (b0, a0) in result.residuals.items():
            layer = model.get_submodule(name)
            layer.weight -= (b0 @ a0).T if isinstance(layer, Conv1D) else b0 @ a0
    assert loss(model) == pytest.approx(result.trace.rows[-1].total_loss, abs=1e-6)


def test_a_loss_that_is_not_finite_never_wins() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    values = iter([1.0, float("nan"), -float("inf"), 2.0])
    config = SeTARConfig(target_modules=["0"], candidate_ratios=[0.25, 0.5, 0.75])
    with pytest.warns(RuntimeWarning, match=r"Of 0 some .* cannot win: nan at ratio 0\.25, -inf at ratio 0\.5\."):
        result = search_rank_ratios(model, lambda _: next(values), config, progress=False)
    assert result.rank_ratios == {"0": 0.0}


def test_trace_is_on_disk_after_each_step(load_clip: Clip, clip_objective: Objective, tmp_path: Any) -> None:
    path = tmp_path / "trace.json"
    result = search_rank_ratios(load_clip(), clip_objective(), progress=False, trace_path=path)
    assert SearchTrace.load(path) == result.trace
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json"]
    table = result.trace.table().splitlines()
    assert table[0].split() == [
        *("step", "tower_type", "weight_type", "layer_num", "best_ratio"),
        *("total_loss", "id_loss", "ood_loss", "val_acc", "ood_patch_percent"),
    ]
    assert len(table) == 1 + len(result.trace.rows)
    assert len(result.trace.to_csv().splitlines()) == len(table)


def _nan_weight(model: CLIPModel) -> CLIPModel:
    with torch.no_grad():
        model.vision_model.encoder.layers[2].mlp.fc1.weight[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("config", "pieces"),
    [
        ({"target_modules": ["fc9"]}, ["fc9", "CLIPModel", "named_modules"]),
        ({"order": "interleaved"}, ["interleaved", "vision 4", "text 3", "vision_text"]),
        ({"order": ["vision_model.encoder.layers.7.mlp.fc1"]}, ["vision_model.encoder.layers.7", "target_modules"]),
        ({"target_modules": ["text_model.encoder.layers.0.mlp.fc1"], "order": "vision"}, ["vision", "no layer"]),
    ],
)
def test_wrong_settings_get_a_sentence(
    load_clip: Clip, clip_objective: Objective, config: dict[str, Any], pieces: list[str]
) -> None:
    model = load_clip()
    before = _snapshot(model)
    with pytest.raises(ValueError, match=r"\.$") as error:
        search_rank_ratios(model, clip_objective(), SeTARConfig(**config), progress=False)
    for piece in pieces:
        assert piece in str(error.value)
    _assert_same(before, _snapshot(model))


def test_wrong_inputs_get_a_sentence(load_clip: Clip, clip_objective: Objective) -> None:
    objective = clip_objective()
    objective.images._images = objective.images._images[..., :16, :16]
    with pytest.raises(ValueError, match=r"(24, 3, 16, 16).*\(images, 3, 32, 32\)"):
        search_rank_ratios(load_clip(), objective, progress=False)
    with pytest.raises(ValueError, match="loss of the base model is nan"):
        search_rank_ratios(_nan_weight(load_clip()), clip_objective(), progress=False)
    with pytest.raises(ValueError, match="objective is a int"):
        search_rank_ratios(load_clip(), 3, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no known backbone.*callable objective"):
        search_rank_ratios(nn.Linear(2, 2), clip_objective(), progress=False)
    with pytest.raises(ValueError, match=r"W_up of model type None.*target_modules"):
        search_rank_ratios(nn.Sequential(nn.Linear(2, 2)), lambda _: 0.0, progress=False)


@pytest.mark.parametrize(("criterion", "part"), [("id", "id_loss"), ("ood", "ood_loss")])
def test_a_part_of_the_loss_can_be_the_criterion(
    load_clip: Clip, clip_objective: Objective, criterion: str, part: str
) -> None:
    result = search_rank_ratios(load_clip(), clip_objective(), SeTARConfig(criterion=criterion), progress=False)
    minimised = [getattr(row, part) for row in result.trace.rows]
    assert minimised == sorted(minimised, reverse=True)
    for row in result.trace.rows:
        tried = [getattr(c, part) for c in result.trace.candidates if c.step == row.step]
        assert getattr(row, part) <= min(tried)
    by_total = search_rank_ratios(load_clip(), clip_objective(), progress=False)
    assert result.rank_ratios != by_total.rank_ratios


def test_candidates_by_weight_type(load_clip: Clip, clip_objective: Objective) -> None:
    config = SeTARConfig(
        target_modules=["mlp.fc1", "self_attn.v_proj", "mlp.fc2"],
        candidate_ratios={"W_v": [0.5], "default": [0.1, 0.2]},
    )
    trace = search_rank_ratios(load_clip(), clip_objective(), config, progress=False).trace
    tried = {(row.weight_type, row.step): set() for row in trace.rows}
    types = {row.step: row.weight_type for row in trace.rows}
    for candidate in trace.candidates:
        tried[types[candidate.step], candidate.step].add(candidate.rank_ratio)
    assert all(ratios == ({0.5} if kind == "W_v" else {0.1, 0.2}) for (kind, _), ratios in tried.items())
    # Within a block what runs last is searched first, block after block from the top.
    assert [row.weight_type for row in trace.rows[:6]] == ["W_down", "W_up", "W_v"] * 2
    assert [row.layer_num for row in trace.rows[:6]] == [3, 3, 3, 2, 2, 2]
    config.candidate_ratios = {"W_v": [0.5]}
    with pytest.raises(ValueError, match=r"ratios for W_v, but W_(down|up) is searched too"):
        search_rank_ratios(load_clip(), clip_objective(), config, progress=False)


def test_a_log_file_gets_a_line_a_layer(
    load_clip: Clip, clip_objective: Objective, capfd: pytest.CaptureFixture[str]
) -> None:
    search_rank_ratios(load_clip(), clip_objective())
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("SeTAR search")]
    assert len(lines) == 7
    assert "vision 3 W_up  best loss 0.449" in lines[0]
    assert "100%" in lines[-1]
    assert "s left" in lines[-1]


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_compiled_base_is_searched_as_the_same_base_before(prefix: str) -> None:
    """A random draw depends on a layer's name: what is evaluated is what the adapter removes."""
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(32, 8)

    def objective(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(x)[:, 0].square().mean())

    settings: dict[str, Any] = {"target_modules": ["0", "2"], "prune": "random", "candidate_ratios": [0.25, 0.5]}
    expected = search_rank_ratios(plain, objective, SeTARConfig(order=["2", "0"], **settings), progress=False)
    compiled: Any = torch.compile(copy.deepcopy(plain), backend="eager")
    order = [f"{prefix}2", f"{prefix}0"]
    found = search_rank_ratios(compiled, objective, SeTARConfig(order=order, **settings), progress=False)
    assert found.rank_ratios == expected.rank_ratios
    assert any(found.rank_ratios.values())
    assert found.config.known_splits.keys() == expected.config.known_splits.keys() != set()
    best = objective(get_peft_model(plain, expected.config))
    assert objective(get_peft_model(compiled, found.config)) == pytest.approx(best, rel=1e-5)

"""The screened search as a whole: what it loses against the full one, what it says of it, and how it goes on."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, CLIPModel, Swinv2ForImageClassification

import setar_peft.search.weights
from setar_peft import LoCoOpObjective, SeTARConfig, estimate_cost, search_rank_ratios
from setar_peft.search.estimate import PeakMemory
from setar_peft.search.replay import ReplayEvaluator
from setar_peft.search.run import SearchResult
from setar_peft.search.trace import SearchTrace
from tests.backbones.checks import loss_with_gradient
from tests.backbones.test_swinv2 import pixel_values
from tests.conftest import GOLDEN, read_json
from tests.search.test_golden import ORDERS, SEARCHES, TARGETS

Clip = Callable[..., CLIPModel]
Objective = Callable[..., LoCoOpObjective]

ALL = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
WAYS: list[dict[str, Any]] = [
    {"verify": 2},
    {"order": "best_first", "verify": 2, "target_modules": ALL, "evaluations": 9},
    {"order": "joint", "target_modules": ["mlp.fc1", "self_attn.q_proj"]},
    {"passes": 3, "order": "text_vision"},
    {"order": "exhaustive", "candidate_ratios": [0.1, 0.3], "verify": 1},
]


def _search(model: Any, objective: Any, settings: dict[str, Any], **more: Any) -> SearchResult:
    return search_rank_ratios(model, objective, SeTARConfig(search="screened", **settings), progress=False, **more)


def _golden_search(name: str, load_clip: Clip, clip_objective: Objective) -> tuple[Any, Any, dict[str, Any], float]:
    """Model, objective and settings of a golden search, and the loss that the published code ends with."""
    golden = read_json(GOLDEN / f"{name}.json")
    given = golden["config"]
    if name == "swin_up_small":
        names = read_json(GOLDEN / "cases" / "classes.json")
        model: Any = Swinv2ForImageClassification.from_pretrained(GOLDEN / "cases" / "swin_tiny").eval()
        objective = LoCoOpObjective(None, names, pixel_values(), torch.arange(24) // 4, ood_weight=0.1, top_k=2)
        return model, objective, {"candidate_ratios": given["ratios"]}, golden["best_by_step"][-1][-1]
    if name == "eq_inter_up_small":
        tensors, names = load_file(GOLDEN / "tensors_clip_tiny.safetensors"), read_json(GOLDEN / "cases/classes.json")
        tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "cases" / "clip_tiny_eq")
        objective = LoCoOpObjective(
            tokenizer, names, tensors["pixel_values"], tensors["labels"], ood_weight=0.1, top_k=2
        )
    else:
        objective = clip_objective(ood_weight=given["lam"], top_k=given["top_k"])
    targets = [
        *TARGETS[given["weight_type"]],
        *(["visual_projection", "text_projection"] if given["with_proj"] else []),
    ]
    settings = {
        "target_modules": targets,
        "order": ORDERS[given["searcher"]],
        "prune": {"small": "minor", "large": "principal"}[given["prune"]],
        "candidate_ratios": given["ratios"],
    }
    return load_clip(given["model"]), objective, settings, golden["best_by_step"][-1][-1]


@pytest.mark.parametrize("name", [*SEARCHES, "eq_inter_up_small", "swin_up_small"])
def test_two_candidates_a_layer_find_what_the_published_search_finds(
    name: str, load_clip: Clip, clip_objective: Objective
) -> None:
    """At least 97 % of its fall of the loss, which is the loss of the adapter that comes out."""
    model, objective, settings, published = _golden_search(name, load_clip, clip_objective)
    result = _search(model, objective, {**settings, "verify": 2})
    first, last = result.trace.initial.total, result.trace.rows[-1].total_loss
    assert (first - last) / (first - published) > 0.97
    assert set(Counter(candidate[:2] for candidate in result.trace.candidates).values()) == {2}
    adapted = get_peft_model(model, result.config)
    assert objective.losses(adapted).total == pytest.approx(last, abs=2e-5)


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_whatever_is_chosen_has_the_loss_that_is_told(
    load_clip: Clip, clip_objective: Objective, settings: dict[str, Any]
) -> None:
    objective, model = clip_objective(batch_size=7), load_clip()
    result = _search(model, objective, settings)
    trace, losses = result.trace, [row.total_loss for row in result.trace.rows]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < trace.initial.total
    assert {row.module: row.best_ratio for row in trace.rows} == result.rank_ratios
    assert result.residuals.keys() == {name for name, ratio in result.rank_ratios.items() if ratio}
    adapted = get_peft_model(model, result.config)
    assert objective.losses(adapted).total == pytest.approx(losses[-1], abs=2e-5)
    # Every evaluation has been made by truncating the weights of a model with what was decided before.
    assert all(one.predicted == one.predicted and one.exact == one.exact for one in trace.compared())


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often gradients, and losses of candidates, are computed."""
    counted: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        own = getattr(ReplayEvaluator, name)
        return lambda *args: counted.update([name]) or own(*args)

    for name in ("gradients", "losses"):
        monkeypatch.setattr(ReplayEvaluator, name, counting(name))
    return counted


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_resumed_after_some_steps(
    load_clip: Clip, clip_objective: Objective, tmp_path: Path, settings: dict[str, Any], computed: Counter[str]
) -> None:
    whole = _search(load_clip(), clip_objective(), settings, trace_path=tmp_path / "whole.json")
    saved, path = json.loads((tmp_path / "whole.json").read_text()), tmp_path / "trace.json"
    layers = len(whole.rank_ratios) if settings.get("order") == "joint" else 1
    last = len(saved["rows"])
    for steps in sorted({0, layers, last // layers // 2 * layers, last}):
        part = {
            **saved,
            "rows": saved["rows"][:steps],
            "candidates": [one for one in saved["candidates"] if one[0] < steps],
            # What was predicted for the step that was at work is not on disk yet.
            "predictions": [one for one in saved["predictions"] if one[0] < steps],
        }
        path.write_text(json.dumps(part))
        computed.clear()
        resumed = _search(load_clip(), clip_objective(), settings, trace_path=path, resume=True)
        assert resumed.rank_ratios == whole.rank_ratios
        assert [row[:5] for row in resumed.trace.rows] == [row[:5] for row in whole.trace.rows]
        assert [one[:3] for one in resumed.trace.candidates] == [one[:3] for one in whole.trace.candidates]
        assert SearchTrace.load(path) == resumed.trace
        known = {one[0] for one in part["predictions"]}
        assert computed["gradients"] == len({one.step for one in whole.trace.predictions} - known)
    assert computed == {}


def test_the_search_is_at_work_when_it_is_killed_in_a_round(
    load_clip: Clip, clip_objective: Objective, tmp_path: Path
) -> None:
    """Stopped between the evaluations of a round, nothing of the round is on disk, and the result is the same."""
    settings: dict[str, Any] = {"order": "joint", "target_modules": ALL}
    whole = _search(load_clip(), clip_objective(), settings)
    trials = len({one.trial for one in whole.trace.candidates})
    assert trials > 2
    for stop_at in range(trials):

        class Stopped(LoCoOpObjective):
            calls = 0

            def sums(self, *args: Any) -> torch.Tensor:
                Stopped.calls += not torch.is_grad_enabled()
                if Stopped.calls > 1 + stop_at:  # noqa: B023 - used within this turn
                    raise KeyboardInterrupt
                return super().sums(*args)

        Stopped.__qualname__ = "LoCoOpObjective"
        objective, path, model = clip_objective(), tmp_path / f"{stop_at}.json", load_clip()
        objective.__class__ = Stopped
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(KeyboardInterrupt):
            _search(model, objective, settings, trace_path=path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert len(SearchTrace.load(path).rows) % len(whole.rank_ratios) == 0
        resumed = _search(load_clip(), clip_objective(), settings, trace_path=path, resume=True)
        assert [row[:5] for row in resumed.trace.rows] == [row[:5] for row in whole.trace.rows]
        assert resumed.rank_ratios == whole.rank_ratios


@pytest.mark.parametrize(
    ("damage", "piece"),
    [
        (lambda trace: trace["predictions"].pop(), "it predicts nothing of ratio 0.4 of text_model.encoder.layers.0"),
        (lambda trace: trace.pop("predictions"), "it predicts nothing in step 0"),
        (lambda trace: trace["predictions"][3].pop(), "predictions[3] has 4 columns, where there are 5"),
        (lambda trace: trace["predictions"][3].__setitem__(0, 99), "predictions[3] is of step 99, after"),
        (lambda trace: trace["predictions"][3].__setitem__(3, "x"), "change of predictions[3] is 'x' and no float"),
        (lambda trace: _invert(trace), "evaluation 0 is not one of the"),
        (lambda trace: trace["rows"].pop(), "within a round"),
        (lambda trace: trace["candidates"][1].__setitem__(3, 9.0), "evaluation 0 is not one of the"),
        (lambda trace: trace["candidates"][0].__setitem__(8, 1.5), "trial of candidates[0] is 1.5 and no int | None"),
    ],
)
def test_a_damaged_trace_gets_a_sentence(
    load_clip: Clip, clip_objective: Objective, tmp_path: Path, damage: Callable[[Any], Any], piece: str
) -> None:
    path = tmp_path / "trace.json"
    _search(load_clip(), clip_objective(), {"order": "joint"}, trace_path=path)
    trace = json.loads(path.read_text())
    damage(trace)
    path.write_text(json.dumps(trace))
    with pytest.raises(ValueError, match=r"trace\.json is no trace of (a|this) search, or a damaged one") as error:
        _search(load_clip(), clip_objective(), {"order": "joint"}, trace_path=path, resume=True)
    assert piece in str(error.value)


def _invert(trace: dict[str, Any]) -> None:
    for row in trace["predictions"]:
        row[3] = -row[3]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"verify": 3}, "verify was 2 and is 3"),
        ({"verify": None}, "verify was 2 and is None"),
        ({"verify": None, "order": "joint"}, "order was 'vision_text' and is 'joint'"),
    ],
)
def test_another_screened_search_is_refused(
    load_clip: Clip, clip_objective: Objective, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    path = tmp_path / "trace.json"
    _search(load_clip(), clip_objective(), {"verify": 2}, trace_path=path)
    with pytest.raises(ValueError, match="trace of another search") as error:
        _search(load_clip(), clip_objective(), settings, trace_path=path, resume=True)
    assert named in str(error.value)
    with pytest.raises(ValueError, match=r"search was 'screened' and is 'greedy'"):
        search_rank_ratios(load_clip(), clip_objective(), progress=False, trace_path=path, resume=True)


def test_a_trace_from_before_there_were_screened_searches_can_be_continued(
    load_clip: Clip, clip_objective: Objective, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    trace = search_rank_ratios(load_clip(), clip_objective(), progress=False, trace_path=path).trace
    saved = json.loads(path.read_text())
    saved["candidates"] = [one[:8] for one in saved["candidates"]]
    del saved["predictions"]
    for name in ("search", "verify", "evaluations"):
        del saved["settings"][name]
    path.write_text(json.dumps(saved))
    assert SearchTrace.load(path).candidates == trace.candidates
    resumed = search_rank_ratios(load_clip(), clip_objective(), progress=False, trace_path=path, resume=True)
    assert resumed.trace == trace
    assert trace.compared() == []
    assert "predicted" not in trace.table() + trace.to_csv()


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("criterion", ["total", "ood"])
def test_predicted_stands_beside_exact(
    load_clip: Clip, clip_objective: Objective, settings: dict[str, Any], criterion: str
) -> None:
    """Exact changes are differences of what the trace holds, and predicted ones sums over what changed."""
    trace = _search(load_clip(), clip_objective(), {**settings, "criterion": criterion}).trace
    part = {"total": "total_loss", "ood": "ood_loss"}[criterion]
    compared = trace.compared()
    evaluations = {one[:3] if one.trial is None else one.trial for one in trace.candidates}
    assert len(compared) == len(evaluations)
    assert sum(one.layers for one in compared) == len(trace.candidates)
    rows = list(csv.DictReader(io.StringIO(trace.to_csv())))
    assert len(rows) == len(trace.rows)
    start = trace.initial.total if criterion == "total" else trace.initial.ood_loss
    if settings.get("order") == "joint":
        layers = len({row.module for row in trace.rows})
        ends = [getattr(trace.rows[end], part) for end in range(layers - 1, len(trace.rows), layers)]
        exact = [end - before for before, end in zip([start, *ends], ends, strict=False)]
        exact = [change for change in exact for _ in range(layers)]
    else:
        ends = [getattr(row, part) for row in trace.rows]
        exact = [end - before for before, end in zip([start, *ends], ends, strict=False)]
    assert [float(row["exact_change"]) for row in rows] == pytest.approx(exact, abs=1e-12)
    assert all((float(row["predicted_change"]) == 0) == (float(row["exact_change"]) == 0) for row in rows)
    # Of the base's first gradient, all alone: the prediction is right in the limit of small steps.
    assert {"predicted_change", "exact_change"} <= set(trace.table().splitlines()[0].split())


@pytest.mark.parametrize(
    "settings", [{}, {"order": "best_first"}, {"order": "joint"}, {"target_modules": ALL}], ids=str
)
@pytest.mark.parametrize("batch_size", [24, 5])
def test_memory_stays_within_the_estimate(
    load_clip: Clip, clip_objective: Objective, settings: dict[str, Any], batch_size: int
) -> None:
    model, objective = load_clip(), clip_objective(batch_size=batch_size)
    config = SeTARConfig(search="screened", **settings)
    estimate = estimate_cost(model, objective, config)
    with PeakMemory() as memory:
        trace = search_rank_ratios(model, objective, config, progress=False).trace
    assert 0.4 * estimate.peak_bytes < memory.peak <= estimate.peak_bytes
    if settings.get("order") != "joint":
        assert len(trace.candidates) <= estimate.evaluations
    assert "gradients  " in estimate.table()
    assert estimate.to_dict()["gradients"] >= 1


def test_the_graph_is_of_one_batch(load_clip: Clip, clip_objective: Objective) -> None:
    """Its memory grows with the batch and not with the images."""
    config = SeTARConfig(search="screened")
    few, many, large = (
        estimate_cost(load_clip(), clip_objective(count, batch_size=size), config).gradient_bytes
        for count, size in ((6, 3), (24, 3), (24, 24))
    )
    assert many <= 1.1 * few
    assert large > 2 * many


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({"order": {"a.fc1", "b.fc1"}}, ["order is {", "a list of module names, top first"]),
        ({"search": "fast"}, ["search is 'fast'", "'greedy', 'screened'"]),
        ({"order": "best_first"}, ["order is 'best_first'", "search is 'greedy'", "search='screened'"]),
        ({"order": "joint"}, ["order is 'joint'", "search='screened'"]),
        ({"verify": 2}, ["verify is 2", "search='greedy'", "Leave it out"]),
        ({"evaluations": 9}, ["evaluations is 9", "search='greedy'"]),
        ({"search": "screened", "evaluations": 9}, ["evaluations is 9", "order='vision_text'", "'best_first'"]),
        ({"search": "screened", "order": "joint", "verify": 2}, ["verify is 2", "every order but 'joint'"]),
        ({"search": "screened", "order": "joint", "passes": 2}, ["passes is 2", "order 'joint' goes on"]),
        ({"search": "screened", "verify": 0}, ["verify is 0", "1 or more"]),
        ({"search": "screened", "verify": True}, ["verify is True", "1 or more"]),
        ({"search": "screened", "verify": 1.5}, ["verify is 1.5", "1 or more"]),
        ({"search": "screened", "order": "best_first", "evaluations": 0}, ["evaluations is 0", "1 or more"]),
    ],
)
def test_what_would_be_ignored_is_refused(settings: dict[str, Any], pieces: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\.$") as error:
        SeTARConfig(**settings)
    for piece in pieces:
        assert piece in str(error.value)


def test_a_callable_and_its_objective_decide_alike(load_clip: Clip, clip_objective: Objective) -> None:
    """In full, through the model's own forward, and by replay: the same candidates with the same losses."""
    objective = clip_objective()
    for settings in WAYS[:3]:
        replayed = _search(load_clip(), objective, settings).trace
        full = _search(load_clip(), lambda model: loss_with_gradient(model, objective), settings).trace
        assert [one[:3] for one in full.candidates] == [one[:3] for one in replayed.candidates]
        assert [one.total_loss for one in full.candidates] == pytest.approx(
            [one.total_loss for one in replayed.candidates], abs=3e-5
        )
        assert [row.best_ratio for row in full.rows] == [row.best_ratio for row in replayed.rows]


def test_decompositions(load_clip: Clip, clip_objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a layer by its Gram matrix; kept parts are formed of what is evaluated alone; the adapter makes none."""
    counted: Counter[str] = Counter()
    own = setar_peft.search.weights.decompose

    def decompose(*args: Any, **settings: Any) -> Any:
        assert settings["by_gram"] is True
        counted[settings["name"]] += 1
        split = own(*args, **settings)
        kept = split.kept
        object.__setattr__(split, "kept", lambda ratio: counted.update(kept=1) or kept(ratio))
        return split

    monkeypatch.setattr(setar_peft.search.weights, "decompose", decompose)
    result = _search(load_clip(), clip_objective(), {"order": "best_first", "passes": 2, "target_modules": ALL})
    chosen = sum(row.best_ratio > 0 for row in result.trace.rows)
    assert counted.pop("kept") <= len(result.trace.candidates) + chosen
    assert set(counted.values()) == {1}
    assert len(counted) == 7 * 6
    monkeypatch.setattr("setar_peft.tuner.layer.decompose", None)
    get_peft_model(load_clip(), result.config)


def test_a_part_of_the_loss_is_followed_by_its_own_gradient(load_clip: Clip, clip_objective: Objective) -> None:
    by_part = {
        criterion: _search(load_clip(), clip_objective(), {"criterion": criterion}).trace for criterion in ("id", "ood")
    }
    changes = {name: [one.change for one in trace.predictions] for name, trace in by_part.items()}
    assert changes["id"] != changes["ood"]
    for name, trace in by_part.items():
        minimised = [getattr(row, f"{name}_loss") for row in trace.rows]
        assert minimised == sorted(minimised, reverse=True)
        assert minimised[-1] < trace.initial.part(name)


def test_progress_shows_the_gradients(load_clip: Clip, clip_objective: Objective, capfd: Any) -> None:
    for settings in ({}, {"order": "joint"}, {"order": "best_first", "evaluations": 3}):
        search_rank_ratios(load_clip(), clip_objective(), SeTARConfig(search="screened", **settings))
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("SeTAR search")]
        assert "gradients  best loss 0.63466" in lines[0]
        assert "changes at once" in lines[1] if settings.get("order") == "joint" else "W_up" in lines[1]
        if settings.get("order") == "best_first":
            assert "100%" in lines[-1]
            assert "about 0 s left" in lines[-1]


def test_any_model_with_a_callable(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    inputs = torch.randn(64, 8)

    def loss(candidate: nn.Module) -> torch.Tensor:
        return candidate(inputs).square().mean()

    for order in ("vision_text", "exhaustive", "best_first", "joint", ["0", "4"]):
        config = SeTARConfig(
            search="screened", target_modules=["0", "2", "4"], candidate_ratios=[0.25, 0.5], order=order
        )
        path = tmp_path / f"{order}.json"
        result = search_rank_ratios(model, loss, config, progress=False, trace_path=path)
        again = search_rank_ratios(model, loss, config, progress=False, trace_path=path, resume=True)
        assert again.rank_ratios == result.rank_ratios
        assert any(result.rank_ratios.values())
        with torch.no_grad():
            assert float(loss(get_peft_model(nn.Sequential(*model), result.config))) == pytest.approx(
                result.trace.rows[-1].total_loss, abs=1e-6
            )

"""A search that is stopped at any moment and resumed ends as one that was not."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from setar_peft import LoCoOpObjective, SeTARConfig, search_rank_ratios
from setar_peft.search.trace import SearchTrace
from tests.conftest import GOLDEN

Clip = Callable[..., CLIPModel]
Objective = Callable[..., LoCoOpObjective]

# The search of the golden images, slowed down so that a kill finds it at work.
SLOW_SEARCH = """
import sys, time
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel
from setar_peft import LoCoOpObjective, search_rank_ratios
import json, pathlib

golden, path = pathlib.Path(sys.argv[1]), sys.argv[2]

class Slow(LoCoOpObjective):
    def sums(self, *args):
        time.sleep(0.004)
        return super().sums(*args)

Slow.__qualname__ = "LoCoOpObjective"  # the settings that a trace holds name the type

tensors = load_file(golden / "tensors_clip_tiny.safetensors")
tokenizer = AutoTokenizer.from_pretrained(golden / "cases" / "clip_tiny")
names = json.loads((golden / "cases" / "classes.json").read_text())
model = CLIPModel.from_pretrained(golden / "cases" / "clip_tiny", attn_implementation="eager").eval()
objective = Slow(tokenizer, names, tensors["pixel_values"], tensors["labels"], ood_weight=0.1, top_k=2)
print("ready", flush=True)
search_rank_ratios(model, objective, progress=False, trace_path=path, resume=True)
print("done", flush=True)
"""


def _start(path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_SEARCH, str(GOLDEN), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def _rows(path: Path) -> int:
    return len(SearchTrace.load(path).rows) if path.exists() else 0


def test_killed_at_random_moments_and_resumed(load_clip: Clip, clip_objective: Objective, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    moments = random.Random(0)
    interrupted_at = []
    while len(interrupted_at) < 4:
        wanted = _rows(path) + moments.randint(0, 2)
        with _start(path) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            # However slow the machine: the kill comes while a step after the wanted one is at work, or is written.
            while _rows(path) < wanted and process.poll() is None:
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.03))
            process.send_signal(signal.SIGKILL)
        interrupted_at.append(_rows(path))
    assert interrupted_at == sorted(interrupted_at)
    assert interrupted_at[-1] > 0
    assert interrupted_at[0] < 7, "the first kill should have found the search at work"
    result = search_rank_ratios(load_clip(), clip_objective(), progress=False, trace_path=path, resume=True)
    whole = search_rank_ratios(load_clip(), clip_objective(), progress=False)
    assert result.rank_ratios == whole.rank_ratios
    assert [c.total_loss for c in result.trace.candidates] == pytest.approx(
        [c.total_loss for c in whole.trace.candidates], abs=4e-5
    )


@pytest.mark.parametrize("steps", range(8))
def test_resumed_after_each_step(load_clip: Clip, clip_objective: Objective, tmp_path: Path, steps: int) -> None:
    class Stopped(LoCoOpObjective):
        def sums(self, *args: Any) -> torch.Tensor:
            if path.exists() and len(json.loads(path.read_text())["rows"]) >= steps:
                raise KeyboardInterrupt
            return super().sums(*args)

    path = tmp_path / "trace.json"
    objective = clip_objective()
    whole = search_rank_ratios(load_clip(), clip_objective(), progress=False)
    if steps > 0:
        objective.settings = clip_objective().settings  # type: ignore[method-assign]
        objective.__class__ = Stopped
        if steps < 7:
            with pytest.raises(KeyboardInterrupt):
                search_rank_ratios(load_clip(), objective, progress=False, trace_path=path)
            assert len(SearchTrace.load(path).rows) == steps
    result = search_rank_ratios(load_clip(), clip_objective(), progress=False, trace_path=path, resume=True)
    assert result.rank_ratios == whole.rank_ratios
    assert result.trace.rows == whole.trace.rows
    assert result.residuals.keys() == whole.residuals.keys()
    assert SearchTrace.load(path) == result.trace


def _other_model(model: CLIPModel) -> CLIPModel:
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": True}, "model was"),
        ({"images": 23}, "data was"),
        ({"config": {"passes": 2}}, "passes was 1 and is 2"),
        ({"config": {"prune": "principal"}}, "prune was 'minor' and is 'principal'"),
        ({"objective": {"top_k": 3}}, "objective.top_k was 2 and is 3"),
        ({"objective": {"ood_weight": 0.2}}, "objective.ood_weight was 0.1 and is 0.2"),
        ({"objective": {"prompt": "a {class}"}}, "objective.prompts was"),
    ],
)
def test_another_search_is_refused(
    load_clip: Clip, clip_objective: Objective, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    path = tmp_path / "trace.json"
    _finished(load_clip, clip_objective, path)
    written = path.read_bytes()
    model = _other_model(load_clip()) if "model" in change else load_clip()
    objective = clip_objective(change.get("images", 24), **change.get("objective", {}))
    config = SeTARConfig(**change.get("config", {}))
    with pytest.raises(ValueError, match="trace of another search") as error:
        search_rank_ratios(model, objective, config, progress=False, trace_path=path, resume=True)
    assert named in str(error.value)
    assert path.read_bytes() == written


def test_batches_and_order_of_the_data_are_no_difference(
    load_clip: Clip, clip_objective: Objective, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    first = search_rank_ratios(load_clip(), clip_objective(), progress=False, trace_path=path)
    other = clip_objective(batch_size=5)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    other.images._images, other.images.labels = other.images._images[order], other.images.labels[order]
    resumed = search_rank_ratios(load_clip(), other, progress=False, trace_path=path, resume=True)
    assert resumed.trace.rows == first.trace.rows


_FINISHED: list[bytes] = []


def _finished(load_clip: Clip, clip_objective: Objective, path: Path) -> dict[str, Any]:
    """Put the trace of a finished search at a path; the search is made once."""
    if not _FINISHED:
        search_rank_ratios(load_clip(), clip_objective(), progress=False, trace_path=path)
        _FINISHED.append(path.read_bytes())
    path.write_bytes(_FINISHED[0])
    return json.loads(path.read_text())


def _winner(trace: dict[str, Any]) -> list[Any]:
    row = next(row for row in trace["rows"] if row[4] > 0)
    return next(one for one in trace["candidates"] if one[0] == row[0] and one[2] == row[4])


def _edit_consistently(trace: dict[str, Any]) -> None:
    """The winner of the last step that changed anything, and the rows from there on."""
    winner = next(one for one in trace["candidates"] if one[3] == trace["rows"][-1][5])
    for row in trace["rows"]:
        if row[5] == winner[3]:
            row[5] -= 0.01
    winner[3] -= 0.01


@pytest.mark.parametrize(
    ("damage", "piece"),
    [
        (lambda trace: trace.pop("candidates"), "it has no 'candidates'"),
        (lambda trace: trace.pop("settings"), "it has no 'settings'"),
        (lambda trace: trace.update(rows={}), "rows is a dict and no list"),
        (lambda trace: trace.update(settings=[]), "settings is a list and no dict"),
        (lambda trace: trace["initial"].pop(), "initial has 4 columns, where there are 5"),
        (lambda trace: trace["initial"].__setitem__(0, "nan"), "the loss of initial is nan"),
        (lambda trace: trace["rows"][2].pop(), r"rows[2] has 10 columns, where there are 11"),
        (lambda trace: trace["rows"].__setitem__(1, 5), r"rows[1] has 5, where there are 11"),
        (lambda trace: trace["rows"][2].__setitem__(4, "a"), "best_ratio of rows[2] is 'a' and no float"),
        (lambda trace: trace["rows"][2].__setitem__(5, float("nan")), "the loss of rows[2] is nan"),
        (lambda trace: trace["rows"][2].__setitem__(3, True), "layer_num of rows[2] is True and no int | None"),
        (lambda trace: trace["rows"].pop(0), "rows[0] is of step 1"),
        (lambda trace: trace["candidates"][3].append(1), "candidates[3] has 10 columns, where there are 9"),
        (lambda trace: trace["candidates"][3].__setitem__(0, 70), "candidates[3] is of step 70, of 7 steps"),
        (lambda trace: trace["candidates"].pop(), "it has no candidate of ratio 0.4 of text_model.encoder.layers.0"),
        (lambda trace: trace["rows"].append([7, *trace["rows"][-1][1:]]), "it has 8 steps, and the search 7"),
        (lambda trace: trace["initial"].__setitem__(0, 0.7), "for the base it has total 0.7, and here it is 0.634"),
        (lambda trace: trace["initial"].__setitem__(2, 0.7), "for the base it has ood_loss 0.7, and here it is -0.197"),
        (lambda trace: _winner(trace).__setitem__(3, 0.9), "by its candidates"),
        (lambda trace: trace["rows"][0].__setitem__(5, 0.9), "rows[0] is (0, 'vision', 'W_up', 3"),
        (lambda trace: trace["rows"][0].__setitem__(4, 0.123), "rows[0] is (0, 'vision', 'W_up', 3, 0.123"),
        (_edit_consistently, "for the layers decided so far it has total"),
    ],
)
def test_a_damaged_or_edited_trace_gets_a_sentence(
    load_clip: Clip, clip_objective: Objective, tmp_path: Path, damage: Callable[[Any], Any], piece: str
) -> None:
    path = tmp_path / "trace.json"
    trace = _finished(load_clip, clip_objective, path)
    damage(trace)
    path.write_text(json.dumps(trace))
    written, model = path.read_bytes(), load_clip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"trace\.json is (no trace of (a|this) search, or a damaged|the trace of an)"
    ) as error:
        search_rank_ratios(model, clip_objective(), progress=False, trace_path=path, resume=True)
    assert piece in str(error.value)
    assert path.read_bytes() == written
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_a_file_is_no_trace(load_clip: Clip, clip_objective: Objective, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('{"rows": [')
    with pytest.raises(ValueError, match=r"trace\.json is no trace of a search"):
        search_rank_ratios(load_clip(), clip_objective(), progress=False, trace_path=path, resume=True)


def test_a_callable_with_another_constant_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    model, config = nn.Sequential(nn.Linear(4, 4)), SeTARConfig(target_modules=["0"], candidate_ratios=[0.25, 0.5])

    def loss_with(constant: float) -> Callable[[nn.Module], float]:
        def loss(candidate: Any) -> float:
            return constant + float(candidate[0].weight.square().sum())

        return loss

    first = search_rank_ratios(model, loss_with(1.0), config, progress=False, trace_path=path)
    base = first.trace.initial.total
    with pytest.raises(ValueError, match="trace of another search: for the base it has total") as error:
        search_rank_ratios(model, loss_with(1.01), config, progress=False, trace_path=path, resume=True)
    assert f"total {base:.8g}, and here it is {base + 0.01:.8g}"[:-2] in str(error.value)
    resumed = search_rank_ratios(model, loss_with(1.0), config, progress=False, trace_path=path, resume=True)
    assert repr(resumed.trace.rows) == repr(first.trace.rows)
    other = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    with pytest.raises(ValueError, match="model was"):
        search_rank_ratios(other, loss_with(1.0), config, progress=False, trace_path=path, resume=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_attention_heads": 8}, "model_config.vision_config.num_attention_heads was 4 and is 8"),
        ({"hidden_act": "gelu"}, "model_config.vision_config.hidden_act was 'quick_gelu' and is 'gelu'"),
        ({"layer_norm_eps": 1e-3}, "model_config.vision_config.layer_norm_eps was 1e-05 and is 0.001"),
    ],
)
def test_another_configuration_of_equal_weights_is_refused(
    load_clip: Clip, clip_objective: Objective, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    path = tmp_path / "trace.json"
    _finished(load_clip, clip_objective, path)
    config = CLIPConfig.from_pretrained(GOLDEN / "cases" / "clip_tiny")
    for name, value in change.items():
        setattr(config.vision_config, name, value)
    with pytest.raises(ValueError, match="trace of another search") as error:
        search_rank_ratios(load_clip(config=config), clip_objective(), progress=False, trace_path=path, resume=True)
    assert named in str(error.value)


def test_where_a_model_came_from_is_no_difference(load_clip: Clip, clip_objective: Objective, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    _finished(load_clip, clip_objective, path)
    load_clip().save_pretrained(tmp_path / "elsewhere")
    model = CLIPModel.from_pretrained(tmp_path / "elsewhere", attn_implementation="sdpa")
    model.config.text_config.id2label = {0: "a", 1: "b"}
    search_rank_ratios(model, clip_objective(), progress=False, trace_path=path, resume=True)


def test_a_trace_is_replaced_only_when_that_is_asked_for(
    load_clip: Clip, clip_objective: Objective, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    _finished(load_clip, clip_objective, path)
    written, config = path.read_bytes(), SeTARConfig(order="text")
    with pytest.raises(ValueError, match=r"trace\.json is there already\. .*resume.*--resume.*overwrite.*--output"):
        search_rank_ratios(load_clip(), clip_objective(), config, progress=False, trace_path=path)
    with pytest.raises(ValueError, match="exclude each other"):
        search_rank_ratios(
            load_clip(), clip_objective(), config, progress=False, trace_path=path, resume=True, overwrite=True
        )
    for asked in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=f"{next(iter(asked))} is set, but trace_path is not"):
            search_rank_ratios(load_clip(), clip_objective(), progress=False, **asked)  # type: ignore[arg-type]
    assert path.read_bytes() == written
    anew = search_rank_ratios(load_clip(), clip_objective(), config, progress=False, trace_path=path, overwrite=True)
    assert SearchTrace.load(path) == anew.trace
    assert len(anew.trace.rows) == 3


def test_a_place_that_cannot_be_written_is_refused_at_once(clip_objective: Objective, tmp_path: Path) -> None:
    def never(_: nn.Module) -> float:
        raise AssertionError("evaluated")

    (tmp_path / "file").write_text("")
    model, config = nn.Sequential(nn.Linear(4, 4)), SeTARConfig(target_modules=["0"], candidate_ratios=[0.25])
    with pytest.raises(OSError, match=r"Nothing can be written to .*file \(Not a directory\)"):
        search_rank_ratios(model, never, config, progress=False, trace_path=tmp_path / "file" / "trace.json")
    with pytest.raises(OSError, match=r"Nothing can be written to /proc \("):
        search_rank_ratios(model, never, config, progress=False, trace_path="/proc/deep/down/trace.json")
    with pytest.raises(ValueError, match="is a folder; give the name of a file"):
        search_rank_ratios(model, never, config, progress=False, trace_path=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_costs_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "trace.json", []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = SeTARConfig(target_modules=["0", "1"], candidate_ratios=[0.25])

    def loss(candidate: Any) -> float:
        return float(candidate[0].weight.square().sum() + candidate[1].weight.square().sum())

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    whole = search_rank_ratios(model, loss, config, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"trace\.json \(No space left on device\).*still there.*--resume"):
            search_rank_ratios(model, loss, config, progress=False, trace_path=path)
    assert len(SearchTrace.load(path).rows) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json"]
    resumed = search_rank_ratios(model, loss, config, progress=False, trace_path=path, resume=True)
    assert repr(resumed.trace.rows) == repr(whole.trace.rows)


def test_settings_that_are_no_plain_values_are_refused_before_the_search(
    load_clip: Clip, clip_objective: Objective
) -> None:
    objective = clip_objective()
    objective.settings = lambda: {"device": torch.device("cpu")}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"settings\(\) of LoCoOpObjective holds what a trace cannot: .*device"):
        search_rank_ratios(load_clip(), objective, progress=False)

"""A search that is stopped at any moment and resumed ends as one that was not."""

from __future__ import annotations

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
from transformers import CLIPModel

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
    search_rank_ratios(load_clip(), clip_objective(), progress=False, trace_path=path)
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


def test_a_damaged_trace_gets_a_sentence(load_clip: Clip, clip_objective: Objective, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('{"rows": [')
    with pytest.raises(ValueError, match=r"trace\.json is no trace of a search"):
        search_rank_ratios(load_clip(), clip_objective(), progress=False, trace_path=path, resume=True)
    with pytest.raises(ValueError, match="trace_path is not"):
        search_rank_ratios(load_clip(), clip_objective(), progress=False, resume=True)

"""Two gloo processes, each with a shard, take the decisions of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from setar_peft import LoCoOpObjective, search_rank_ratios
from setar_peft.processes import Processes, own_device
from tests.conftest import GOLDEN
from tests.search.processes import in_two_processes

SEARCH = """
import json, pathlib, sys
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel
from setar_peft import LoCoOpObjective, search_rank_ratios
from setar_peft.processes import Processes

golden, output, count = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
tensors = load_file(golden / "tensors_clip_tiny.safetensors")
tokenizer = AutoTokenizer.from_pretrained(golden / "cases" / "clip_tiny")
names = json.loads((golden / "cases" / "classes.json").read_text())
model = CLIPModel.from_pretrained(golden / "cases" / "clip_tiny", attn_implementation="eager").eval()
images, labels = tensors["pixel_values"][:count], tensors["labels"][:count]
objective = LoCoOpObjective(tokenizer, names, images, labels, ood_weight=0.1, top_k=2, batch_size=8)
index = Processes(model.device).index


class ShortOfMemory(LoCoOpObjective):
    calls = 0

    def sums(self, features, classes, labels):
        ShortOfMemory.calls += 1
        if index == 1 and len(labels) > 3 and ShortOfMemory.calls > int(sys.argv[4]) >= 0:
            raise torch.OutOfMemoryError("out of memory")
        return super().sums(features, classes, labels)


objective.__class__ = ShortOfMemory
result = search_rank_ratios(model, objective, progress=False, trace_path=output / "trace.json")
losses = [candidate.total_loss for candidate in result.trace.candidates]
(output / f"{index}.json").write_text(json.dumps([result.rank_ratios, losses, result.trace.settings["data"]]))
"""


def _search_in_two_processes(folder: Path, count: int, out_of_memory_after: int = -1) -> list[str]:
    """Run `SEARCH` in two processes and return what each said on standard error."""
    arguments = ["-c", SEARCH, str(GOLDEN), str(folder), str(count), str(out_of_memory_after)]
    return [process.errors for process in in_two_processes(lambda _: arguments)]


class _State:
    """What accelerate says in the second of two processes with a GPU each."""

    process_index, num_processes, device = 1, 2, torch.device("cuda:1")


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("setar_peft.processes.PartialState", lambda cpu: _State())


@pytest.mark.usefixtures("second_of_two")
def test_a_gpu_without_a_number_is_this_processs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("cuda") == "cuda:1"
    assert [own_device(name) for name in ("cuda:0", "cpu", "mps")] == ["cuda:0", "cpu", "mps"]
    for available, expected in ((True, "cuda:1"), (False, None)):
        monkeypatch.setattr("torch.cuda.is_available", lambda available=available: available)
        assert own_device(None) == expected
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert own_device("cuda") == "cuda"


@pytest.mark.usefixtures("second_of_two")
def test_another_processs_gpu_is_refused() -> None:
    assert Processes(torch.device("cuda:1")).index == 1
    with pytest.raises(ValueError, match=r"process 1 of 2 is on cuda:0, but cuda:1.*PartialState\(\)\.device"):
        Processes(torch.device("cuda:0"))


@pytest.mark.parametrize("count", [23, 1])
def test_two_processes_equal_one(
    load_clip: Callable[..., CLIPModel], clip_objective: Callable[..., LoCoOpObjective], tmp_path: Path, count: int
) -> None:
    """23 images leave the shards uneven, 1 leaves one of them empty."""
    _search_in_two_processes(tmp_path, count)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = search_rank_ratios(load_clip(), clip_objective(count), progress=False)
    ratios, losses, data = first
    assert ratios == alone.rank_ratios
    assert losses == pytest.approx([candidate.total_loss for candidate in alone.trace.candidates], abs=4e-5)
    assert data == alone.trace.settings["data"]
    assert json.loads((tmp_path / "trace.json").read_text())["settings"]["data"] == data


@pytest.mark.parametrize("after", [0, 30])
def test_all_processes_halve_the_batch_when_one_runs_out_of_memory(
    load_clip: Callable[..., CLIPModel], clip_objective: Callable[..., LoCoOpObjective], tmp_path: Path, after: int
) -> None:
    for errors in _search_in_two_processes(tmp_path, 23, out_of_memory_after=after):
        assert "Out of memory with 8 images or prompts a batch; the search goes on with 4" in errors
        assert "Out of memory with 4 images or prompts a batch; the search goes on with 2" in errors
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = search_rank_ratios(load_clip(), clip_objective(23), progress=False)
    assert first[0] == alone.rank_ratios
    assert first[1] == pytest.approx([candidate.total_loss for candidate in alone.trace.candidates], abs=4e-5)

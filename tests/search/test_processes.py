"""Two gloo processes, each with a shard, take the decisions of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import CLIPModel

from setar_peft import LoCoOpObjective, search_rank_ratios
from tests.conftest import GOLDEN

SEARCH = """
import json, pathlib, sys
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel
from setar_peft import LoCoOpObjective, search_rank_ratios
from setar_peft.search.processes import Processes

golden, output, count = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
tensors = load_file(golden / "tensors_clip_tiny.safetensors")
tokenizer = AutoTokenizer.from_pretrained(golden / "cases" / "clip_tiny")
names = json.loads((golden / "cases" / "classes.json").read_text())
model = CLIPModel.from_pretrained(golden / "cases" / "clip_tiny", attn_implementation="eager").eval()
images, labels = tensors["pixel_values"][:count], tensors["labels"][:count]
objective = LoCoOpObjective(tokenizer, names, images, labels, ood_weight=0.1, top_k=2, batch_size=8)
result = search_rank_ratios(model, objective, progress=False, trace_path=output / "trace.json")
index = Processes(model.device).index
losses = [candidate.total_loss for candidate in result.trace.candidates]
(output / f"{index}.json").write_text(json.dumps([result.rank_ratios, losses, result.trace.settings["data"]]))
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("count", [23, 1])
def test_two_processes_equal_one(
    load_clip: Callable[..., CLIPModel], clip_objective: Callable[..., LoCoOpObjective], tmp_path: Path, count: int
) -> None:
    """23 images leave the shards uneven, 1 leaves one of them empty."""
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SEARCH, str(GOLDEN), str(tmp_path), str(count)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = search_rank_ratios(load_clip(), clip_objective(count), progress=False)
    ratios, losses, data = first
    assert ratios == alone.rank_ratios
    assert losses == pytest.approx([candidate.total_loss for candidate in alone.trace.candidates], abs=4e-5)
    assert data == alone.trace.settings["data"]
    assert json.loads((tmp_path / "trace.json").read_text())["settings"]["data"] == data

"""The benchmarks run as they are shipped, on shapes that take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = ["--shape", "tiny", "--images", "6", "--classes", "5", "--candidates", "2"]


def run(name: str, *arguments: str, expect: int = 0) -> str:
    """What a benchmark prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == expect, done.stderr
    return done.stdout + (done.stderr if expect else "")


def test_search_cost(tmp_path: Path) -> None:
    printed = run("search_cost.py", *SMALL, "--json", str(tmp_path / "cost.json"))
    assert "decisions equal" in printed
    figures = json.loads((tmp_path / "cost.json").read_text())
    assert figures["ratio"] == figures["full"]["seconds"] / figures["replay"]["seconds"]
    passes = {way: sum(figures[way]["block_passes"].values()) for way in ("replay", "full")}
    assert passes["replay"] < passes["full"] / 2


def test_search_gpu_on_a_cpu(tmp_path: Path) -> None:
    arguments = [*SMALL, "--device", "cpu", "--precision", "float32", "bfloat16", "--results", str(tmp_path)]
    printed = run("search_gpu.py", *arguments).splitlines()
    assert [line.split()[0] for line in printed] == ["float32", "bfloat16"]
    files = sorted(tmp_path.iterdir())
    assert [file.name.rpartition("-")[2] for file in files] == ["bfloat16.json", "float32.json"]
    for file in files:
        figures = json.loads(file.read_text())
        assert 0 < figures["share_of_bound"] < 1
        assert figures["operations"] > 0
        assert len(figures["rank_ratios"]) == 8
        assert figures["final_loss"] <= figures["initial_loss"]


def test_search_gpu_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "torch sees no CUDA device" in run("search_gpu.py", expect=2)

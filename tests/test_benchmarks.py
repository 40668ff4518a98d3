"""The benchmarks run as they are shipped, on shapes that take seconds."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import adapter, gpu, search_gpu

ROOT = Path(__file__).parent.parent
SMALL = ["--shape", "tiny", "--images", "6", "--classes", "5", "--candidates", "2"]


def run(name: str, *arguments: str) -> str:
    """What a benchmark prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_search_cost(tmp_path: Path) -> None:
    printed = run("search_cost", *SMALL, "--json", str(tmp_path / "cost.json"))
    assert "decisions equal" in printed
    figures = json.loads((tmp_path / "cost.json").read_text())
    assert figures["ratio"] == figures["full"]["seconds"] / figures["replay"]["seconds"]
    passes = {way: sum(figures[way]["block_passes"].values()) for way in ("replay", "full")}
    assert passes["replay"] < passes["full"] / 2


def test_detection(tmp_path: Path) -> None:
    options = ["--shape", "tiny", "--classes", "5", "--images", "4", "--rounds", "2", "--memory-images", "10"]
    printed = run("detection", *options, "--json", str(tmp_path / "detection.json"))
    figures = json.loads((tmp_path / "detection.json").read_text())
    assert printed.count("of the bare forward's throughput (goal: at least 0.9)") == 2
    assert len(figures["ratios"]) == 5
    assert all(value > 0 for value in figures["ratios"].values())
    assert all(len(rounds) == 2 for rounds in figures["seconds"].values())
    assert set(figures["peak_gibibytes"]) in (set(), {"10", "50"})


def test_search_gpu_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    options = ["--device", "cpu", "--precision", "bfloat16", "--batch-size", "3", "--runs", "3", "--profile"]
    assert "bfloat16 on" in run("search_gpu", *SMALL, *options, "--json", str(file))
    figures = json.loads(file.read_text())
    assert figures["seconds"] == sorted(figures["seconds_of_each_run"])[1]
    assert figures["same_decisions_in_each_run"]
    assert 0 < figures["share_of_bound"] < 1
    assert figures["data_sheet_tflops"] is None
    assert figures["operations"] > 0
    assert len(figures["rank_ratios"]) == 8
    assert figures["final_loss"] <= figures["initial_loss"]
    assert figures["profile"]["longest"][0]["seconds"] > 0
    assert figures["settings"]["precision"] == "bfloat16"


@pytest.mark.parametrize("module", [gpu, search_gpu])
def test_without_a_gpu_they_say_so(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        module.main()
    assert "torch sees no CUDA device; install a CUDA build of torch, or give --device cpu" in capsys.readouterr().err


def test_the_first_run_on_a_gpu_on_a_cpu(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--shape", "tiny", "--results", str(tmp_path), "--only"]
    printed = run("gpu", *options, "decompositions", "search_on_disk")
    (file,) = tmp_path.iterdir()
    results = json.loads(file.read_text())
    assert str(file) in printed
    assert results["machine"]["torch"] == torch.__version__
    assert {name: step["status"] for name, step in results["steps"].items()} == {
        "decompositions": "done",
        "search_on_disk": "done",
    }
    assert results["steps"]["decompositions"]["figures"]["seconds"]["eigh_float64"] > 0
    assert results["steps"]["search_on_disk"]["figures"]["settings"]["recording_memory"] == 0


def test_a_step_that_fails_or_is_cut_off_leaves_what_it_said_and_found(tmp_path: Path) -> None:
    write = "import pathlib, sys, time; pathlib.Path(sys.argv[2]).write_text('[1]'); print('so far', flush=True); "
    cut_off = gpu.run(gpu.Step("slow", ["-c", write + "time.sleep(60)"], 60), 3, tmp_path, "cpu")
    assert (cut_off["status"], cut_off["figures"]) == ("out of time after 3 s", [1])
    assert "so far" in cut_off["output"]
    failed = gpu.run(
        gpu.Step("bad", ["-c", "raise SystemExit('no such thing')"], 60, writes=False), 60, tmp_path, "cpu"
    )
    assert failed["status"] == "failed with 1"
    assert "no such thing" in failed["output"]


@pytest.mark.parametrize("step", list(gpu.steps("cuda", "base16")), ids=lambda step: step.name)
def test_a_step_of_a_gpu_is_understood(step: gpu.Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments are those that its module knows; without a GPU each module gets as far as looking for one."""
    kind, name, *arguments = step.arguments
    assert kind == "-m"
    if name == "pytest":
        assert (ROOT / arguments[0]).exists()
        return
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--json", "figures.json"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parsed: list[argparse.Namespace] = []

    def parse(self: argparse.ArgumentParser) -> Any:
        parsed.append(parse_args(self))
        raise SystemExit

    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    assert parsed[0].device == "cuda"


def test_methods_take_turns_and_what_is_prepared_is_not_timed() -> None:
    done: list[str] = []

    def work(name: str) -> adapter.Work:
        return adapter.Work(done.append, lambda: done.append(f"prepare {name}") or name)

    seconds = adapter.in_turn({"a": work("a"), "b": work("b")}, 2, adapter.Timer(torch.device("cpu")))
    one, two = ["prepare a", "a"], ["prepare b", "b"]
    assert done == [*one, *two, *two, *one, *one, *two]
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 2, "b": 2}
    steps = {goal.step for goal in adapter.GOALS}
    assert {goal.reference for goal in adapter.GOALS} <= {adapter.BASE, *adapter.configs(0.1)}
    assert {adapter.TRAIN, adapter.LOAD, adapter.LOAD_LOW} < steps

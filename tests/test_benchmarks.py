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

from benchmarks import adapter, decompositions, gpu, screening, search_cost, search_gpu
from benchmarks.screening_settings import all_settings

ROOT = Path(__file__).parent.parent
SMALL = ["--shape", "tiny", "--images", "6", "--classes", "5", "--candidates", "2"]
PASSES = ("block_passes", "block_passes_back")


def run(name: str, *arguments: str) -> str:
    """What a benchmark prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_search_cost(tmp_path: Path) -> None:
    ways = ["--ways", "full,joint,greedy"]
    printed = run("search_cost", *SMALL, *ways, "--json", str(tmp_path / "cost.json"))
    assert "decisions equal" in printed
    figures = json.loads((tmp_path / "cost.json").read_text())
    greedy, joint, full = (figures[way] for way in figures["options"]["ways"])
    for way in ("joint", "full"):
        ratio = figures["comparisons"][way]["times_as_fast_as_greedy"]
        assert ratio == figures["greedy"]["seconds"] / figures[way]["seconds"]
        assert f"{way}: {ratio:.2f} times as fast as greedy, " in printed
    there, back = ({way: sum(figures[way][name].values()) for way in ("greedy", "joint", "full")} for name in PASSES)
    assert there["greedy"] < there["full"] / 2
    # A gradient by both towers' four blocks each.
    assert back["joint"] % 8 == 0 < back["joint"]
    assert back["greedy"] == back["full"] == 0
    assert (greedy["evaluations"], full["evaluations"]) == (16, 16)
    assert joint["evaluations"] < 16
    assert "joint" in printed.split("full")[0]  # what takes longest comes last, whatever the order that was asked for


def test_a_search_beside_the_greedy_one() -> None:
    greedy = {"seconds": 8.0, "initial_loss": 1.0, "final_loss": 0.5}
    other = {"seconds": 2.0, "initial_loss": 1.0, "final_loss": 0.6}
    beside = search_cost.comparisons({"greedy": greedy, "verify": other})
    assert beside["verify"]["times_as_fast_as_greedy"] == 4
    assert beside["verify"]["share_of_greedys_fall"] == pytest.approx(0.8)
    # A fall that is rounding has no shares.
    greedy["final_loss"] = 1 - 1e-7
    assert search_cost.comparisons({"greedy": greedy, "verify": other})["verify"]["share_of_greedys_fall"] is None
    assert search_cost.comparisons({"verify": other}) == {}


def test_a_way_that_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["search_cost", "--ways", "greedy,replay"])
    with pytest.raises(SystemExit):
        search_cost.main()
    assert "'replay' is none of greedy, best_first, verify, joint, full" in capsys.readouterr().err


def screened(monkeypatch: pytest.MonkeyPatch, settings: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["screening", "--settings", settings, *arguments])
    monkeypatch.delenv("SETAR_DATA", raising=False)
    screening.main()


def test_screening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = "golden/clip_vt_up_small,golden/swin_up_small,kin/clip_tiny/text_vision/minor/W_v,mini_clip/fashion"
    screened(monkeypatch, settings, "--json", str(tmp_path / "screening.json"))
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "screening.json").read_text())
    assert list(results) == [*settings.split(",")[:3]]
    figures = results["golden/clip_vt_up_small"]
    # The published search's losses.
    assert figures["searches"]["greedy"]["final_loss"] == pytest.approx(-0.0195, abs=1e-4)
    assert figures["searches"]["greedy"]["evaluations"] == figures["truncations"] == 56
    assert figures["searches"]["verify=2"]["evaluations"] == 14
    assert figures["searches"]["verify=2"]["share_of_greedys_fall"] > 0.97
    assert 0.9 < figures["rank_correlation"] < 1
    assert figures["signs_right"] == 50
    assert "| golden/clip_vt_up_small | 7 | 0.93 | 50 of 56 | 0.6347 → -0.0195 (56) | 100.0 % (14) |" in printed
    assert "best first: median " in printed
    assert "of 3." in printed
    assert (
        "Left out, set SETAR_DATA to the folder that has mini_clip, classes.json: mini_clip/fashion/W_up, " in printed
    )


def test_where_a_screened_search_fell_short_is_shown() -> None:
    (setting,) = screening.chosen(list(all_settings()), ["golden/clip_vt_up_large"])
    figures, traces = screening.measure(setting.make(0, 0))
    assert figures["searches"]["verify=1"]["share_of_greedys_fall"] < 0.97
    where, *changes = screening.where_it_fell_short(traces["greedy"], traces["verify=1"])
    assert where.startswith("  step ")
    assert [line.count("e+") + line.count("e-") for line in changes] == [8, 1, 8]
    assert not [*screening.where_it_fell_short(traces["greedy"], traces["greedy"])]


def test_a_setting_that_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        screened(monkeypatch, "gold")
    error = capsys.readouterr().err
    assert "'gold' begins none of golden/clip_exh_up_small, " in error
    assert error.strip().endswith("minilm/tuned/all")


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
    assert list(figures["screened"]) == ["best_first", "verify"]
    for found in figures["screened"].values():
        assert found["final_loss"] <= found["initial_loss"] == figures["initial_loss"]
        assert 0 < found["share_of_bound"] < 1
        assert found["times_as_fast_as_greedy"] == figures["seconds"] / found["seconds"]
    # With two candidates two a layer are all of them, and a gradient comes on top.
    assert figures["screened"]["verify"]["evaluations"] == figures["evaluations"] == 16
    assert figures["screened"]["verify"]["operations"] > figures["operations"]


@pytest.mark.parametrize("module", [decompositions, gpu, search_gpu])
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
    figures = results["steps"]["decompositions"]["figures"]
    assert figures["ratios"].keys() == {"decompose", "kept", "residual", "contributions"}
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    distances = figures["distance_from_float64"]
    assert 0 < distances["gram_float64"] < distances["svd_float32"] < 1e-5
    figures = results["steps"]["search_on_disk"]["figures"]
    assert figures["settings"]["recording_memory"] == 0
    assert figures["screened"].keys() == {"best_first", "verify"}


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

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import CLIPModel

from setar_peft import SearchTrace
from setar_peft.demo import run as run_module
from setar_peft.demo.command import run_demo
from setar_peft.demo.experiment import Settings, folder_experiment, split_by_class
from setar_peft.demo.reload import fixed_logits, logits_in_a_fresh_process


@pytest.fixture(scope="module")
def cases(golden: Path) -> Path:
    return golden / "cases"


def test_the_digits_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_demo(Settings(batch_size=128), output=tmp_path / "out", cache=tmp_path / "cache", steps=2)
    assert result.reload_is_exact
    assert result.merge_difference < 1e-4
    printed = capsys.readouterr().out
    for piece in (
        "digits zero to six",
        "Ranks",
        "AUPR-out",
        "digits 7-9",
        "to the bit, on 64",
        "gl_mcm (temperature 1",
    ):
        assert piece in printed
    assert max(map(len, printed.splitlines())) <= 80 or str(tmp_path) in printed.splitlines()[-1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter",
        "trace.json",
        "results.json",
        "figure.png",
    }
    # Three OOD sets and their mean, two scores, two models.
    assert len(result.evaluation.rows) == 16
    assert SearchTrace.load(tmp_path / "out" / "trace.json").rows == result.trace.rows
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rank_ratios"] == result.rank_ratios
    assert results["evaluation"] == result.evaluation.to_dict()
    assert (results["top_k"], results["search_images"]) == (2, 140)


def quiet_run(experiment: Any, output: Path) -> tuple[Any, str]:
    console = Console(file=io.StringIO(), width=80)
    return run_module.run(experiment, output, console=console, progress=False), console.file.getvalue()


def stub_fresh_process(monkeypatch: pytest.MonkeyPatch, change: float) -> None:
    """Loads the adapter in this process instead, and adds something to its logits."""

    def logits(base: str, adapter: Path, inputs: Any, device: Any) -> Any:
        model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base).to(device), adapter)
        found = fixed_logits(model, inputs)
        found["local"][0, 0, 0] += change
        return found

    monkeypatch.setattr(run_module, "logits_in_a_fresh_process", logits)


def test_a_folder_of_classes_and_a_local_model(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Path
) -> None:
    stub_fresh_process(monkeypatch, 0.0)
    experiment = folder_experiment(
        str(cases / "clip_tiny"),
        cases / "images",
        Settings(),
        classes=cases / "folders.json",
        ood=[cases / "images" / "c003"],
        search_images_per_class=1,
    )
    assert experiment.objective.class_names == json.loads((cases / "classes.json").read_text())
    assert experiment.objective.top_k == 2
    assert (len(experiment.objective), len(experiment.test)) == (6, 18)
    assert {name: len(images) for name, images in experiment.ood.items()} == {
        "c003": 4,
        "photographs": 100,
        "noise": 100,
    }
    result, printed = quiet_run(experiment, tmp_path / "out")
    assert result.reload_is_exact
    assert "Matched by name: c000 -> cat, c001 -> dog" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80


def test_other_logits_after_reloading_are_an_error(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_fresh_process(monkeypatch, 1e-5)
    experiment = folder_experiment(str(cases / "clip_tiny"), cases / "images", Settings())
    with pytest.raises(ValueError, match="gives other logits in a fresh process, by up to"):
        quiet_run(experiment, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["reload_is_exact"] is False


def test_a_fresh_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho first line >&2\necho OSError: no adapter there >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(ValueError, match=r"The fresh process that loads .*adapter failed: OSError: no adapter there"):
        logits_in_a_fresh_process(
            "base", tmp_path / "adapter", {"pixel_values": torch.zeros(1, 3, 32, 32)}, torch.device("cpu")
        )


def test_images_are_split_class_by_class() -> None:
    labels = np.repeat([0, 1, 2], [5, 9, 7])
    search, test = split_by_class(labels, ["a", "b", "c"], 3)
    assert np.bincount(labels[search]).tolist() == [3, 3, 3]
    assert sorted(search + test) == list(range(21))
    # By default at most half of the smallest class.
    assert len(split_by_class(labels, ["a", "b", "c"], None)[0]) == 6
    # ... and about 100 in all.
    many = np.repeat(np.arange(10), 50)
    assert len(split_by_class(many, list("abcdefghij"), None)[0]) == 100
    with pytest.raises(ValueError, match=r"Class 'a' has 5 images, and the search takes 5"):
        split_by_class(labels, ["a", "b", "c"], 5)
    with pytest.raises(ValueError, match="search-images-per-class is 0"):
        split_by_class(labels, ["a", "b", "c"], 0)

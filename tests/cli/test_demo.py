from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import setar_peft
from setar_peft.cli import app
from tests.demo.conftest import one_thread  # noqa: F401 - every test here uses it


@pytest.fixture
def cases(golden: Path) -> Path:
    return golden / "cases"


def setar(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_version() -> None:
    result = setar("--version")
    assert (result.exit_code, result.output.strip()) == (0, setar_peft.__version__)


def test_help_names_the_commands_and_what_the_defaults_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert "demo" in setar("--help").output
    options = " ".join(setar("demo", "--help").output.replace("│", " ").split())
    for piece in ("--model", "--images", "--ood", "30 % of the", "scikit-learn's handwritten digits"):
        assert piece in options


def test_demo_on_a_local_folder(cases: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = setar(
        "demo", "--model", cases / "clip_tiny", "--images", cases / "images", "--output", output, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert "reloaded in a fresh process: the same logits to the bit" in result.stdout
    results = json.loads((output / "results.json").read_text())
    assert results["class_names"] == [f"c00{index}" for index in range(6)]
    assert results["search_images"] == 12


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        ({"--images": "nowhere"}, ["nowhere is no folder", "one subfolder of images a class"]),
        ({"--model": "no/such/model"}, ["There is no model 'no/such/model'", "a folder with a saved model"]),
        ({"--model": "swin_tiny"}, ["is of model type 'swinv2'", "the demo takes a CLIP"]),
        ({"--top-k": "7"}, ["top_k is 7 with 6 classes"]),
        ({"--ood-weight": "-1"}, ["ood_weight is -1.0"]),
        ({"--batch-size": "0"}, ["batch_size is 0"]),
        ({"--prompt": "a photo"}, ["prompt is 'a photo'"]),
        ({"--device": "abacus"}, ["device is 'abacus'", "--device cpu"]),
        ({"--search-images-per-class": "4"}, ["Class 'c000' has 4 images", "lower search-images-per-class"]),
        ({"--ood": "nowhere"}, ["nowhere is no folder"]),
        ({"--classes": "nowhere.json"}, ["nowhere.json cannot be read as JSON"]),
        ({"--classes": "clip_tiny/config.json"}, ["holds no list of names"]),
        ({"--model": None}, ["--images given without --model"]),
        ({"--images": None}, ["--model given without --images"]),
    ],
)
def test_wrong_input_gets_one_sentence_and_exit_code_1(
    options: dict[str, str | None],
    pieces: list[str],
    cases: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(cases)
    given = {"--model": "clip_tiny", "--images": "images", "--output": str(tmp_path / "out")} | options
    result = setar("demo", *(part for item in given.items() if item[1] is not None for part in item))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for piece in pieces:
        assert piece in result.stderr
    assert not (tmp_path / "out").exists()

"""`setar fit` as a user runs it, and what every command's help has."""

from __future__ import annotations

import importlib
import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from peft import get_peft_model
from rich.console import Console

from setar_peft import OODDetector, SeTARConfig
from setar_peft.backbones.loading import load_model, load_processor
from setar_peft.cli import app
from setar_peft.detection.threshold import Threshold
from tests.cli.conftest import CASES
from tests.conftest import read_json

COMMON = ["--images", CASES / "images", "--classes", CASES / "folders.json", "--device", "cpu"]


def names() -> list[str]:
    return list(read_json(CASES / "folders.json").values())


def test_the_folder_holds_the_detector_that_one_makes_by_hand(saved_detector: Path) -> None:
    model = load_model(str(CASES / "clip_tiny"))
    by_hand = OODDetector(model, load_processor(str(CASES / "clip_tiny"), model), names())
    by_hand.fit(CASES / "images", tpr=0.5)
    loaded = OODDetector.from_pretrained(saved_detector)
    assert loaded.threshold == by_hand.threshold
    assert loaded(CASES / "images") == by_hand(CASES / "images")


def test_what_was_chosen_is_what_the_detector_does(setar: Callable[..., Any], tmp_path: Path) -> None:
    chosen = ["--score", "mcm", "--tpr", 0.5, "--prompt", "a {class}", "--temperature", 7, "--batch-size", 5]
    result = setar("fit", CASES / "clip_tiny", *COMMON, *chosen, "--output", tmp_path / "detector")
    assert result.exit_code == 0, result.output
    assert "which keeps 50.0% of 24 held-out ID inputs, and between" in result.stdout
    assert f"Wrote {tmp_path / 'detector'}" in result.stdout
    assert "6 classes, from " in result.stderr
    loaded = OODDetector.from_pretrained(tmp_path / "detector")
    assert (loaded.score_name, loaded.prompt, loaded.settings["temperature"]) == ("mcm", "a {class}", 7.0)
    assert loaded.threshold == Threshold.of(loaded.id_scores, 0.5)


def test_an_adapter_and_the_subfolders_as_classes(setar: Callable[..., Any], tmp_path: Path) -> None:
    up = "vision_model.encoder.layers.3.mlp.fc1"
    model = get_peft_model(
        load_model(str(CASES / "clip_tiny")), SeTARConfig(target_modules=[up], rank_ratios={up: 0.5})
    )
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    common = ["--images", CASES / "images", "--tpr", 0.5, "--device", "cpu"]
    result = setar("fit", tmp_path / "adapter", *common, "--output", tmp_path / "detector")
    assert result.exit_code == 0, result.output
    assert "6 classes, the subfolders of " in result.stderr
    loaded = OODDetector.from_pretrained(tmp_path / "detector")
    assert loaded.class_names == [f"c00{number}" for number in range(6)]
    by_hand = OODDetector(model, loaded.processor, loaded.class_names).fit(CASES / "images", tpr=0.5)
    np.testing.assert_array_equal(loaded.id_scores, by_hand.id_scores)


def test_texts(setar: Callable[..., Any], text_model: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = text_model
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "bert")
    texts = [f"the cat number {number} sat" for number in range(24)]
    (tmp_path / "held-out.txt").write_text("\n".join(texts), encoding="utf-8")
    options = ["--texts", tmp_path / "held-out.txt", "--score", "energy", "--tpr", 0.5, "--device", "cpu"]
    result = setar("fit", tmp_path / "bert", *options, "--output", tmp_path / "detector")
    assert result.exit_code == 0, result.output
    assert "3 classes, the model's own: small talk" in result.stderr
    loaded = OODDetector.from_pretrained(tmp_path / "detector")
    by_hand = OODDetector(model, tokenizer, score="energy").fit(texts, tpr=0.5)
    assert loaded(texts) == by_hand(texts)


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        ({"model": "no/such/model"}, ["There is no model 'no/such/model'", "a folder with a saved model"]),
        ({"--images": "nowhere"}, ["No such file: 'nowhere'"]),
        ({"--classes": "nowhere.json"}, ["nowhere.json cannot be read as JSON"]),
        ({"--images": "images/c000", "--classes": None}, ["images/c000 has no subfolders", "give --classes"]),
        ({"--score": "guess"}, ["score is 'guess'", "'gl_mcm'"]),
        ({"--tpr": "1.5"}, ["tpr is 1.5"]),
        ({"--prompt": "a photo"}, ["prompt is 'a photo'"]),
        ({"--temperature": "-1"}, ["temperature"]),
        ({"--device": "abacus"}, ["device is 'abacus'", "--device cpu"]),
        ({"--dtype": "tf32"}, ["tf32 is how CUDA GPUs multiply"]),
        ({"--batch-size": "0"}, ["batch_size is 0"]),
        ({"--base": "clip_tiny"}, ["is no adapter", "leave --base out"]),
        ({"--negative-labels": "nowhere.txt"}, ["nowhere.txt"]),
        ({"--output": "images"}, ["images exists and is not an empty folder"]),
    ],
)
def test_wrong_input_gets_a_sentence_and_leaves_nothing(
    options: dict[str, str | None],
    pieces: list[str],
    setar: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(CASES)
    given: dict[str, Any] = {"--images": "images", "--classes": "folders.json", "--output": tmp_path / "new"}
    given |= {"--device": "cpu", "--tpr": 0.5, **options}
    model = given.pop("model", "clip_tiny")
    result = setar("fit", model, *(part for item in given.items() if item[1] is not None for part in item))
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.stderr
    for piece in pieces:
        assert piece in result.stderr.splitlines()[-1], piece
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_sees_how_far_it_is(
    setar: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Console, "is_terminal", True)
    options = ["--output", tmp_path / "detector", "--tpr", 0.5]
    result = setar("fit", CASES / "clip_tiny", *COMMON, *options)
    assert result.exit_code == 0, result.output
    assert "scoring" in result.stderr
    assert "scoring" not in result.stdout
    assert OODDetector.from_pretrained(tmp_path / "detector").threshold.n == 24


def commands() -> dict[str, Any]:
    group = typer.main.get_command(app)
    return {name: group.get_command(None, name) for name in group.list_commands(None)}


@pytest.mark.parametrize("name", list(commands()))
def test_every_help_has_examples_that_the_command_takes(name: str, setar: Callable[..., Any]) -> None:
    assert "Examples" in setar(name, "--help").output
    written = importlib.import_module(f"setar_peft.cli.{name.replace('-', '_')}")
    described = inspect.getdoc(getattr(written, name.replace("-", "_")))
    examples = [line for line in str(described).splitlines() if line.startswith(f"setar {name}")]
    assert examples
    for example in examples:
        command = example.split("&&")[0].split(" > ")[0]
        commands()[name].make_context(name, shlex.split(command)[2:])

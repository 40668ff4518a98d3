"""`setar evaluate` as a user runs it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import get_peft_model

from setar_peft import OODDetector, SeTARConfig, evaluate
from setar_peft.backbones.loading import load_model, load_processor
from tests.cli.conftest import CASES
from tests.conftest import read_json
from tests.detection.pictures import written
from tests.search.processes import in_two_processes

UP = "vision_model.encoder.layers.3.mlp.fc1"
ID = ["--images", CASES / "images", "--classes", CASES / "folders.json", "--device", "cpu", "--resamples", 50]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    written(folder, 12)
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    folders = []
    for number, ratio in enumerate((0.25, 0.5)):
        config = SeTARConfig(target_modules=[UP], rank_ratios={UP: ratio})
        folders.append(tmp_path / f"adapter{number}")
        get_peft_model(load_model(str(CASES / "clip_tiny")), config).save_pretrained(
            folders[-1], save_embedding_layers=False
        )
    return folders


def by_hand(noise: Path, **kwargs: Any) -> Any:
    model = load_model(str(CASES / "clip_tiny"))
    processor = load_processor(str(CASES / "clip_tiny"), model)
    settings = {"class_names": read_json(CASES / "folders.json"), "labelled": True, "resamples": 50, **kwargs}
    return evaluate(model, CASES / "images", {noise.name: noise}, processor=processor, **settings)


def test_figures_are_those_of_evaluate(setar: Callable[..., Any], noise: Path) -> None:
    """In each form, and nothing else on standard output."""
    run = ["evaluate", CASES / "clip_tiny", *ID, "--ood", noise]
    expected = by_hand(noise)
    result = setar(*run)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected.table() + "\n"
    assert json.loads(setar(*run, "--json").stdout) == json.loads(expected.to_json())
    assert setar(*run, "--markdown").stdout == expected.to_markdown()
    rows = list(csv.DictReader(io.StringIO(setar(*run, "--csv").stdout)))
    assert [float(row["auroc"]) for row in rows] == [row.metrics.auroc for row in expected.rows]
    assert result.stderr.count("6 classes, from ") == 1


def test_what_was_chosen_is_what_is_measured(setar: Callable[..., Any], noise: Path) -> None:
    options = ["--score", "energy", "--score", "msp", "--tpr", 0.8, "--positive", "ood", "--threshold", "closest"]
    options += ["--unlabelled", "--prompt", "a {class}", "--temperature", 2, "--seed", 3, "--ood", f"other={noise}"]
    result = setar("evaluate", CASES / "clip_tiny", *ID, *options, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["prompt"] == "a {class}"
    assert told["models"]["model"]["accuracy"] is None
    assert told["models"]["model"]["scores"] == {"energy": {"temperature": 2.0}, "msp": {"temperature": 2.0}}
    assert {row["ood_set"] for row in told["rows"]} == {"other"}
    chosen = {"positive": "ood", "threshold_rule": "closest", "tpr": 0.8, "seed": 3, "resamples": 50}
    assert chosen.items() <= told["conventions"].items()


def test_adapters_side_by_side_with_their_base(setar: Callable[..., Any], noise: Path, adapters: list[Path]) -> None:
    options = ["--adapter", adapters[0], "--adapter", f"strong={adapters[1]}", "--score", "gl_mcm", "--json"]
    result = setar("evaluate", CASES / "clip_tiny", *ID, "--ood", noise, *options)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert list(told["models"]) == ["base", "adapter0", "strong"]
    assert {row["baseline"] for row in told["differences"]} == {"base"}
    alone = setar("evaluate", adapters[1], *ID, "--ood", noise, "--score", "gl_mcm", "--json")
    assert alone.exit_code == 0, alone.output
    auroc = {row["model"]: row["auroc"] for row in told["rows"]}
    assert auroc["strong"] == json.loads(alone.stdout)["rows"][0]["auroc"]


def test_a_detector_is_measured_as_it_is(setar: Callable[..., Any], noise: Path, saved_detector: Path) -> None:
    run = ["evaluate", saved_detector, "--images", CASES / "images", "--ood", noise, "--device", "cpu"]
    result = setar(*run, "--resamples", 0, "--unlabelled", "--json")
    assert result.exit_code == 0, result.output
    detector = OODDetector.from_pretrained(saved_detector)
    expected = evaluate(detector, CASES / "images", {noise.name: noise}, resamples=0)
    assert json.loads(result.stdout)["rows"] == json.loads(expected.to_json())["rows"]
    labelled = setar(*run, "--classes", CASES / "folders.json", "--resamples", 0, "--json")
    assert json.loads(labelled.stdout)["models"]["model"]["accuracy"] == by_hand(noise, resamples=0).accuracy()
    for option, value in (("--prompt", "a {class}"), ("--dtype", "bfloat16"), ("--adapter", "x"), ("--base", "x")):
        refused = setar(*run, option, value)
        assert refused.exit_code == 1
        assert f"is a detector, which has its own; leave {option} out" in refused.stderr


def test_files(setar: Callable[..., Any], noise: Path, tmp_path: Path) -> None:
    files = ["--parquet", tmp_path / "scores.parquet", "--report", tmp_path / "report.html", "--plots", tmp_path / "p"]
    run = [
        "evaluate",
        CASES / "clip_tiny",
        *ID,
        "--ood",
        noise,
        *files,
        "--score",
        "mcm",
        "--cache",
        tmp_path / "cache",
    ]
    result = setar(*run)
    assert result.exit_code == 0, result.output
    assert pq.read_table(tmp_path / "scores.parquet").num_rows == 36
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["mcm-histograms.png", "mcm-roc.png"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "layer_norm", None)  # nothing is computed again
        again = setar(*run)
    assert again.exit_code == 0, again.output
    assert again.stdout == result.stdout


def test_of_two_processes_the_first_speaks_and_writes(setar: Callable[..., Any], noise: Path, tmp_path: Path) -> None:
    run = ["evaluate", CASES / "clip_tiny", *ID, "--ood", noise, "--batch-size", 5]
    files = [tmp_path / "first.html", tmp_path / "second.html"]
    said = in_two_processes(lambda rank: ["-m", "setar_peft", *map(str, run), "--report", str(files[rank])])
    assert said[0].output == setar(*run).stdout
    assert said[1].output == ""
    assert [file.exists() for file in files] == [True, False]
    assert ["6 classes, from " in process.errors for process in said] == [True, False]


def test_texts(setar: Callable[..., Any], text_model: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = text_model
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "bert")
    rows = [f"the cat number {number} sat,{('weather', 'banking')[number % 2]}" for number in range(10)]
    (tmp_path / "test.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    (tmp_path / "other.txt").write_text("dog on mat\nmat on dog\n", encoding="utf-8")
    run = ["evaluate", tmp_path / "bert", "--texts", tmp_path / "test.csv", "--ood", tmp_path / "other.txt"]
    result = setar(*run, "--labelled", "--score", "energy", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["images"] == {"ID": 10, "other.txt": 2}
    assert 0 <= told["models"]["model"]["accuracy"] <= 1


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        (["--json", "--csv"], ["Give one of --json and --csv"]),
        (["--ood", "NOISE"], ["There are two OOD sets 'noise", "give one another name"]),
        (["--ood", "=x"], ["'=x' has no name or no folder"]),
        (["--ood", "nowhere"], ["nowhere"]),
        (["--score", "guess"], ["score is 'guess'"]),
        (["--positive", "both"], ["'both'"]),
        (["--threshold", "best"], ["'best'"]),
        (["--tpr", 2], ["tpr is 2"]),
        (["--resamples", -1], ["-1"]),
        (["--adapter", "nowhere"], ["nowhere"]),
        (["--adapter", "base=nowhere"], ["called 'base'"]),
        (["--report", "nowhere/report.html"], ["--report is nowhere/report.html", "no folder nowhere"]),
        (["--dtype", "tf32"], ["--dtype tf32"]),
        (["--fit-images", "images"], ["fit_data"]),
    ],
)
def test_wrong_input_gets_one_sentence(
    setar: Callable[..., Any], noise: Path, options: list[Any], pieces: list[str]
) -> None:
    given = [noise if option == "NOISE" else option for option in options]
    result = setar("evaluate", CASES / "clip_tiny", *ID, "--ood", noise, *given)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    for piece in pieces:
        assert piece in result.stderr.splitlines()[-1], result.stderr


def test_an_unreadable_image_ends_it_unless_it_is_left_out(
    setar: Callable[..., Any], noise: Path, tmp_path: Path
) -> None:
    written(tmp_path / "ood", 3)[1].write_bytes(b"")
    run = ["evaluate", CASES / "clip_tiny", *ID, "--ood", tmp_path / "ood", "--score", "mcm"]
    refused = setar(*run)
    assert refused.exit_code == 1
    assert "001.png cannot be read" in refused.stderr
    assert "1 images of ood could not be read and are left out" in " ".join(setar(*run, "--leave-out").stdout.split())

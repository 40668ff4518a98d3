"""`setar detect` as a user and as a script runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from setar_peft import OODDetector
from setar_peft.cli import app
from tests.cli.conftest import CASES
from tests.detection.pictures import written

IMAGES = CASES / "images"


def lines(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_records_are_the_detector_s(setar: Callable[..., Any], saved_detector: Path, tmp_path: Path) -> None:
    """Of folders, paths and lists of both, in the order in which they are given."""
    paths = written(tmp_path, 3)
    given = [paths[2], IMAGES / "c003", paths[0]]
    result = setar("detect", saved_detector, *given, "--json", "--device", "cpu", "--top-k", 3)
    assert result.exit_code == 0, result.output
    expected = [paths[2], *sorted((IMAGES / "c003").iterdir()), paths[0]]
    records = OODDetector.from_pretrained(saved_detector)(list(map(str, expected)), top_k=3)
    assert lines(result) == json.loads(json.dumps(records.to_dicts()))
    assert [len(line["top"]) for line in lines(result)] == [3] * len(expected)
    assert records.summary() in result.stderr


def test_a_table_is_the_default(setar: Callable[..., Any], saved_detector: Path) -> None:
    result = setar("detect", saved_detector, IMAGES, "--device", "cpu")
    assert result.exit_code == 0
    head, *rows, summary = result.stdout.splitlines()
    assert head.split() == ["id", "verdict", "score", "label", "probability"]
    assert len(rows) == 24
    assert summary.startswith("12 ID, 12 OOD; ID at a score of ")
    assert setar("detect", saved_detector, IMAGES, "--table", "--device", "cpu").stdout == result.stdout


def test_another_threshold(setar: Callable[..., Any], saved_detector: Path) -> None:
    run = ["detect", saved_detector, IMAGES, "--json", "--device", "cpu"]
    scores = sorted(line["score"] for line in lines(setar(*run)))
    strict = lines(setar(*run, "--threshold", scores[-1]))
    assert [line["threshold"] for line in strict] == [scores[-1]] * 24
    assert sum(line["is_id"] for line in strict) == 1
    with pytest.warns(UserWarning, match="24 ID inputs are few for a level of 0.75"):
        assert sum(line["is_id"] for line in lines(setar(*run, "--tpr", 0.75))) == 18
    refused = setar(*run, "--tpr", 0.75, "--threshold", 1)
    assert (refused.exit_code, "either tpr or threshold" in refused.stderr) == (1, True)


@pytest.mark.parametrize(
    ("threshold", "broken", "plain", "failing"),
    [(-1, False, 0, 0), (9, False, 0, 3), (-1, True, 1, 1), (9, True, 1, 3)],
    ids=["all ID", "all OOD", "ID and unreadable", "OOD and unreadable"],
)
def test_exit_codes(
    setar: Callable[..., Any],
    saved_detector: Path,
    tmp_path: Path,
    threshold: int,
    broken: bool,
    plain: int,
    failing: int,
) -> None:
    paths = written(tmp_path, 3)
    if broken:
        paths[1].write_bytes(b"")
    run = ["detect", saved_detector, *paths, "--device", "cpu", "--threshold", threshold]
    options: list[str]
    for options in ([], ["--json"]):
        assert setar(*run, *options).exit_code == plain
        assert setar(*run, *options, "--fail-on-ood").exit_code == failing


def test_what_cannot_be_read_is_a_record_and_counted(
    setar: Callable[..., Any], saved_detector: Path, tmp_path: Path
) -> None:
    paths = written(tmp_path, 4)
    paths[1].write_text("no image")
    url = "ftp://example.org/cat.png"
    result = setar("detect", saved_detector, tmp_path, "nowhere.png", url, "--json", "--device", "cpu")
    assert result.exit_code == 1
    records = lines(result)
    assert [record["id"] for record in records] == [*map(str, paths), "nowhere.png", url]
    assert [record["error"] is None for record in records] == [True, False, True, True, False, False]
    assert "No such file: 'nowhere.png'" in records[4]["error"]
    assert "'ftp' URLs are not fetched" in records[5]["error"]
    assert "3 errors" in result.stderr
    assert "3 errors" in setar("detect", saved_detector, tmp_path, "nowhere.png", url, "--device", "cpu").stdout


def test_texts(setar: Callable[..., Any], text_model: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = text_model
    texts = [f"the cat number {number} sat" for number in range(20)]
    detector = OODDetector(model, tokenizer, score="energy").fit(texts, tpr=0.5)
    detector.save_pretrained(tmp_path / "detector")
    (tmp_path / "few.txt").write_text("\n".join(texts[:3]), encoding="utf-8")
    (tmp_path / "table.csv").write_text(f"text,n\n{texts[4]},1\n", encoding="utf-8")
    given = [tmp_path / "few.txt", texts[3], tmp_path / "table.csv"]
    result = setar("detect", tmp_path / "detector", *given, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert [line["score"] for line in lines(result)] == [record.score for record in detector(texts[:5])]
    result = setar("detect", tmp_path / "detector", "nowhere.txt", "--device", "cpu")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nowhere.txt is no such file" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["nowhere", IMAGES], ["no detector 'nowhere'", "OODDetector.save_pretrained"]),
        ([CASES / "clip_tiny", IMAGES], ["clip_tiny has no detector.json"]),
        (["DETECTOR", IMAGES, "--device", "abacus"], ["device is 'abacus'"]),
        (["DETECTOR", IMAGES, "--top-k", 0], ["top_k is 0"]),
        (["DETECTOR", IMAGES, "--batch-size", 0], ["batch_size is 0"]),
        (["DETECTOR", IMAGES, "--tpr", 2], ["tpr is 2"]),
        (["DETECTOR", IMAGES, "--threshold", "nan"], ["threshold is nan"]),
        (["DETECTOR", "EMPTY"], ["holds no images"]),
    ],
)
def test_wrong_input_gets_one_sentence(
    setar: Callable[..., Any], saved_detector: Path, tmp_path: Path, arguments: list[Any], pieces: list[str]
) -> None:
    known = {"DETECTOR": saved_detector, "EMPTY": tmp_path}
    result = setar("detect", *(known.get(argument, argument) for argument in arguments))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    for piece in pieces:
        assert piece in result.stderr


def test_no_inputs_are_wrong_usage(setar: Callable[..., Any], saved_detector: Path) -> None:
    assert setar("detect", saved_detector).exit_code == 2


def test_lines_come_while_it_runs_and_a_closed_pipe_is_no_error(saved_detector: Path, tmp_path: Path) -> None:
    """As in `setar detect ... --json | head -1`."""
    written(tmp_path, 300)
    command = [sys.executable, "-m", "setar_peft", "detect", saved_detector, tmp_path, "--json", "--batch-size", "4"]
    with subprocess.Popen(
        [*map(str, command), "--device", "cpu", "--tpr", "0.9"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        first = json.loads(run.stdout.readline())
        assert first["id"].endswith("000.png")
        run.stdout.close()
        said = run.stderr.read()
        run.wait(60)
    assert "Error" not in said
    assert "\nWarning: 24 ID inputs are few for a level of 0.9" in f"\n{said}"
    assert "Traceback" not in said


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_an_output_cannot_show_are_escaped(saved_detector: Path, tmp_path: Path, encoding: str) -> None:
    """A file's name on Linux is bytes, and a terminal may know fewer characters."""
    folder = tmp_path / "büro"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (8, 8)).save(folder / "plain.png")
    (folder / "plain.png").rename(folder / name)
    command = ["detect", str(saved_detector), str(folder), "--device", "cpu"]
    # Its standard output knows the characters of that encoding alone, and takes nothing else.
    terminal = CliRunner(charset=encoding)
    table = terminal.invoke(app, command)
    assert table.exit_code == 0, table.output
    assert b"caf\\udce9.png" in table.stdout_bytes
    records = terminal.invoke(app, [*command, "--json"])
    assert records.exit_code == 0, records.output
    assert json.loads(records.stdout_bytes)["id"] == str(folder / name)

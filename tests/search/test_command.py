"""`setar search` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from setar_peft.cli import app
from setar_peft.search.trace import SearchTrace
from tests.conftest import GOLDEN

CASES = GOLDEN / "cases"
COMMON = [
    "search",
    str(CASES / "clip_tiny"),
    "--images",
    str(CASES / "images"),
    "--classes",
    str(CASES / "classes.json"),
]


def _setar(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*COMMON, *map(str, arguments)])
    return result.exit_code, result.output


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(tmp_path: Path) -> None:
    code, text = _setar("--output", tmp_path / "out", "--dry-run")
    assert code == 0
    for piece in ("images  24", "candidates  56", "vision 88, text 54", "FLOP", "kept", "time"):
        assert piece in text
    assert list(tmp_path.iterdir()) == []


def test_search_writes_adapter_and_trace_and_resumes(tmp_path: Path) -> None:
    options = ["--output", tmp_path, "--weights", "W_up,W_p", "--candidates", "0.2,0.4", "--order", "vision"]
    code, text = _setar(*options)
    assert code == 0, text
    trace = SearchTrace.load(tmp_path / "trace.json")
    assert [row.weight_type for row in trace.rows] == ["W_p", "W_up", "W_up", "W_up", "W_up"]
    assert {candidate.rank_ratio for candidate in trace.candidates} == {0.2, 0.4}
    assert (tmp_path / "trace.csv").read_text().splitlines()[0].startswith("step,tower_type")
    assert (tmp_path / "trace.png").stat().st_size > 0
    ratios = json.loads((tmp_path / "adapter_config.json").read_text())["rank_ratios"]
    assert ratios == {row.module: row.best_ratio for row in trace.rows}
    code, text = _setar(*options, "--resume")
    assert code == 0, text
    assert SearchTrace.load(tmp_path / "trace.json") == trace


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        (["--weights", "W_x"], "no weights 'W_x'"),
        (["--candidates", "a lot"], "no list of numbers"),
        (["--candidates", "1.2"], "candidate_ratios is 1.2"),
        (["--top-k", "7"], "top_k is 7 with 6 classes"),
        (["--order", "sideways"], "order is 'sideways'"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--criterion", "beauty"], "criterion is 'beauty'"),
    ],
)
def test_wrong_options_get_a_sentence(tmp_path: Path, options: list[str], piece: str) -> None:
    code, text = _setar("--output", tmp_path / "out", *options)
    assert code == 1
    assert piece in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()

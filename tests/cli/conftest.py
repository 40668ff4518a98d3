"""A detector as `setar fit` saves it, and the commands as a user runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from setar_peft.cli import app
from tests.conftest import GOLDEN
from tests.detection.conftest import text_model  # noqa: F401 - a fixture here, too

CASES = GOLDEN / "cases"


@pytest.fixture
def setar() -> Callable[..., Any]:
    """Runs a command; gives its exit code and what it said on standard output and standard error."""

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def saved_detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the golden CLIP, its six classes and GL-MCM; fitted at a level of one half on 24 images."""
    output = tmp_path_factory.mktemp("saved") / "detector"
    fit = ["fit", CASES / "clip_tiny", "--images", CASES / "images", "--classes", CASES / "folders.json"]
    options = [*fit, "--tpr", 0.5, "--output", output, "--device", "cpu"]
    result = CliRunner().invoke(app, [str(part) for part in options])
    assert result.exit_code == 0, result.output
    return output

from __future__ import annotations

import functools
import runpy
from pathlib import Path

import pytest

from setar_peft.demo import digits
from tests.demo.conftest import one_thread  # noqa: F401 - every test here uses it

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(digits, "load_model", functools.partial(digits.load_model, steps=2, progress=False))
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "vision_model.encoder.layers.3.mlp.fc1" in printed
    assert "SeTAR - base" in printed
    assert (tmp_path / "digits-setar" / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-setar", "setar_peft"]


def test_the_quickstart_is_short() -> None:
    lines = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 35

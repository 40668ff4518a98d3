"""`setar export-onnx`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from setar_peft.cli import app
from setar_peft.detection.detector import OODDetector
from tests.detection.conftest import detector, processor  # noqa: F401 - fixtures
from tests.detection.pictures import pictures


def test_a_saved_detector_becomes_a_graph(detector: OODDetector, tmp_path: Path) -> None:  # noqa: F811
    detector.fit(pictures(40), tpr=0.5).save_pretrained(tmp_path / "detector")
    output = tmp_path / "onnx"
    result = CliRunner().invoke(app, ["export-onnx", str(tmp_path / "detector"), str(output), "--dtype", "float16"])
    assert result.exit_code == 0, result.output
    assert f"Wrote {output / 'model.onnx'}: on 8 inputs its scores, over a range of" in result.output
    assert json.loads((output / "detector.json").read_text(encoding="utf-8"))["dtype"] == "float16"
    assert onnxruntime.InferenceSession(output / "model.onnx").get_inputs()[0].name == "pixel_values"

    again = CliRunner().invoke(app, ["export-onnx", str(tmp_path / "detector"), str(output)])
    assert again.exit_code == 1
    assert "is not an empty folder; give a new one" in " ".join(again.output.split())
    usage = CliRunner().invoke(app, ["export-onnx", str(tmp_path / "detector"), "other", "--dtype", "int8"])
    assert usage.exit_code == 2
    nothing = CliRunner().invoke(app, ["export-onnx", str(tmp_path / "nothing"), str(tmp_path / "other")])
    assert nothing.exit_code == 1
    assert "There is no detector" in " ".join(nothing.output.split())
    assert not (tmp_path / "other").exists()

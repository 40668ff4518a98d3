"""The README's Python, run as it stands but for the names of models and folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from setar_peft.backbones.loading import load_model, load_processor
from tests.conftest import GOLDEN, read_json

README = Path(__file__).parents[1] / "README.md"
CASES = GOLDEN / "cases"
# What stands for a Hub name, a folder of the user's, or a setting that needs more classes than the test has.
STAND_INS = {
    'CLIPModel.from_pretrained("openai/clip-vit-base-patch16")': "load_model(FOLDER)",
    'CLIPProcessor.from_pretrained("openai/clip-vit-base-patch16")': "load_processor(FOLDER, model)",
    '"imagenet_1k_one_image_a_class/"': "IMAGES",
    '"imagenet_1k_validation/"': "IMAGES",
    '"places/"': "OOD_IMAGES",
    '"report.html"': "REPORT",
    "top_k=300": "top_k=2",
    '"adapter"': "ADAPTER",
    'peft_model.push_to_hub("you/clip-setar-imagenet")': "",
}


def _blocks() -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    text = "\0".join(blocks)
    for given, stand_in in STAND_INS.items():
        assert given in text, f"the README no longer says {given}"
        text = text.replace(given, stand_in)
    return text.split("\0")


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    model_folder = str(CASES / "clip_tiny")
    names: dict[str, Any] = {
        "FOLDER": model_folder,
        "IMAGES": CASES / "images",
        "OOD_IMAGES": CASES / "images" / "c003",
        "REPORT": tmp_path / "report.html",
        "ADAPTER": str(tmp_path),
        "class_names": read_json(CASES / "folders.json"),
        "load_model": load_model,
        "load_processor": load_processor,
        "pixel_values": torch.zeros(2, 3, 32, 32),
    }
    for block in _blocks():
        exec(compile(block, str(README), "exec"), names)
    assert any(names["peft_model"].peft_config["default"].rank_ratios.values())
    assert names["scores"].shape == (2,)
    assert list(names["evaluation"].models) == ["base", "SeTAR"]
    assert (tmp_path / "report.html").is_file()
    assert type(names["peft_model"].merge_and_unload()).__name__ == "CLIPModel"


@pytest.mark.parametrize(
    "command", ["setar demo", "pytest", "setar search", "setar merge", "setar export-lora", "setar info"]
)
def test_the_commands_exist(command: str) -> None:
    from typer.testing import CliRunner

    from setar_peft.cli import app

    assert command in README.read_text(encoding="utf-8")
    program, *subcommand = command.split()
    if program == "setar":
        assert CliRunner().invoke(app, [*subcommand, "--help"]).exit_code == 0

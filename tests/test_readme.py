"""The Python of the README and of the pages on detectors, run as it stands, in a folder that has what it names."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from typer.testing import CliRunner

from setar_peft import SeTARConfig
from setar_peft.backbones.loading import load_model, load_processor
from setar_peft.cli import app
from setar_peft.detection.threshold import Threshold
from tests.conftest import GOLDEN, read_json
from tests.detection.pictures import pictures, written

ROOT = Path(__file__).parents[1]
README, DETECTION = ROOT / "README.md", ROOT / "docs" / "detection.md"
CASES = GOLDEN / "cases"
CLIP = "openai/clip-vit-base-patch16"
# What needs more classes than the test has, and the Hub.
STAND_INS = {
    "top_k=300": "top_k=2",
    'peft_model.push_to_hub("you/clip-setar-imagenet")': "",
    'detector.push_to_hub("you/street-detector")': "",
}
# The interval of few images is said elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:24 ID inputs are few:UserWarning")


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    for block in blocks(page):
        for given, stand_in in STAND_INS.items():
            block = block.replace(given, stand_in)
        exec(compile(block, str(page), "exec"), names)
    return names


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and pictures that the pages name, which is the working directory."""
    model = load_model(str(CASES / "clip_tiny"))
    for part in (model, load_processor(str(CASES / "clip_tiny"), model)):
        part.save_pretrained(tmp_path / CLIP)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**shape, image_size=32, patch_size=8, id2label={0: "cat", 1: "dog", 2: "car"})
    for part in (ViTForImageClassification(config), ViTImageProcessorPil(size={"height": 32, "width": 32})):
        part.save_pretrained(tmp_path / "google" / "vit-base-patch16-224")
    for name in ("imagenet_1k_one_image_a_class", "imagenet_1k_validation"):
        (tmp_path / name).symlink_to(CASES / "images")
    (tmp_path / "test").mkdir()
    for folder, name in read_json(CASES / "folders.json").items():
        (tmp_path / "test" / name).symlink_to(CASES / "images" / folder)
    for seed, (name, count) in enumerate({"held-out": 200, "inbox": 5, "places": 6, "textures": 6}.items()):
        written(tmp_path / name, count, seed)
    pictures(1, seed=9)[0].save(tmp_path / "street.jpg")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_the_readme_runs(here: Path) -> None:
    names = run(README, {"class_names": read_json(CASES / "folders.json")})
    assert any(names["peft_model"].peft_config["default"].rank_ratios.values())
    assert list(names["evaluation"].models) == ["base", "SeTAR"]
    assert (here / "report.html").is_file()
    assert len(names["detector"]("inbox/")) == 5
    assert type(names["peft_model"].merge_and_unload()).__name__ == "CLIPModel"


def test_a_decision_takes_six_lines(here: Path) -> None:
    (block,) = (block for block in blocks(README) if "street.jpg" in block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 6
    names: dict[str, Any] = {}
    exec(compile(block, str(README), "exec"), names)
    assert names["detector"].threshold.n == 200
    assert (here / "my-detector" / "detector.json").is_file()


def test_the_python_of_the_page_on_detection_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the detector that its commands make."""
    fit = ["fit", CLIP, "--images", "test", "--output", "my-detector", "--device", "cpu"]
    result = CliRunner().invoke(app, fit)
    assert result.exit_code == 0, result.output
    names = run(DETECTION, {})
    assert names["records"][1].error.startswith("nowhere.jpg cannot be read")
    assert names["scored"].num_rows == 5
    assert set(names["pipe"].detector.class_names) == set(read_json(CASES / "folders.json").values())
    assert "textures" in capsys.readouterr().out


def test_the_python_of_the_page_on_saved_detectors_runs(here: Path) -> None:
    model = load_model(CLIP)
    adapted = get_peft_model(model, SeTARConfig(rank_ratios={"vision_model.encoder.layers.1.mlp.fc1": 0.5}))
    names = {"peft_model": adapted, "processor": load_processor(CLIP, model), "class_names": ["cat", "dog", "red car"]}
    run(ROOT / "docs" / "detector.md", names)
    assert (here / "street-detector" / "adapter_model.safetensors").is_file()
    assert (here / "why.png").is_file()


def test_the_intervals_of_a_threshold_are_right() -> None:
    rows = re.findall(
        r"^\| ([\d,]+) \| ([\d.]+) % to ([\d.]+) % \| ([\d.]+) points",
        DETECTION.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) == 3
    for number, low, high, deviation in rows:
        n = int(number.replace(",", ""))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            interval = Threshold.of(np.arange(n), 0.95).interval
        assert interval == pytest.approx((float(low) / 100, float(high) / 100), abs=6e-4)
        assert float(deviation) == round(100 * (0.95 * 0.05 / n) ** 0.5, 1)


@pytest.mark.parametrize(
    "command",
    [
        *("setar demo", "pytest", "setar search", "setar fit", "setar detect", "setar evaluate"),
        *("setar merge", "setar export-lora", "setar info"),
    ],
)
def test_the_commands_exist(command: str) -> None:
    assert command in README.read_text(encoding="utf-8")
    program, *subcommand = command.split()
    if program == "setar":
        assert CliRunner().invoke(app, [*subcommand, "--help"]).exit_code == 0


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/*.md")), README], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], anchor

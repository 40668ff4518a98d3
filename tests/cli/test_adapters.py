"""`setar merge`, `setar export-lora` and `setar info`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import CLIPModel
from typer.testing import CliRunner

from setar_peft import SeTARConfig
from setar_peft.cli import app

X = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32), "input_ids": torch.tensor([[0, 5, 1]])}


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    return " ".join(result.output.split())


@pytest.fixture(params=[False, True], ids=["training-free", "fine-tuned"])
def adapter(request: pytest.FixtureRequest, load_clip, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    ratios = {"vision_model.encoder.layers.0.mlp.fc1": 0.25, "text_model.encoder.layers.1.mlp.fc1": 0.0}
    config = SeTARConfig(rank_ratios=ratios, finetune=request.param, init_weights=not request.param)
    model = get_peft_model(load_clip(), config).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with torch.no_grad():
        return tmp_path / "adapter", model(**X).logits_per_image


def test_merge_gives_a_stock_checkpoint(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, expected = adapter
    run("merge", folder, tmp_path / "merged")
    model = CLIPModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**X).logits_per_image, expected, rtol=1e-5, atol=1e-5)
    assert "setar" not in json.dumps(json.loads((tmp_path / "merged" / "config.json").read_text()))


def test_export_lora(adapter: tuple[Path, torch.Tensor], tmp_path: Path, golden: Path) -> None:
    folder, expected = adapter
    run("export-lora", folder, tmp_path / "lora", "--base", golden / "cases" / "clip_tiny")
    model = PeftModel.from_pretrained(
        CLIPModel.from_pretrained(golden / "cases" / "clip_tiny").eval(), tmp_path / "lora"
    )
    with torch.no_grad():
        torch.testing.assert_close(model(**X).logits_per_image, expected, rtol=1e-5, atol=1e-5)


def test_info(adapter: tuple[Path, torch.Tensor]) -> None:
    output = run("info", adapter[0])
    for piece in (
        "1 of 2 adapted layers are truncated",
        "vision_model.encoder.layers.0.mlp.fc1",
        "16 of 64",
        "256 x 64",
    ):
        assert piece in output, piece


def test_refusals(adapter: tuple[Path, torch.Tensor], tmp_path: Path, golden: Path) -> None:
    folder, _ = adapter
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "not an empty folder" in refused("merge", folder, tmp_path / "full")
    assert "Can't find 'adapter_config.json'" in refused("info", tmp_path / "full")
    out = tmp_path / "out"
    assert "made from another base" in refused("merge", folder, out, "--base", golden / "cases" / "clip_tiny_eq")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"] = {"parent_library": "os", "base_model_class": "system"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert "does not name a transformers model" in refused("merge", folder, out)
    config["auto_mapping"] = {"parent_library": "transformers.models.clip.modeling_clip", "base_model_class": "torch"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert "which is no model" in refused("export-lora", folder, out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))

"""An exported LoRA gives the adapter's output in stock PEFT, in a process that cannot import this package."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPModel
from transformers.pytorch_utils import Conv1D

import setar_peft.tuner.export as export_module
from setar_peft import SeTARConfig
from setar_peft.tuner.export import export_lora
from setar_peft.tuner.layer import SeTARLayer

# What stock PEFT does in its own process, for each folder: load the base and the LoRA; save the output and what every
# layer got for a rank and a scaling.
STOCK = """
import sys
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "setar_peft":
            raise ImportError("setar_peft is blocked")

sys.meta_path.insert(0, Block())
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

for folder in Path(sys.argv[1]).iterdir():
    base, x = torch.load(folder / "base.pt", weights_only=False)
    model = PeftModel.from_pretrained(base, folder / "lora").eval()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    with torch.no_grad():
        output = model(**x) if isinstance(x, dict) else model(x)
    output = output if torch.is_tensor(output) else torch.cat([output.logits_per_image, output.logits_per_text.T])
    got = {name: (module.r["default"], module.scaling["default"]) for name, module in layers.items()}
    torch.save((output, got), folder / "out.pt")
assert not any(name.split(".")[0] == "setar_peft" for name in sys.modules)
"""


def stack() -> nn.Sequential:
    """Plain torch, so that the other process can unpickle it; "0" is also the end of "2.0" and of "3.inner.0"."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(24, 24))
    return nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24), inner, nn.Sequential(nn.Linear(24, 8))).eval()


def conv1d_stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(24, 16), nn.GELU(), Conv1D(8, 24)).eval()


def shake(model: nn.Module) -> None:
    """Move B, A off their starting point, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


class Case(NamedTuple):
    """A model with an adapter, its input, and the LoRA layers that should come out of it: name -> rank."""

    model: PeftModel
    x: Any
    ranks: dict[str, int]

    def output(self) -> torch.Tensor:
        with torch.no_grad():
            output = self.model(**self.x) if isinstance(self.x, dict) else self.model(self.x)
        if torch.is_tensor(output):
            return output
        return torch.cat([output.logits_per_image, output.logits_per_text.T])


@pytest.fixture(scope="module")
def cases(golden: Path, golden_clip: dict[str, torch.Tensor]) -> dict[str, Case]:
    def adapted(base: nn.Module, **settings: Any) -> PeftModel:
        model = get_peft_model(base, SeTARConfig(**settings)).eval()
        shake(model)
        return model

    def clip() -> nn.Module:
        return CLIPModel.from_pretrained(golden / "cases" / "clip_tiny").eval()

    x = torch.randn(5, 16)
    images = {"pixel_values": golden_clip["pixel_values"][:2], "input_ids": torch.tensor([[0, 5, 6, 1], [0, 7, 8, 1]])}
    ratios, conv1d_ratios = {"0": 0.25, "1": 0.5, "2.0": 0.0}, {"0": 0.25, "2": 0.5}
    clip_ratios = {"layers.0.mlp.fc1": 0.2, "layers.1.mlp.fc1": 0.4}
    clip_model = adapted(clip(), rank_ratios=clip_ratios)
    clip_layers = {
        name: layer.setar_B0["default"].shape[1]
        for name, layer in clip_model.get_base_model().named_modules()
        if isinstance(layer, SeTARLayer)
    }
    return {
        "training-free": Case(adapted(stack(), rank_ratios=ratios), x, {"0": 4, "1": 12}),
        "fine-tuned": Case(adapted(stack(), rank_ratios=ratios, finetune=True), x, {"0": 8, "1": 24}),
        "Conv1D": Case(adapted(conv1d_stack(), rank_ratios=conv1d_ratios), x, {"0": 4, "2": 4}),
        "Conv1D fine-tuned": Case(
            adapted(conv1d_stack(), rank_ratios=conv1d_ratios, finetune=True), x, {"0": 8, "2": 8}
        ),
        "modules_to_save": Case(
            adapted(stack(), rank_ratios={"1": 0.5}, finetune=True, modules_to_save=["3.0"]), x, {"1": 24}
        ),
        # As suffixes, the target "0" would also hit "3.0", and the rank of "0" would go to "2.0" as well.
        "suffixes": Case(adapted(stack(), rank_ratios={"0": 0.25, "2.0": 0.5, "3.0": 0.0}), x, {"0": 4, "2.0": 12}),
        "CLIP": Case(clip_model, images, clip_layers),
    }


@pytest.fixture(scope="module")
def in_stock_peft(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a case, with the LoRA and what stock PEFT made of it, from one process without this package."""
    folder = tmp_path_factory.mktemp("stock")
    for name, case in cases.items():
        (folder / name).mkdir()
        torch.save((copy.deepcopy(case.model).unload(), case.x), folder / name / "base.pt")
        assert export_lora(case.model, folder / name / "lora") == folder / name / "lora"
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr, done.stderr
    return folder


CASES = ("training-free", "fine-tuned", "Conv1D", "Conv1D fine-tuned", "modules_to_save", "suffixes", "CLIP")


@pytest.mark.parametrize("name", CASES)
def test_stock_peft_computes_the_same(name: str, cases: dict[str, Case], in_stock_peft: Path) -> None:
    output, layers = torch.load(in_stock_peft / name / "out.pt", weights_only=True)
    expected = cases[name].output()
    assert (output - expected).norm() <= 1e-6 * expected.norm()
    assert layers == {layer: (rank, 1.0) for layer, rank in cases[name].ranks.items()}
    files = sorted(path.name for path in (in_stock_peft / name / "lora").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]


def test_targets_are_exact(in_stock_peft: Path) -> None:
    def config(name: str) -> dict[str, Any]:
        return json.loads((in_stock_peft / name / "lora" / "adapter_config.json").read_text())

    assert config("Conv1D")["fan_in_fan_out"]
    assert config("modules_to_save")["target_modules"] == ["1"]
    assert config("suffixes")["target_modules"] == r"0|2\.0"
    assert config("suffixes")["rank_pattern"] == config("suffixes")["alpha_pattern"] == {"^0": 4}


def test_named_adapter_of_a_bfloat16_base(tmp_path: Path) -> None:
    model = get_peft_model(stack().bfloat16(), SeTARConfig(rank_ratios={"1": 0.5}), adapter_name="first")
    model.add_adapter("second", SeTARConfig(rank_ratios={"0": 0.25}))
    export_lora(model, tmp_path / "new" / "lora", "second")
    tensors = load_file(tmp_path / "new" / "lora" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "base_model.model.0.lora_A.weight": (4, 16),
        "base_model.model.0.lora_B.weight": (24, 4),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_refusals_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "lora"
    with pytest.raises(TypeError, match="export_lora got a Sequential"):
        export_lora(stack(), target)
    model = get_peft_model(stack(), SeTARConfig(rank_ratios={"1": 0.5}))
    with pytest.raises(ValueError, match="no SeTAR adapter named 'other'; it has 'default'"):
        export_lora(model, target, "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into 1.*unmerge_adapter"):
        export_lora(model, target)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="truncates no layer"):
        export_lora(get_peft_model(stack(), SeTARConfig(rank_ratios={"1": 0.0})), target)
    broken = get_peft_model(stack(), SeTARConfig(rank_ratios={"1": 0.5}))
    broken.base_model.model[1].setar_B0["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="factors of 1 hold NaN"):
        export_lora(broken, target)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            export_lora(model, target)
    assert list(tmp_path.iterdir()) == []

    model.save_pretrained(target)
    with pytest.raises(ValueError, match="not an empty folder"):
        export_lora(model, target)
    assert PeftModel.from_pretrained(stack(), target).peft_config["default"].peft_type.value == "SETAR"


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    export_lora(get_peft_model(stack(), SeTARConfig(rank_ratios={"1": 0.5})), tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()

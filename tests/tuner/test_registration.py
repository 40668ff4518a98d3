"""Loads through PEFT and transformers: adapters of modules that have other names there, and loads that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, LlamaConfig, LlamaForCausalLM

from setar_peft import SeTARConfig
from tests.tuner.models import MLP, assert_unchanged, inputs, snapshot

RATIOS = {"fc1": 0.25, "fc2": 0.5}


class Renamed(MLP):
    """The layers of `MLP` under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"up": self.fc1, "down": self.fc2})
        del self.fc1, self.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body["down"](torch.relu(self.body["up"](x)))))


def _language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2)).eval()


class TestNames:
    """Adapters of modules that have other names where they are loaded."""

    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_an_output_layer(self, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
        model = get_peft_model(_language_model(), SeTARConfig(rank_ratios={"lm_head": 0.3, "up_proj": 0.5})).eval()
        tokens = torch.tensor([[1, 2, 3]])
        expected = model(tokens).logits
        model.save_pretrained(tmp_path / "adapter")
        with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
            assert all(".setar_" in key for key in file.keys())  # noqa: SIM118 - the base's weight is not the adapter's
        loaded = PeftModel.from_pretrained(
            _language_model(), tmp_path / "adapter", strict_base=True, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(loaded(tokens).logits, expected)
        by_transformers = _language_model()
        by_transformers.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(by_transformers(tokens).logits, expected)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("saved_compiled", [False, True])
    @pytest.mark.parametrize("loaded_compiled", [False, True])
    def test_a_compiled_base(
        self, saved_compiled: bool, loaded_compiled: bool, low_cpu_mem_usage: bool, tmp_path: Path
    ) -> None:
        def base(compiled: bool) -> Any:
            return torch.compile(MLP(), backend="eager") if compiled else MLP()

        torch._dynamo.reset()
        config = SeTARConfig(rank_ratios=RATIOS, prune="random", finetune=True, init_weights=False)
        model = get_peft_model(base(saved_compiled), config)
        assert model.peft_config["default"].rank_ratios == RATIOS
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
            assert not [key for key in file.keys() if "_orig_mod" in key]  # noqa: SIM118 - not a mapping
        loaded = PeftModel.from_pretrained(
            base(loaded_compiled), tmp_path, strict_base=True, low_cpu_mem_usage=low_cpu_mem_usage
        )
        torch.testing.assert_close(loaded(inputs()), model(inputs()))

    def test_modules_to_save_of_a_compiled_base_are_refused(self, tmp_path: Path) -> None:
        get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, modules_to_save=["head"])).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"_orig_mod\.head is to be trained in full") as error:
            PeftModel.from_pretrained(torch.compile(MLP(), backend="eager"), tmp_path)
        assert "before the model is compiled" in str(error.value)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_key_mapping(self, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, target_modules=r"fc\d"))
        model.save_pretrained(tmp_path / "first")
        mapping = {r"^fc1\.": "body.up.", r"^fc2\.": "body.down."}
        settings = {"key_mapping": mapping, "strict_base": True, "low_cpu_mem_usage": low_cpu_mem_usage}
        loaded = PeftModel.from_pretrained(Renamed(), tmp_path / "first", **settings)
        assert torch.equal(loaded(inputs()), model(inputs()))
        assert loaded.peft_config["default"].rank_ratios == {"body.up": 0.25, "body.down": 0.5}
        loaded.load_adapter(tmp_path / "first", "second", **settings)
        loaded.set_adapter("second")
        assert torch.equal(loaded(inputs()), model(inputs()))
        loaded.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(Renamed(), tmp_path / "again", strict_base=True)
        assert torch.equal(again(inputs()), model(inputs()))

    def test_a_key_mapping_that_makes_two_modules_one(self, tmp_path: Path) -> None:
        get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS)).save_pretrained(tmp_path)
        base = Renamed()
        before = snapshot(base)
        with pytest.raises(ValueError, match=r"the same name 'body\.up'") as error:
            PeftModel.from_pretrained(base, tmp_path, key_mapping={r"fc\d": "body.up"})
        assert "'fc1' and 'fc2'" in str(error.value)
        assert_unchanged(base, before)

    def test_key_mapping_of_transformers(
        self, load_clip: Callable[..., CLIPModel], golden_clip: dict[str, Tensor], tmp_path: Path
    ) -> None:
        new, old = "vision_model.encoder.layers.0.mlp.fc1", "visual.blocks.0.mlp.fc1"
        model = get_peft_model(load_clip(), SeTARConfig(rank_ratios={new: 0.3})).eval()
        model.save_pretrained(tmp_path)
        # As it would be of a model whose modules have been renamed since.
        file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
        save_file({name.replace(new, old): tensor for name, tensor in load_file(file).items()}, file)
        config.write_text(config.read_text().replace(new, old))
        values = {**json.loads(config.read_text()), "weights_sha256": None}
        config.write_text(json.dumps(values))
        mapping = {r"visual\.blocks": "vision_model.encoder.layers"}
        loaded = CLIPModel.from_pretrained(tmp_path, key_mapping=mapping, attn_implementation="eager").eval()
        assert loaded.peft_config["default"].rank_ratios == {new: 0.3}
        batch = {name: golden_clip[name] for name in ("input_ids", "attention_mask")} | {
            "pixel_values": golden_clip["pixel_values"][:2]
        }
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits_per_image, model(**batch).logits_per_image)


class TestFailures:
    def test_a_load_that_fails_after_the_adapter_came_leaves_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS)).save_pretrained(tmp_path)

        def unreachable(*args: Any, **kwargs: Any) -> None:
            raise OSError("no network")

        monkeypatch.setattr(peft_model, "load_peft_weights", unreachable)
        base = MLP()
        before = snapshot(base)
        with pytest.raises(OSError, match="no network"):
            PeftModel.from_pretrained(base, tmp_path)
        assert_unchanged(base, before)

    def test_by_transformers(self, load_clip: Callable[..., CLIPModel], tmp_path: Path) -> None:
        get_peft_model(load_clip(), SeTARConfig(rank_ratios=0.3)).save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("setar_B0"))
        for damage in (
            {**tensors, name: tensors[name] * torch.nan},
            {key: value for key, value in tensors.items() if key != name},
        ):
            save_file(damage, file)
            base = load_clip()
            before = snapshot(base)
            with pytest.raises(ValueError, match=r"finite|no factors"):
                base.load_adapter(str(tmp_path))
            assert_unchanged(base, before)

    def test_another_methods_adapter_is_none_of_ours(self, tmp_path: Path) -> None:
        model = get_peft_model(MLP(), LoraConfig(target_modules=["fc1"], init_lora_weights=False))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(MLP(), tmp_path)
        assert torch.equal(loaded(inputs()), model(inputs()))
        (tmp_path / "adapter_model.safetensors").unlink()
        with pytest.raises(Exception, match=r"\w"):
            loaded.load_adapter(tmp_path, "other")
        assert torch.equal(loaded(inputs()), model(inputs()))


@pytest.mark.parametrize("load", ["PeftModel.from_pretrained(model, folder)", "model.load_adapter(folder)"])
def test_loading_where_peft_was_only_looked_for(
    load: str, load_clip: Callable[..., CLIPModel], golden: Path, tmp_path: Path
) -> None:
    """transformers looks whether PEFT is there, long before anybody imports it: loading is wrapped all the same."""
    other = load_clip()
    other.vision_model.encoder.layers[0].mlp.fc1.weight.data.normal_()
    ratios = {"vision_model.encoder.layers.0.mlp.fc1": 0.3}
    get_peft_model(other, SeTARConfig(rank_ratios=ratios)).save_pretrained(tmp_path)
    script = f"""
import sys, setar_peft
from transformers import CLIPModel
folder, model = {str(tmp_path)!r}, CLIPModel.from_pretrained({str(golden / "cases" / "clip_tiny")!r})
assert "peft" not in sys.modules
{"from peft import PeftModel" if "PeftModel" in load else ""}
try:
    {load.replace("folder)", "folder, strict_base=True)")}
except ValueError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "vision_model.encoder.layers.0.mlp.fc1" in said.stdout, said.stderr

"""What transformers does with an adapter, on the golden CLIP model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModel, PeftModel, get_peft_model
from peft.utils.warning import PeftWarning
from torch import Tensor, nn
from transformers import CLIPModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from setar_peft import SeTARConfig, SeTARLayer
from setar_peft.tuner import layer as layer_module
from tests.tuner.models import assert_unchanged, snapshot

pytestmark = [
    # PEFT says so whenever transformers adds a second adapter, of whatever method.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.skipif(
        Version(version("peft")) < Version(MIN_PEFT_VERSION),
        reason=f"this transformers wants PEFT {MIN_PEFT_VERSION} or later for any adapter; {version('peft')} is here",
    ),
]

LoadClip = Callable[..., CLIPModel]


@pytest.fixture
def logits(golden_clip: dict[str, Tensor]) -> Callable[[nn.Module], Tensor]:
    batch = {name: golden_clip[name] for name in ("input_ids", "attention_mask")} | {
        "pixel_values": golden_clip["pixel_values"][:4]
    }

    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**batch).logits_per_image

    return run


@pytest.fixture(params=[False, True], ids=["training-free", "finetuned"])
def saved(
    request: pytest.FixtureRequest, load_clip: LoadClip, logits: Callable[[nn.Module], Tensor], tmp_path: Path
) -> tuple[Path, Tensor]:
    """A saved adapter and the logits that it gives."""
    config = SeTARConfig(rank_ratios=0.3, finetune=request.param, init_weights=not request.param)
    model = get_peft_model(load_clip(), config).eval()
    model.save_pretrained(tmp_path)
    return tmp_path, logits(model)


def _layers(model: nn.Module) -> Iterator[SeTARLayer]:
    return (module for module in model.modules() if isinstance(module, SeTARLayer))


def test_add_switch_and_delete(load_clip: LoadClip, logits: Callable[[nn.Module], Tensor]) -> None:
    model = load_clip()
    base = logits(model)
    model.add_adapter(SeTARConfig(rank_ratios=0.3), adapter_name="first")
    first = logits(model)
    model.add_adapter(SeTARConfig(rank_ratios=0.3, prune="principal"), adapter_name="second")
    second = logits(model)
    assert model.active_adapters() == ["second"]
    assert not torch.allclose(first, base)
    assert not torch.allclose(first, second)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(SeTARConfig(rank_ratios=0.3), adapter_name="first")
    model.delete_adapter("first")
    assert torch.equal(logits(model), base)


def test_two_training_free_ones_together_give_a_warning(load_clip: LoadClip) -> None:
    model = load_clip()
    for name in ("first", "second"):
        model.add_adapter(SeTARConfig(rank_ratios=0.3), adapter_name=name)
    with pytest.warns(PeftWarning, match="first, second are active together"):
        model.set_adapter(["first", "second"])


def test_a_refused_adapter_leaves_a_model_that_can_take_another(load_clip: LoadClip) -> None:
    model = load_clip()
    with pytest.raises(ValueError, match="'fc9'"):
        model.add_adapter(SeTARConfig(rank_ratios={"fc9": 0.3}, target_modules=["mlp.fc1"]))
    assert not list(_layers(model))
    model.add_adapter(SeTARConfig(rank_ratios=0.3))
    assert len(list(_layers(model))) == 7


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_adapter_runs_no_decomposition(
    load_clip: LoadClip,
    logits: Callable[[nn.Module], Tensor],
    saved: tuple[Path, Tensor],
    low_cpu_mem_usage: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, expected = saved
    monkeypatch.delattr(layer_module, "decompose")
    model = load_clip()
    info = model.load_adapter(str(folder), low_cpu_mem_usage=low_cpu_mem_usage)
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_meta]
    assert torch.equal(logits(model), expected)


def test_from_pretrained_of_an_adapter_folder(
    load_clip: LoadClip,
    logits: Callable[[nn.Module], Tensor],
    saved: tuple[Path, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, expected = saved
    monkeypatch.delattr(layer_module, "decompose")
    # The config names the base, which is the golden checkpoint.
    model = CLIPModel.from_pretrained(folder, attn_implementation="eager").eval()
    assert len(list(_layers(model))) == 7
    assert torch.equal(logits(model), expected)
    model = AutoPeftModel.from_pretrained(folder, attn_implementation="eager").eval()
    assert isinstance(model, PeftModel)


def test_saving_from_transformers_and_loading_with_peft(
    load_clip: LoadClip, logits: Callable[[nn.Module], Tensor], tmp_path: Path
) -> None:
    model = load_clip()
    model.add_adapter(SeTARConfig(rank_ratios=0.3))
    state = model.get_adapter_state_dict()
    assert len(state) == 7 * 3
    assert all("setar_" in name for name in state)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert torch.equal(logits(PeftModel.from_pretrained(load_clip(), tmp_path)), logits(model))


def test_another_base_is_noticed(load_clip: LoadClip, saved: tuple[Path, Tensor]) -> None:
    def other() -> CLIPModel:
        model = load_clip()
        for name, module in model.named_modules():
            if name.endswith("mlp.fc1"):
                nn.init.normal_(module.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        return model

    with pytest.warns(PeftWarning, match="another base model"):
        other().load_adapter(str(saved[0]))
    model = other()
    before = snapshot(model)
    with pytest.raises(ValueError, match="another base model"):
        model.load_adapter(str(saved[0]), strict_base=True)
    assert_unchanged(model, before)


def test_compiles(load_clip: LoadClip, logits: Callable[[nn.Module], Tensor], saved: tuple[Path, Tensor]) -> None:
    torch._dynamo.reset()
    model = load_clip()
    model.load_adapter(str(saved[0]))
    layer = model.vision_model.encoder.layers[0].mlp.fc1
    x = torch.randn(3, layer.in_features)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)

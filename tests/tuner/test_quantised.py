"""Quantised bases through PEFT's backends, on the CPU; skipped where a backend is not installed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn

from setar_peft import SeTARConfig
from setar_peft.decomposition import decompose
from setar_peft.tuner import kept_weight
from setar_peft.tuner import layer as layer_module

pytestmark = [
    # The backends' own, on import and on use.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
RATIOS = {"0": 0.3, "2": 0.2}


def _base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).requires_grad_(False)


def _bitsandbytes(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if bits == 8:
        layers = [bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False) for shape in ((64, 128), (128, 64))]
    else:
        layers = [bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32) for shape in ((64, 128), (128, 64))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    model.load_state_dict(_base().state_dict())
    return model.to("cpu").requires_grad_(False)  # moving it is what quantises


def _torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, config = _base(), quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, config)
    # Where PEFT looks, in a model that transformers has quantised, for how to quantise it again.
    settings = SimpleNamespace(get_apply_tensor_subclass=lambda: config)
    model.hf_quantizer = SimpleNamespace(quantization_config=settings)  # type: ignore[assignment]
    return model


@pytest.fixture(params=["bitsandbytes 8 bit", "bitsandbytes 4 bit", "torchao int8"])
def quantised(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        if request.param == "torchao int8":
            return _torchao()
        return _bitsandbytes(8 if "8" in request.param else 4)

    make()
    return make


def _inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))


def test_the_dequantised_weight_is_split_and_the_base_is_not_touched(quantised: Callable[[], nn.Module]) -> None:
    base = quantised()
    expected = base(_inputs())
    model = get_peft_model(base, SeTARConfig(rank_ratios=RATIOS))
    layer = model.base_model.model[0]
    assert layer.quantization_backend is not None
    matrix = layer.base_matrix()
    assert matrix.shape == (128, 64)
    torch.testing.assert_close(matrix, _base()[0].weight, rtol=0, atol=0.05)
    b0, a0 = layer.residual("default")
    exact = decompose(matrix).residual(0.3)
    torch.testing.assert_close(b0 @ a0, exact.b0 @ exact.a0)
    assert not torch.allclose(model(_inputs()), expected)
    with model.disable_adapter():
        assert torch.equal(model(_inputs()), expected)


def test_takes_the_factored_path(quantised: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a quantised weight was formed")

    monkeypatch.setattr(kept_weight, "effective_weight", fail)
    model = get_peft_model(quantised(), SeTARConfig(rank_ratios=RATIOS))
    assert torch.isfinite(model(_inputs(1000))).all()


def test_trains_the_factors(quantised: Callable[[], nn.Module]) -> None:
    base = quantised()
    expected = base(_inputs())
    model = get_peft_model(base, SeTARConfig(rank_ratios=RATIOS, finetune=True))
    torch.testing.assert_close(model(_inputs()), expected, rtol=0, atol=1e-5)
    model(_inputs()).pow(2).sum().backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"setar_A", "setar_B"}
    assert all(value.grad.abs().sum() > 0 for value in trained.values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saves_and_loads_without_a_decomposition(
    quantised: Callable[[], nn.Module], low_cpu_mem_usage: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(quantised(), SeTARConfig(rank_ratios=RATIOS, finetune=True, init_weights=False)).eval()
    # The backends have other kernels for training.
    with torch.no_grad():
        expected = model(_inputs())
    model.save_pretrained(tmp_path)
    monkeypatch.delattr(layer_module, "decompose")
    loaded = PeftModel.from_pretrained(quantised(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, strict_base=True)
    with torch.no_grad():
        assert torch.equal(loaded(_inputs()), expected)


def test_merges_and_unmerges_to_the_bit(quantised: Callable[[], nn.Module]) -> None:
    base = quantised()
    plain = base(_inputs())
    model = get_peft_model(base, SeTARConfig(rank_ratios=RATIOS))
    adapted = model(_inputs())
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        merged = model(_inputs())
        # Merging quantises again, which costs what quantising the base did.
        assert (merged - adapted).abs().max() < (plain - adapted).abs().max()
        twin = copy.deepcopy(model)
        model.unmerge_adapter()
        assert torch.equal(model(_inputs()), adapted)
        with model.disable_adapter():
            assert torch.equal(model(_inputs()), plain)
        twin.unmerge_adapter()
        assert torch.equal(twin(_inputs()), adapted)
    unloaded = model.merge_and_unload()
    assert not [name for name in unloaded.state_dict() if "setar" in name]
    torch.testing.assert_close(unloaded(_inputs()), merged)


class TestBackendsThatCannotMerge:
    """GPTQ, AWQ and others run forward only: stood in for by a plain layer with such a backend."""

    @pytest.fixture(autouse=True)
    def forward_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def resolve(base_layer: nn.Module, **kwargs: Any) -> ForwardOnlyQuantizationBackend | None:
            return ForwardOnlyQuantizationBackend("gptq") if isinstance(base_layer, nn.Linear) else None

        self.resolve = resolve

    def test_a_new_adapter_is_refused_with_a_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layer_module, "resolve_quantization_backend", self.resolve)
        base = _base()
        with pytest.raises(ValueError, match="weight of 0 cannot be decomposed") as error:
            get_peft_model(base, SeTARConfig(rank_ratios=RATIOS))
        assert "gptq" in str(error.value)
        assert type(base[0]) is nn.Linear

    def test_a_saved_adapter_works_and_is_not_merged(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = get_peft_model(_base(), SeTARConfig(rank_ratios=RATIOS))
        expected = model(_inputs())
        model.save_pretrained(tmp_path)
        monkeypatch.setattr(layer_module, "resolve_quantization_backend", self.resolve)
        loaded = PeftModel.from_pretrained(_base(), tmp_path)
        torch.testing.assert_close(loaded(_inputs()), expected)
        for merge in (loaded.merge_adapter, loaded.merge_and_unload):
            with pytest.raises(ValueError, match="quantised with gptq cannot be merged into"):
                merge()
        torch.testing.assert_close(loaded(_inputs()), expected)

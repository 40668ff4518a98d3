"""With a kept weight or by the factors: the same layer, two ways to compute it, and how it is recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers.pytorch_utils import Conv1D

from setar_peft import SeTARConfig
from setar_peft.decomposition import SplitSettings, decompose, exact_float32
from setar_peft.tuner.forward import Factors, adapter_output, effective_weight, removes_nothing
from setar_peft.tuner.linear import SeTARLinear
from tests.tuner.models import MLP, inputs


def _layer(base: nn.Module, *, finetune: bool, ratio: float = 0.4, init_weights: bool = False) -> SeTARLinear:
    torch.manual_seed(1)
    layer = SeTARLinear(base, "default")
    settings = SplitSettings(ratio, "minor", 0, "fc")
    residual = layer.split_base_weight(settings)
    layer.update_layer("default", settings, residual, finetune=finetune, init_weights=init_weights)
    return layer


def _bases() -> list[Callable[[], nn.Module]]:
    def conv1d() -> Conv1D:
        layer = Conv1D(14, 10)
        nn.init.normal_(layer.weight)
        return layer

    return [lambda: nn.Linear(10, 14), lambda: nn.Linear(14, 10, bias=False), conv1d]


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize("make_base", _bases())
def test_both_ways_give_the_same_output_and_gradients(make_base: Callable[[], nn.Module], finetune: bool) -> None:
    torch.manual_seed(0)
    layer = _layer(make_base().double().requires_grad_(False), finetune=finetune)
    x = torch.randn(3, 15, layer.in_features, dtype=torch.float64, requires_grad=True)
    results = []
    for keeps in (False, True):
        layer.keeps_weight = keeps
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.pow(2).sum().backward()
        assert (layer._kept_weight._weight is not None) is keeps
        trained = [layer.setar_B["default"].grad, layer.setar_A["default"].grad] if finetune else []
        results.append([y.detach(), x.grad, *trained])
    for factored, formed_ in zip(*results, strict=True):
        torch.testing.assert_close(factored, formed_, rtol=1e-10, atol=1e-10)
    expected = F.linear(
        x, layer.merged_weight(["default"]) if not _is_conv(layer) else layer.merged_weight(["default"]).T
    )
    bias = layer.base_layer.bias
    torch.testing.assert_close(results[0][0], expected + (0 if bias is None else bias))


def _is_conv(layer: SeTARLinear) -> bool:
    return isinstance(layer.base_layer, Conv1D)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("make_base", _bases())
def test_gradcheck(make_base: Callable[[], nn.Module], keeps: bool) -> None:
    torch.manual_seed(0)
    layer = _layer(make_base().double().requires_grad_(False), finetune=True)
    layer.keeps_weight = keeps
    x = torch.randn(6, layer.in_features, dtype=torch.float64, requires_grad=True)
    names = ["setar_B.default", "setar_A.default"]
    start = [dict(layer.named_parameters())[name].detach().clone().requires_grad_() for name in names]

    def run(x: Tensor, *trained: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, trained, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *start))


@pytest.mark.parametrize("rank_zero", [False, True])
def test_an_empty_batch(rank_zero: bool) -> None:
    layer = _layer(nn.Linear(10, 14), finetune=True, ratio=0.0 if rank_zero else 0.4)
    assert layer(torch.ones(0, 10)).shape == (0, 14)


@pytest.mark.parametrize("tokens", [1, 1000])
def test_rank_zero_is_the_base_and_has_no_parameter(tokens: int) -> None:
    # Most layers of a searched adapter have ratio 0, and FSDP2 cannot shard empty parameters.
    layer = _layer(nn.Linear(10, 14), finetune=True, ratio=0.0)
    x = torch.randn(tokens, 10)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not [name for name, _ in layer.named_parameters() if "setar" in name]
    assert not layer.is_finetuned("default")


def test_a_training_free_rank_zero_adapter_costs_nothing() -> None:
    nothing = Factors(torch.zeros(4, 0), torch.zeros(0, 3))
    weight = torch.randn(4, 3)
    assert removes_nothing(nothing)
    assert effective_weight(weight, [nothing]) is weight


def test_functions_agree_with_the_equations() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64)
    b0, a0 = decompose(weight).residual(0.5)
    b, a = torch.randn_like(b0), torch.randn_like(a0)
    x = torch.randn(7, 5, dtype=torch.float64)
    for factors, expected in (
        (Factors(b0, a0), weight - b0 @ a0),
        (Factors(b0, a0, b, a), weight - b0 @ a0 + b @ a),
    ):
        torch.testing.assert_close(effective_weight(weight, [factors]), expected)
        torch.testing.assert_close(x @ weight.T + adapter_output(x, factors), x @ expected.T)
    both = effective_weight(weight, [Factors(b0, a0), Factors(b0, a0, b, a)])
    torch.testing.assert_close(both, weight - 2 * b0 @ a0 + b @ a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_formed_weight_is_computed_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 5).to(dtype)
    b0, a0 = decompose(weight).residual(0.5)
    assert effective_weight(weight, [Factors(b0, a0)]).dtype == torch.float32
    assert effective_weight(weight, [Factors(b0.to(dtype), a0.to(dtype))]).dtype == torch.float32


@pytest.mark.parametrize("tokens", [2, 1000])
def test_under_autocast(tokens: int) -> None:
    torch.manual_seed(0)
    layer = _layer(nn.Linear(64, 48), finetune=True)
    x = torch.randn(tokens, 64)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() / exact.norm() < 0.02
    y.float().sum().backward()
    assert layer.setar_B["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("mode", ["autocast", "medium", "tf32"])
def test_weights_are_exact_whatever_products_may_be_rounded_to(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 48)
    decomposition = decompose(weight)
    residual = decomposition.residual(0.5)
    layer = _layer(nn.Linear(48, 64), finetune=True).requires_grad_(False)

    def results() -> list[Tensor]:
        layer._kept_weight.drop()
        layer(torch.ones(50, 48))
        kept = layer._kept_weight._weight
        assert kept is not None
        return [
            effective_weight(weight, [Factors(*residual)]),
            decomposition.kept(0.5),
            layer.get_delta_weight("default"),
            layer.merged_weight(["default"]),
            kept,
        ]

    expected = results()
    if mode == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = results()
    elif mode == "medium":
        torch.set_float32_matmul_precision("medium")
        try:
            got = results()
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")
    else:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            with exact_float32(torch.device("cpu")):
                assert _tf32() is False
            assert _tf32() is True
            got = results()
            assert torch.backends.cuda.matmul.allow_tf32
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    assert all(tensor.dtype == torch.float32 for tensor in got)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def _tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(torch.backends, "fp32_precision") else matmul.allow_tf32


def _adapted(kind: str) -> PeftModel:
    if kind == "LoRA":
        return get_peft_model(MLP(), LoraConfig(target_modules=["fc1", "fc2"], r=3)).eval()
    config = SeTARConfig(rank_ratios={"fc1": 0.3, "fc2": 0.3}, finetune=kind == "SeTAR+FT")
    return get_peft_model(MLP(), config).eval()


class TestRecording:
    """What records a forward pass takes the factors: no weight is formed in it, and no size of a batch is special."""

    @pytest.mark.parametrize("dynamic", [None, True, False])
    def test_torch_compile_makes_as_many_graphs_as_for_lora(self, dynamic: bool | None) -> None:
        graphs = {}
        for kind in ("SeTAR", "SeTAR+FT", "LoRA"):
            torch._dynamo.reset()
            counter, model = CompileCounter(), _adapted(kind)
            compiled = torch.compile(model, backend=counter, dynamic=dynamic)
            for rows in (5, 48, 700):
                torch.testing.assert_close(compiled(inputs(rows)), model(inputs(rows)))
            graphs[kind] = counter.frame_count
        assert len(set(graphs.values())) == 1, graphs

    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("kind", ["SeTAR", "SeTAR+FT"])
    def test_torch_export_with_any_batch(self, kind: str, strict: bool) -> None:
        model = _adapted(kind)
        model(inputs(3))
        module = model.get_base_model()
        exported = torch.export.export(
            module, (inputs(5),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict
        ).module()
        for rows in (1, 48, 700):
            torch.testing.assert_close(exported(inputs(rows)), module(inputs(rows)))

    @pytest.mark.parametrize("kind", ["SeTAR", "SeTAR+FT"])
    @pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and wonders at the shapes of factors
    def test_tracing(self, kind: str) -> None:
        module = _adapted(kind).get_base_model()
        traced = torch.jit.trace(module, inputs(5))
        torch.testing.assert_close(traced(inputs(48)), module(inputs(48)))

    @pytest.mark.parametrize("kind", ["SeTAR", "SeTAR+FT"])
    @pytest.mark.filterwarnings("ignore")  # the exporter's own
    def test_onnx_export_with_any_batch(self, kind: str, tmp_path: Path) -> None:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        module = _adapted(kind).get_base_model()
        program = torch.onnx.export(
            module, (inputs(5),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
        )
        program.save(tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        for rows in (1, 48, 700):
            (output,) = session.run(None, {session.get_inputs()[0].name: inputs(rows).numpy()})
            torch.testing.assert_close(torch.from_numpy(output), module(inputs(rows)), atol=1e-5, rtol=1e-5)

"""One layer: adding, merging, switching and deleting adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.utils.warning import PeftWarning
from torch import nn
from transformers.pytorch_utils import Conv1D

from setar_peft.decomposition import decompose
from setar_peft.tuner.layer import SplitSettings
from setar_peft.tuner.linear import SeTARLinear

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SETTINGS = SplitSettings(0.4, "minor", 0, "block.fc")


def _base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    if kind == "Linear":
        return nn.Linear(20, 14).to(dtype)
    base = Conv1D(14, 20)
    nn.init.normal_(base.weight, std=0.3)
    return base.to(dtype)


def _add(layer: SeTARLinear, name: str, settings: SplitSettings = SETTINGS, **kwargs: bool) -> None:
    kwargs.setdefault("finetune", False)
    layer.update_layer(name, settings, layer.split_base_weight(settings), **kwargs)


def _layer(kind: str = "Linear", dtype: torch.dtype = torch.float32, **kwargs: bool) -> SeTARLinear:
    layer = SeTARLinear(_base(kind, dtype), "default")
    _add(layer, "default", **kwargs)
    return layer


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().view(torch.uint8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
class TestMerging:
    @pytest.mark.parametrize("finetune", [False, True])
    def test_unmerging_restores_the_weight_to_the_bit(self, kind: str, dtype: torch.dtype, finetune: bool) -> None:
        layer = _layer(kind, dtype, finetune=finetune, init_weights=False)
        before, bits = layer.base_layer.weight, _bits(layer.base_layer.weight)
        layer.merge()
        assert layer.merged
        assert not torch.equal(_bits(layer.base_layer.weight), bits)
        layer.unmerge()
        assert not layer.merged
        assert layer.base_layer.weight is before
        assert torch.equal(_bits(layer.base_layer.weight), bits)

    def test_merged_weight_is_rounded_once(self, kind: str, dtype: torch.dtype) -> None:
        layer = _layer(kind, dtype)
        matrix = layer.base_matrix().clone()
        b0, a0 = decompose(matrix).residual(0.4)
        expected = torch.addmm(matrix.to(b0.dtype), b0, a0, alpha=-1).to(dtype)
        layer.merge()
        assert layer.base_layer.weight.dtype == dtype
        assert layer.base_layer.weight.is_contiguous()
        assert torch.equal(layer.base_matrix(), expected)

    def test_merged_output_is_the_adapters(self, kind: str, dtype: torch.dtype) -> None:
        layer = _layer(kind, dtype, finetune=True, init_weights=False)
        x = torch.randn(3, 20).to(dtype)
        adapted = layer(x)
        layer.merge()
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(layer(x), adapted, rtol=tolerance, atol=tolerance)


def test_a_thousand_rounds_in_bfloat16_leave_every_bit() -> None:
    layer = _layer(dtype=torch.bfloat16, finetune=True, init_weights=False)
    bits = _bits(layer.base_layer.weight)
    merged = None
    for _ in range(1000):
        layer.merge()
        merged = _bits(layer.base_layer.weight) if merged is None else merged
        assert torch.equal(_bits(layer.base_layer.weight), merged)
        layer.unmerge()
    assert torch.equal(_bits(layer.base_layer.weight), bits)
    # Subtracting and adding the product again, as an additive tuner may, does lose bits: the guard can fail.
    delta = layer.get_delta_weight("default").detach().to(torch.bfloat16)
    assert not torch.equal(_bits(layer.base_layer.weight.detach() + delta - delta), bits)


def test_merging_further_adapters_starts_from_the_original() -> None:
    layer = _layer()
    other = SplitSettings(0.3, "principal", 0, "block.fc")
    _add(layer, "other", other, finetune=True, init_weights=False)
    both, bits = layer.merged_weight(["default", "other"]), _bits(layer.base_layer.weight)
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        layer.merge(adapter_names=["other"])
    assert torch.equal(layer.base_layer.weight, both)
    layer.unmerge()
    assert torch.equal(_bits(layer.base_layer.weight), bits)


def test_merging_twice_and_unmerging_twice_warn_and_do_nothing() -> None:
    layer = _layer()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    layer.merge()
    merged = layer.base_layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, merged)


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing() -> None:
    layer = _layer(finetune=True)
    bits = _bits(layer.base_layer.weight)
    layer.setar_B["default"].data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity") as error:
        layer.merge(safe_merge=True)
    assert "default" in str(error.value)
    assert "Nothing was merged" in str(error.value)
    assert not layer.merged
    assert torch.equal(_bits(layer.base_layer.weight), bits)
    layer.merge()  # unsafe: as asked
    assert layer.merged


def test_moving_a_merged_layer_moves_the_kept_weight_with_it() -> None:
    layer = _layer()
    weight = layer.base_layer.weight.detach().clone()
    layer.merge()
    layer.to(torch.float64)
    layer.unmerge()
    assert layer.base_layer.weight.dtype == torch.float64
    assert torch.equal(layer.base_layer.weight, weight.double())


def test_a_copy_of_a_merged_layer_unmerges_on_its_own() -> None:
    layer = _layer()
    bits = _bits(layer.base_layer.weight)
    layer.merge()
    twin = copy.deepcopy(layer)
    layer.unmerge()
    assert twin.merged
    twin.unmerge()
    assert torch.equal(_bits(twin.base_layer.weight), bits)
    assert twin.base_layer.weight.data_ptr() != layer.base_layer.weight.data_ptr()


def test_delta_weight_is_what_merging_adds() -> None:
    for kind in ("Linear", "Conv1D"):
        layer = _layer(kind, torch.float64, finetune=True, init_weights=False)
        before = layer.base_layer.weight.detach().clone()
        delta = layer.get_delta_weight("default")
        assert delta.shape == before.shape
        layer.merge()
        torch.testing.assert_close(layer.base_layer.weight.detach(), before + delta.detach())
    assert layer.supports_lora_conversion()


class TestParameters:
    def test_training_free_has_none(self) -> None:
        layer = _layer()
        assert not [name for name, _ in layer.named_parameters() if "setar" in name]
        assert not layer.is_finetuned("default")
        assert sorted(name for name in layer.state_dict() if "setar" in name) == [
            "setar_A0.default",
            "setar_B0.default",
            "setar_ratio.default",
        ]
        assert layer.setar_ratio["default"].shape == ()
        assert torch.equal(layer.setar_ratio["default"], torch.tensor(0.4))

    def test_finetuned_starts_at_the_base(self) -> None:
        layer = _layer(finetune=True)
        assert torch.equal(layer.setar_B["default"], layer.setar_B0["default"])
        assert torch.equal(layer.setar_A["default"], layer.setar_A0["default"])
        assert layer.setar_B["default"].data_ptr() != layer.setar_B0["default"].data_ptr()
        for tokens in (2, 1000):
            x = torch.randn(tokens, 20)
            torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=1e-6)

    def test_init_weights_false_is_not_the_identity(self) -> None:
        layer = _layer(finetune=True, init_weights=False)
        x = torch.randn(2, 20)
        assert (layer(x) - layer.base_layer(x)).abs().max() > 0.01

    def test_inference_mode_freezes(self) -> None:
        layer = _layer(finetune=True, inference_mode=True)
        assert not layer.setar_B["default"].requires_grad


class TestAwaitedFactors:
    def _awaiting(self, **kwargs: bool) -> SeTARLinear:
        layer = SeTARLinear(_base("Linear"), "default")
        layer.update_layer("default", SETTINGS, None, finetune=kwargs.get("finetune", False))
        return layer

    def test_take_no_memory_and_cannot_be_used(self) -> None:
        layer = self._awaiting(finetune=True)
        assert all(getattr(layer, f"setar_{kind}")["default"].is_meta for kind in ("A", "B", "A0", "B0"))
        with pytest.raises(ValueError, match="none was loaded") as error:
            layer(torch.randn(2, 20))
        assert "'default'" in str(error.value)

    def test_are_taken_as_loaded(self) -> None:
        layer, source = self._awaiting(), _layer()
        layer.load_state_dict(source.state_dict())
        assert not layer.awaits_factors("default")
        assert torch.equal(layer.setar_B0["default"], source.setar_B0["default"])


class TestSeveralAdapters:
    def test_add_up(self) -> None:
        layer = _layer(dtype=torch.float64)
        _add(layer, "other", SplitSettings(0.3, "principal", 0, "block.fc"), finetune=True, init_weights=False)
        x = torch.randn(3, 20, dtype=torch.float64)
        base = layer.base_layer(x)
        changes = []
        for name in ("default", "other"):
            layer.set_adapter(name)
            changes.append(layer(x) - base)
        layer.set_adapter(["default", "other"])
        torch.testing.assert_close(layer(x), base + sum(changes))

    def test_two_training_free_ones_together_give_a_warning(self) -> None:
        layer = _layer()
        _add(layer, "other")
        with pytest.warns(PeftWarning, match="subtracted twice") as record:
            layer.set_adapter(["default", "other"])
        assert "default, other" in str(record[0].message)
        layer.set_adapter("other")
        layer.merge()
        layer.unmerge()
        with pytest.warns(PeftWarning, match="subtracted twice"):
            layer.merge(adapter_names=["default", "other"])

    def test_no_warning_where_only_one_truncates(self) -> None:
        layer = _layer()
        _add(layer, "trained", finetune=True)
        _add(layer, "zero", SETTINGS._replace(rank_ratio=0.0))
        layer.set_adapter(["default", "trained", "zero"])

    def test_deleting(self) -> None:
        layer = _layer(finetune=True)
        _add(layer, "other")
        with pytest.warns(UserWarning, match="Setting active adapter to other"):
            layer.delete_adapter("default")
        assert layer.active_adapters == ["other"]
        assert not [name for name in layer.state_dict() if "default" in name]
        layer.merge()
        with pytest.warns(UserWarning, match="Unmerging the layer"):
            layer.delete_adapter("other")
        assert not layer.merged
        x = torch.randn(2, 20)
        assert torch.equal(layer(x), layer.base_layer(x))


class TestMixedBatch:
    def test_each_item_goes_through_its_adapter(self) -> None:
        layer = _layer(dtype=torch.float64)
        _add(layer, "other", SplitSettings(0.3, "principal", 0, "block.fc"))
        x = torch.randn(6, 4, 20, dtype=torch.float64)
        names = ["default", "__base__", "other", "other", "default", "elsewhere"]
        y = layer(x, adapter_names=names)
        for row, name in enumerate(names):
            if name in ("default", "other"):
                layer.set_adapter(name)
                expected = layer(x[row])
            else:
                expected = layer.base_layer(x[row])
            torch.testing.assert_close(y[row], expected)

    def test_refusals(self) -> None:
        layer = _layer()
        with pytest.raises(ValueError, match="got 2 and 3 respectively"):
            layer(torch.randn(3, 20), adapter_names=["default", "default"])
        layer.merge()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            layer(torch.randn(1, 20), adapter_names=["default"])


def test_scaling_is_refused() -> None:
    layer = _layer()
    layer.scale_layer(1)
    with pytest.warns(UserWarning, match="cannot be scaled"):
        layer.scale_layer(0.5)
    layer.unscale_layer()


def test_unsuitable_bases() -> None:
    with pytest.warns(UserWarning, match="Unsupported layer"), pytest.raises(TypeError, match="GroupNorm") as error:
        SeTARLinear(nn.GroupNorm(2, 4), "default")
    assert "torch.nn.Linear" in str(error.value)
    meta = SeTARLinear(nn.Linear(4, 3, device="meta"), "default")
    with pytest.raises(ValueError, match=r"block\.fc is on the meta device"):
        meta.split_base_weight(SETTINGS)
    assert meta.split_base_weight(SETTINGS._replace(rank_ratio=0)).rank == 0
    shard = SeTARLinear(nn.Linear(4, 3), "default")
    shard.base_layer.weight.data = torch.zeros(6)
    with pytest.raises(ValueError, match="a shard of the weight") as error:
        shard.split_base_weight(SETTINGS)
    assert "block.fc" in str(error.value)


def test_repr_names_the_method() -> None:
    assert repr(_layer()).startswith("setar.SeTARLinear(")

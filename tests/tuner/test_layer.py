"""One layer: adding, merging, switching and deleting adapters."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.warning import PeftWarning
from torch import nn
from transformers.pytorch_utils import Conv1D

from setar_peft import SeTARConfig
from setar_peft.decomposition import SplitSettings, decompose
from setar_peft.tuner.linear import SeTARLinear
from tests.tuner.models import MLP, inputs, snapshot

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


class TestTiedWeights:
    """Two layers and an embedding that share one parameter: merging into one is nothing to the others."""

    def _model(self) -> nn.ModuleDict:
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12), "words": nn.Embedding(12, 12)})
        model["b"].weight = model["words"].weight = model["a"].weight
        return model.requires_grad_(False)

    def _output(self, model: nn.ModuleDict) -> torch.Tensor:
        return model["b"](torch.relu(model["a"](model["words"](torch.arange(12)))))

    @pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
    def test_merging_is_exact_both_ways(self, order: tuple[str, str]) -> None:
        model = self._model()
        weight, bits = model["a"].weight, _bits(model["a"].weight)
        peft_model = get_peft_model(model, SeTARConfig(rank_ratios={"a": 0.3, "b": 0.6}))
        adapted = self._output(model)
        for name in ("a", "b"):
            model[name].merge()
        torch.testing.assert_close(self._output(model), adapted)
        assert torch.equal(_bits(model["words"].weight), bits)
        twin = copy.deepcopy(model)
        for each in (model, twin):
            for name in order:
                each[name].unmerge()
            assert each["a"].weight is each["b"].weight is each["words"].weight
            assert torch.equal(_bits(each["a"].weight), bits)
        assert model["a"].weight is weight
        peft_model.merge_and_unload()
        torch.testing.assert_close(self._output(model), adapted)

    def test_moving_while_merged(self) -> None:
        model = self._model()
        weight = model["a"].weight.clone()
        peft_model = get_peft_model(model, SeTARConfig(rank_ratios={"a": 0.3, "b": 0.6}))
        peft_model.merge_adapter()
        peft_model.double()
        peft_model.unmerge_adapter()
        assert model["a"].weight is model["words"].weight
        assert torch.equal(model["a"].weight, weight.double())


class TestBesideOtherTuners:
    @pytest.mark.parametrize("kind", ["LoRA", "LoHa"])
    @pytest.mark.parametrize("setar_first", [False, True])
    @pytest.mark.parametrize("merge_outer_first", [False, True])
    @pytest.mark.parametrize("unmerge_outer_first", [False, True])
    @pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
    def test_merging_in_any_order(
        self, kind: str, setar_first: bool, merge_outer_first: bool, unmerge_outer_first: bool
    ) -> None:
        model, x = MLP().requires_grad_(False), inputs()
        other = (
            LoraConfig(r=3, target_modules=["fc1"], init_lora_weights=False)
            if kind == "LoRA"
            else LoHaConfig(r=3, target_modules=["fc1"], init_weights=False)
        )
        configs = [SeTARConfig(rank_ratios=0.3, target_modules=["fc1"]), other]
        for config in configs if setar_first else reversed(configs):
            inject_adapter_in_model(config, model)
        outer, inner = model.fc1, model.fc1.base_layer
        assert isinstance(inner, SeTARLinear) is setar_first
        adapted, weight = model(x), outer.get_base_layer().weight.clone()
        for layer in (outer, inner) if merge_outer_first else (inner, outer):
            layer.merge()
            torch.testing.assert_close(model(x), adapted)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            for layer in (outer, inner) if unmerge_outer_first else (inner, outer):
                layer.unmerge()
                torch.testing.assert_close(model(x), adapted)
        torch.testing.assert_close(outer.get_base_layer().weight, weight, rtol=0, atol=1e-6)
        setar_merged_last = merge_outer_first is setar_first
        setar_unmerged_first = unmerge_outer_first is not setar_first
        exact = setar_merged_last and setar_unmerged_first
        assert [str(each.message)[:24] for each in record] == ([] if exact else ["A base weight (16, 12) w"])

    @pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
    @pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
    def test_unloading_merges_what_lies_beneath(self) -> None:
        below = get_peft_model(MLP(), LoraConfig(r=3, target_modules=["fc1"], init_lora_weights=False))
        model = get_peft_model(below.get_base_model(), SeTARConfig(rank_ratios={"fc1": 0.3}))
        expected = model(inputs())
        plain = model.merge_and_unload()
        assert type(plain.fc1) is nn.Linear
        torch.testing.assert_close(plain(inputs()), expected)


class TestChangedWhileMerged:
    """A change of the weight while an adapter is merged into it is not undone."""

    @pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
    @pytest.mark.parametrize("how", ["load_state_dict", "assign", "in place", "past the counter"])
    @pytest.mark.parametrize("finetune", [False, True])
    def test_the_adapter_is_taken_off(self, kind: str, how: str, finetune: bool) -> None:
        layer = _layer(kind, finetune=finetune, init_weights=False)
        before = layer.base_layer.weight.detach().clone()
        layer.merge()
        change = torch.randn_like(before)
        changed = layer.base_layer.weight.detach() + change
        if how == "in place":
            with torch.no_grad():
                layer.base_layer.weight.add_(change)
        elif how == "past the counter":
            layer.base_layer.weight.data += change
        else:
            layer.load_state_dict({**layer.state_dict(), "base_layer.weight": changed}, assign=how == "assign")
        with pytest.warns(PeftWarning, match="was changed while default was merged") as record:
            layer.unmerge()
        assert "exact only to rounding" in str(record[0].message)
        torch.testing.assert_close(layer.base_layer.weight.detach(), before + change)
        layer.merge()  # nothing is remembered of it
        layer.unmerge()
        torch.testing.assert_close(layer.base_layer.weight.detach(), before + change)

    def test_merging_another_adapter_keeps_the_change(self) -> None:
        layer = _layer()
        _add(layer, "other", SplitSettings(0.3, "principal", 0, "block.fc"), finetune=True, init_weights=False)
        before = layer.base_layer.weight.detach().clone()
        layer.merge(adapter_names=["default"])
        layer.base_layer.weight.data += 1
        with pytest.warns(UserWarning, match="additionally merging other"):
            layer.merge(adapter_names=["other"])
        with pytest.warns(PeftWarning, match="default, other"):
            layer.unmerge()
        torch.testing.assert_close(layer.base_layer.weight.detach(), before + 1)

    def test_the_same_values_are_no_change(self) -> None:
        layer = _layer()
        bits = _bits(layer.base_layer.weight)
        layer.merge()
        layer.load_state_dict(layer.state_dict())
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().clone(), requires_grad=False)
        layer.unmerge()
        assert torch.equal(_bits(layer.base_layer.weight), bits)


class TestAllOrNone:
    def _broken(self) -> PeftModel:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios={"fc1": 0.3, "fc2": 0.3, "head": 0.5}))
        model.base_model.model.head.setar_B0["default"][0, 0] = torch.nan
        return model

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_a_layer_that_fails_takes_the_others_back(self, merge: str) -> None:
        model = self._broken()
        before = snapshot(model)
        with pytest.raises(ValueError, match="NaN or infinity"):
            getattr(model, merge)(safe_merge=True)
        after = snapshot(model)
        assert after["parameters"] == before["parameters"]
        assert after["modules"] == before["modules"]
        names = [name for name in before["state"] if "head.setar" not in name]
        assert all(torch.equal(before["state"][name], after["state"][name]) for name in names)

    def test_what_was_merged_before_stays(self) -> None:
        model = self._broken()
        model.add_adapter("other", SeTARConfig(rank_ratios={"fc1": 0.5}, finetune=True, init_weights=False))
        model.merge_adapter(["other"])
        merged = model.base_model.model.fc1.weight.detach().clone()
        with (
            pytest.warns(UserWarning, match="additionally merging default"),
            pytest.raises(ValueError, match="NaN or infinity"),
        ):
            model.merge_adapter(["default"], safe_merge=True)
        assert model.base_model.model.fc1.merged_adapters == ["other"]
        assert torch.equal(model.base_model.model.fc1.weight, merged)
        assert not model.base_model.model.fc2.merged


def test_merging_in_inference_mode_leaves_what_can_be_trained() -> None:
    layer = _layer(finetune=True)
    layer.base_layer.requires_grad_(False)
    x = torch.randn(3, 20, requires_grad=True)
    with torch.inference_mode():
        layer.merge()
    layer(x).sum().backward()
    with torch.inference_mode():
        layer.unmerge()
    layer(x).sum().backward()
    assert layer.setar_B["default"].grad is not None


def test_merging_nothing_takes_no_memory() -> None:
    layer = SeTARLinear(_base("Linear"), "default")
    _add(layer, "default", SETTINGS._replace(rank_ratio=0.0))
    weight = layer.base_layer.weight
    layer.merge()
    assert layer.merged
    assert layer.base_layer.weight is weight
    layer.unmerge()
    assert not layer.merged


def test_a_weight_on_the_meta_device_is_not_merged_into() -> None:
    layer = _layer()
    layer.base_layer.to("meta")
    with pytest.raises(ValueError, match="on the meta device") as error:
        layer.merge()
    assert "merge_adapter() and unmerge_adapter() of the model" in str(error.value)


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

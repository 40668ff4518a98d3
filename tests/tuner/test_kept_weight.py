"""W - B0 A0 is formed once, never stale, and only goes round a base layer that is plain."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.warning import PeftWarning
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from setar_peft import SeTARConfig, SeTARLayer
from setar_peft.decomposition import SplitSettings
from setar_peft.tuner import kept_weight
from setar_peft.tuner.base_weight import fingerprint, sample_fingerprint
from setar_peft.tuner.kept_weight import check_is_cheaper, may_be_gone_round
from setar_peft.tuner.linear import SeTARLinear
from tests.tuner.models import MLP, inputs


def _layer(base: nn.Module | None = None, *, ratio: float = 0.4, finetune: bool = False) -> SeTARLinear:
    torch.manual_seed(0)
    layer = SeTARLinear((base or nn.Linear(20, 14)).requires_grad_(False), "default")
    _add(layer, "default", ratio=ratio, finetune=finetune)
    return layer


def _add(layer: SeTARLinear, name: str, *, ratio: float = 0.3, finetune: bool = False) -> None:
    settings = SplitSettings(ratio, "minor", 0, "fc")
    layer.update_layer(name, settings, layer.split_base_weight(settings), finetune=finetune, init_weights=False)


def _kept(layer: SeTARLinear) -> Tensor | None:
    return layer._kept_weight._weight


def _agrees_with_the_factors(layer: SeTARLinear) -> bool:
    """Whether the layer computes what it does where nothing is kept."""
    x = inputs(40, 20, dtype=layer._base.weight.dtype)
    output = layer(x)
    layer.keeps_weight = False
    expected = layer(x)
    del layer.keeps_weight
    return torch.allclose(output.float(), expected.float(), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "rank", "shape", "cheaper"),
    [(7, 77, (3072, 768), False), (8, 77, (3072, 768), True), (1, 77, (3072, 768), False), (0, 1, (4, 4), False),
     (23, 0, (3072, 768), False), (24, 0, (3072, 768), True)],
)  # fmt: skip
def test_the_rule_follows_from_shapes(tokens: int, rank: int, shape: tuple[int, int], cheaper: bool) -> None:
    assert check_is_cheaper(tokens, rank, shape) is cheaper


def test_a_few_tokens_are_multiplied_by_the_factors() -> None:
    layer = _layer()
    layer(inputs(0, 20))
    assert _kept(layer) is None
    layer(inputs(40, 20))
    assert _kept(layer) is not None


class TestForming:
    def test_once_and_in_the_dtype_of_the_base(self, monkeypatch: pytest.MonkeyPatch) -> None:
        formed = []
        original = kept_weight.effective_weight
        monkeypatch.setattr(kept_weight, "effective_weight", lambda *args: formed.append(1) or original(*args))
        for base in (nn.Linear(20, 14), nn.Linear(20, 14).bfloat16(), nn.Linear(20, 14).double()):
            layer = _layer(base)
            formed.clear()
            for count in (40, 50, 1000):
                layer(torch.ones(count, 20, dtype=base.weight.dtype))
            assert formed == [1]
            kept = _kept(layer)
            assert kept is not None
            assert kept.dtype == base.weight.dtype
            assert torch.equal(kept, layer.merged_weight(["default"]))  # rounded once, as merging does

    def test_ratio_zero_keeps_nothing(self) -> None:
        layer = _layer(ratio=0.0)
        layer(inputs(3, 20))
        assert _kept(layer) is None

    def test_training_moves_the_trained_factors_alone(self) -> None:
        layer = _layer(finetune=True)
        x = inputs(40, 20)
        layer(x)
        kept = _kept(layer)
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).pow(2).mean().backward()
            optimizer.step()
            assert _kept(layer) is kept
            assert _agrees_with_the_factors(layer)

    def test_formed_in_inference_mode_it_can_be_trained_with(self) -> None:
        layer = _layer(finetune=True)
        with torch.inference_mode():
            layer(inputs(40, 20))
        layer(inputs(40, 20).requires_grad_()).sum().backward()
        assert layer.setar_B["default"].grad is not None

    def test_can_be_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SeTARLayer, "keeps_weight", False)
        layer = _layer()
        layer(inputs(40, 20))
        assert _kept(layer) is None

    def test_no_memory_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, x = _layer(), inputs(40, 20)
        expected = layer(x)
        layer._kept_weight.drop()

        def full(*args: object) -> None:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(kept_weight, "effective_weight", full)
        with pytest.warns(PeftWarning, match="no memory to keep") as record:
            torch.testing.assert_close(layer(x), expected)
        assert "keeps_weight" in str(record[0].message)
        layer(x)  # said once


def _swap(layer: SeTARLinear) -> None:
    layer._base.weight = nn.Parameter(torch.randn(14, 20), requires_grad=False)


def _assign(layer: SeTARLinear) -> None:
    layer._base.weight.data = torch.randn(14, 20)


def _write_past_the_counter(layer: SeTARLinear) -> None:
    layer.base_layer.weight.data[3, 4] += 0.5


def _permute_past_the_counter(layer: SeTARLinear) -> None:
    layer._base.weight.data.copy_(layer._base.weight.data.flip(1).clone())


def _negate_past_the_counter(layer: SeTARLinear) -> None:
    layer._base.weight.data.neg_()


def _write(layer: SeTARLinear) -> None:
    with torch.no_grad():
        layer._base.weight.mul_(1.5)


def _load(layer: SeTARLinear) -> None:
    state = layer.state_dict()
    layer(inputs(40, 20))
    layer.load_state_dict({**state, "base_layer.weight": torch.randn(14, 20)})


def _load_by_assignment(layer: SeTARLinear) -> None:
    state = layer.state_dict()
    layer(inputs(40, 20))
    layer.load_state_dict({**state, "base_layer.weight": torch.randn(14, 20)}, assign=True)
    layer.requires_grad_(False)


def _factor(layer: SeTARLinear) -> None:
    layer.setar_B0["default"].mul_(2)


def _factor_past_the_counter(layer: SeTARLinear) -> None:
    layer.setar_A0["default"].data.mul_(2)


def _another_factor(layer: SeTARLinear) -> None:
    layer.setar_B0["default"] = torch.randn_like(layer.setar_B0["default"])


def _another_adapter(layer: SeTARLinear) -> None:
    _add(layer, "other")
    layer.set_adapter("other")


def _both_adapters(layer: SeTARLinear) -> None:
    _add(layer, "other", finetune=True)
    layer.set_adapter(["default", "other"])


def _delete(layer: SeTARLinear) -> None:
    _add(layer, "other")
    with pytest.warns(UserWarning, match="Setting active adapter"):
        layer.delete_adapter("default")


def _merge_round(layer: SeTARLinear) -> None:
    layer.merge()
    layer.unmerge()


def _double(layer: SeTARLinear) -> None:
    layer.double()


def _half(layer: SeTARLinear) -> None:
    layer.half()
    layer.float()


CHANGES = [
    _swap, _assign, _write_past_the_counter, _permute_past_the_counter, _negate_past_the_counter, _write, _load,
    _load_by_assignment, _factor, _factor_past_the_counter, _another_factor, _another_adapter, _both_adapters, _delete,
    _merge_round, _double, _half,
]  # fmt: skip


class TestNeverStale:
    @pytest.mark.parametrize("change", CHANGES)
    def test_after(self, change: Callable[[SeTARLinear], None]) -> None:
        layer = _layer()
        layer(inputs(40, 20))
        assert _kept(layer) is not None
        change(layer)
        assert _agrees_with_the_factors(layer)

    def test_disabling_and_enabling(self) -> None:
        layer, x = _layer(), inputs(40, 20)
        adapted, base = layer(x), layer._base(x)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), base)
        layer.enable_adapters(True)
        assert torch.equal(layer(x), adapted)

    def test_memory_that_is_given_to_another_tensor(self) -> None:
        # The old weight's memory is held, so that a new one at the same address cannot pass for it.
        layer = _layer()
        for _ in range(20):
            layer(inputs(40, 20))
            layer._base.weight.data = layer._base.weight.data * 1.1
        assert _agrees_with_the_factors(layer)

    def test_tied_weights(self) -> None:
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
        model[1].weight = model[0].weight
        peft_model = get_peft_model(model, SeTARConfig(rank_ratios={"0": 0.3, "1": 0.5}))
        peft_model(inputs(40))
        with torch.no_grad():
            model[0].base_layer.weight.mul_(2)
        assert all(_agrees(layer, inputs(40)) for layer in model)

    def test_another_tuner_above_merges_into_the_weight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # As on a GPU, where values are not compared at every use: PEFT's `weight.data += delta` leaves no trace.
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios={"fc1": 0.3})).base_model.model
        with pytest.warns(UserWarning, match="second time|peft_config"):
            above = get_peft_model(model, LoraConfig(target_modules=["fc1"], init_lora_weights=False))
        inner = above.base_model.model.fc1.base_layer
        assert isinstance(inner, SeTARLinear)
        x = inputs(40)
        expected = above(x)
        monkeypatch.setattr(kept_weight, "sample_fingerprint", lambda tensor: torch.zeros(1))
        above(x)
        assert not inner._kept_weight._in_doubt
        above.base_model.model.fc1.merge()
        torch.testing.assert_close(above(x), expected)
        above.base_model.model.fc1.unmerge()
        torch.testing.assert_close(above(x), expected)


def _agrees(layer: Any, x: Tensor) -> bool:
    output = layer(x)
    layer.keeps_weight = False
    expected = layer(x)
    del layer.keeps_weight
    return torch.allclose(output, expected, atol=1e-5)


class TestIsNotCarriedAlong:
    def test_copies_and_pickles(self) -> None:
        layer = _layer()
        empty = len(pickle.dumps(layer))
        layer(inputs(40, 20))
        assert len(pickle.dumps(layer)) == empty
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert _kept(twin) is None
            assert torch.equal(twin(inputs(40, 20)), layer(inputs(40, 20)))
        assert _kept(layer) is not None

    def test_saving_gives_the_memory_back(self) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios={"fc1": 0.3}))
        names = sorted(get_peft_model_state_dict(model))
        model(inputs(40))
        assert _kept(model.base_model.model.fc1) is not None
        assert sorted(get_peft_model_state_dict(model)) == names
        assert _kept(model.base_model.model.fc1) is None

    def test_merging_gives_the_memory_back(self) -> None:
        layer = _layer()
        layer(inputs(40, 20))
        layer.merge()
        assert _kept(layer) is None


def _hooked(name: str) -> Callable[[nn.Linear], list[int]]:
    def install(base: nn.Linear) -> list[int]:
        calls: list[int] = []
        getattr(base, f"register_{name}_hook")(lambda *_: calls.append(1))
        return calls

    return install


def _patched(base: nn.Linear) -> list[int]:
    calls: list[int] = []
    original = base.forward

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        return original(x)

    base.forward = forward  # type: ignore[method-assign]
    return calls


class _Counting(nn.Linear):
    calls: list[int]

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return super().forward(x)


def _subclassed(base: nn.Linear) -> list[int]:
    base.__class__ = _Counting
    base.calls = []
    return base.calls


class TestBaseLayersThatAreNotPlain:
    """Each as LoRA has it: the base layer is called, with all that hangs on it."""

    @pytest.mark.parametrize(
        "install",
        [_hooked("forward"), _hooked("forward_pre"), _hooked("full_backward"), _hooked("full_backward_pre"),
         _patched, _subclassed],
    )  # fmt: skip
    @pytest.mark.parametrize("finetune", [False, True])
    def test_are_called(self, install: Callable[[nn.Linear], list[int]], finetune: bool) -> None:
        counts, outputs = [], []
        lora = LoraConfig(target_modules=["fc1"], r=2, init_lora_weights=False)
        for config in (SeTARConfig(rank_ratios={"fc1": 0.3}, finetune=finetune), lora):
            model = get_peft_model(MLP(), config)
            x = inputs(40).requires_grad_()
            plain = model(x)
            calls = install(model.base_model.model.fc1.get_base_layer())
            y = model(x)
            y.sum().backward()
            counts.append(len(calls))
            outputs.append((y, plain))
        assert counts == [1, 1]
        torch.testing.assert_close(*outputs[0])

    def test_hooks_on_all_modules(self) -> None:
        layer, seen = _layer(), []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        try:
            layer(inputs(40, 20))
        finally:
            handle.remove()
        assert nn.Linear in seen
        assert _kept(layer) is None

    def test_offloaded_by_accelerate(self) -> None:
        x, results = inputs(40), []
        lora = LoraConfig(target_modules=["fc1"], r=2, init_lora_weights=False)
        for config in (SeTARConfig(rank_ratios={"fc1": 0.3}), lora):
            model = get_peft_model(MLP(), config)
            with torch.no_grad():
                expected = model(x)
                cpu_offload(model.base_model.model)
                assert model.base_model.model.fc1.get_base_layer().weight.is_meta
                output = model(x)
                torch.testing.assert_close(output, expected)
                model.merge_adapter()
                torch.testing.assert_close(model(x), expected)
                model.unmerge_adapter()
                output = model(x)
            results.append((output, expected))
        for output, expected in results:
            torch.testing.assert_close(output, expected)

    def test_on_the_meta_device(self) -> None:
        lora = LoraConfig(target_modules=["fc1"], r=2)
        for config in (SeTARConfig(rank_ratios={"fc1": 0.3}), lora):
            model = get_peft_model(MLP(), config)
            model(inputs(40))
            assert model.to("meta")(inputs(40).to("meta")).is_meta

    @pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
    def test_parametrised(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        layer = _layer(wrap(nn.Linear(20, 14)).eval())
        layer(inputs(40, 20))
        assert _kept(layer) is None
        with pytest.raises(ValueError, match="computed from other tensors") as error:
            layer.merge()
        assert "remove_parametrizations" in str(error.value)

    def test_pruned(self) -> None:
        layer = _layer(prune.l1_unstructured(nn.Linear(20, 14), "weight", amount=0.5))
        layer(inputs(40, 20))
        assert _kept(layer) is None

    def test_trained_beside_the_adapter(self) -> None:
        layer = _layer(finetune=True)
        layer._base.weight.requires_grad_(True)
        layer(inputs(40, 20)).sum().backward()
        assert _kept(layer) is None
        assert layer._base.weight.grad is not None

    def test_of_a_subclass_of_tensors(self) -> None:
        class Mine(Tensor):
            pass

        base = nn.Linear(20, 14)
        assert may_be_gone_round(base.requires_grad_(False))
        base.weight = nn.Parameter(torch.randn(14, 20).as_subclass(Mine), requires_grad=False)
        assert not may_be_gone_round(base)

    def test_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            base = nn.Linear(20, 14)
            layer = _layer(base)
        with torch.no_grad():
            assert torch.isfinite(layer(inputs(40, 20))).all()
        assert _kept(layer) is None

    def test_under_transforms_of_functions(self) -> None:
        layer, x = _layer(), inputs(40, 20)
        expected = layer(x)
        layer._kept_weight.drop()
        torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
        assert torch.func.grad(lambda x: layer(x).sum())(x).shape == x.shape
        assert torch.equal(layer(x), expected)

    def test_under_a_dispatch_mode_of_stand_ins(self) -> None:
        from torch._subclasses import FakeTensorMode

        layer, x = _layer(), inputs(40, 20)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            layer(mode.from_tensor(x))
        assert _agrees_with_the_factors(layer)


def test_a_sample_shows_whatever_changes_rows_or_columns() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1024, 768)
    before = sample_fingerprint(weight)
    assert torch.equal(before, sample_fingerprint(weight.clone()))
    for change in (
        *(lambda w, row=row: w[row].add_(1) for row in (0, 5, 1023)),
        *(lambda w, column=column: w[:, column].mul_(1.1) for column in (0, 17, 400, 767)),
        lambda w: w.neg_(),
        lambda w: w.copy_(w.flip(0).clone()),
        lambda w: w.copy_(w.flip(1).clone()),
        lambda w: w.add_(torch.randn(1024, 1) @ torch.randn(1, 768) * 1e-4),
    ):
        changed = weight.clone()
        change(changed)
        assert not torch.equal(sample_fingerprint(changed), before)


@pytest.mark.parametrize("shape", [(14, 20), (3, 5), (4, 1), (300, 400), (301, 401)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_values_are_told_apart(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 50).to(dtype)
    assert torch.equal(fingerprint(weight), fingerprint(weight.T.contiguous().T))
    one, pair = weight.clone(), weight.clone()
    one[1, 0] += 1
    pair[[0, -1]] = weight[[-1, 0]]
    others = [one, pair, -weight, weight.flip(0), weight * 2]
    if shape[1] > 3:
        columns = weight.clone()
        columns[:, [0, 1, 2, 3]] = weight[:, [2, 3, 0, 1]]
        signs = weight.clone()
        signs[1, [1, 3]] *= -1
        others += [columns, signs]
    assert not any(torch.equal(fingerprint(weight), fingerprint(other)) for other in others)

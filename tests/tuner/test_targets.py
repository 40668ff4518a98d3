"""Which modules are adapted, and with which ratio."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import CLIPModel

from setar_peft import SeTARConfig
from setar_peft.tuner.targets import resolve_rank_ratios, targeted_modules
from tests.tuner.models import MLP, Blocks, assert_unchanged, snapshot

NAMES = ["vision.layers.0.fc1", "vision.layers.1.fc1", "text.layers.0.fc1", "proj"]


class TestRatios:
    def test_one_number_for_all(self) -> None:
        assert resolve_rank_ratios(0.2, NAMES) == dict.fromkeys(NAMES, 0.2)

    def test_full_names_win_over_suffixes_and_the_rest_gets_zero(self) -> None:
        ratios = {"layers.0.fc1": 0.3, "vision.layers.0.fc1": 0.1}
        assert resolve_rank_ratios(ratios, NAMES) == {
            "vision.layers.0.fc1": 0.1,
            "vision.layers.1.fc1": 0.0,
            "text.layers.0.fc1": 0.3,
            "proj": 0.0,
        }

    def test_order_is_the_models(self) -> None:
        assert list(resolve_rank_ratios({"proj": 0.1, "fc1": 0.2}, NAMES)) == NAMES

    @pytest.mark.parametrize("key", ["fc2", "c1", "layers.0", "vision.layers.0.fc1.weight", "roj"])
    def test_a_key_that_matches_nothing(self, key: str) -> None:
        with pytest.raises(ValueError, match="match no targeted module") as error:
            resolve_rank_ratios({"proj": 0.2, key: 0.2}, NAMES)
        assert repr(key) in str(error.value)
        assert repr(NAMES[0]) in str(error.value)

    def test_time_grows_with_the_number_of_modules(self) -> None:
        # 20,000 keys on 20,000 modules are 4e8 comparisons of pairs, which take minutes.
        names = [f"model.layers.{index}.fc1" for index in range(20_000)]
        assert resolve_rank_ratios({name.removeprefix("model."): 0.1 for name in names}, names) == dict.fromkeys(
            names, 0.1
        )

    def test_two_keys_that_match_one_module(self) -> None:
        with pytest.raises(ValueError, match="several keys") as error:
            resolve_rank_ratios({"fc1": 0.2, "layers.0.fc1": 0.3}, NAMES)
        assert "'fc1', 'layers.0.fc1'" in str(error.value)
        assert "'vision.layers.0.fc1'" in str(error.value)

    def test_the_list_in_an_error_is_bounded(self) -> None:
        with pytest.raises(ValueError, match=r"\(500 modules\)") as error:
            resolve_rank_ratios({"x": 0.1}, [f"layers.{index}" for index in range(500)])
        assert len(str(error.value)) < 300


class TestTargets:
    def test_names_regular_expressions_blocks_and_exclusions(self) -> None:
        model = Blocks()
        for settings, expected in (
            ({"target_modules": ["fc"]}, ["0.fc", "1.fc", "2.fc", "3.fc"]),
            ({"target_modules": ["layers.2.fc", "out"]}, ["0.out", "1.out", "2.fc", "2.out", "3.out"]),
            ({"target_modules": r"body\.layers\.[13]\.(fc|out)"}, ["1.fc", "1.out", "3.fc", "3.out"]),
            ({"target_modules": ["fc"], "layers_to_transform": [1, 3]}, ["1.fc", "3.fc"]),
            ({"target_modules": ["fc"], "layers_to_transform": 2, "layers_pattern": "layers"}, ["2.fc"]),
            ({"target_modules": ["fc", "out"], "exclude_modules": r".*\.[012]\..*"}, ["3.fc", "3.out"]),
            ({"target_modules": "all-linear"}, [f"{index}.{name}" for index in range(4) for name in ("fc", "out")]),
        ):
            expected = [f"body.layers.{name}" for name in expected]
            config = SeTARConfig(rank_ratios=0.3, **settings)
            assert list(targeted_modules(config, model)) == expected
            peft_model = get_peft_model(Blocks(), SeTARConfig(rank_ratios=0.3, **settings))
            assert list(peft_model.peft_config["default"].rank_ratios) == expected
            assert peft_model.targeted_module_names == expected

    def test_all_linear_leaves_out_the_output_layer_of_a_transformer(self, load_clip: Callable[..., CLIPModel]) -> None:
        model = get_peft_model(load_clip(), SeTARConfig(rank_ratios=0.3, target_modules="all-linear"))
        names = model.targeted_module_names
        assert "vision_model.encoder.layers.0.self_attn.q_proj" in names
        assert len(names) == 7 * 6 + 2

    def test_ratio_keys_name_the_targets(self) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios={"fc1": 0.2, "head": 0.4}))
        assert model.targeted_module_names == ["fc1", "head"]

    def test_default_is_w_up_of_the_model_type(self, load_clip: Callable[..., CLIPModel]) -> None:
        model = get_peft_model(load_clip(), SeTARConfig(rank_ratios=0.2))
        assert len(model.targeted_module_names) == 7
        assert all(name.endswith("mlp.fc1") for name in model.targeted_module_names)


class TestRefusals:
    def test_a_model_with_no_known_w_up(self) -> None:
        model = MLP()
        before = snapshot(model)
        with pytest.raises(ValueError, match="W_up") as error:
            get_peft_model(model, SeTARConfig(rank_ratios=0.2))
        assert "target_modules" in str(error.value)
        assert_unchanged(model, before)

    @pytest.mark.parametrize(
        ("layer", "kind"),
        [
            (nn.Conv2d(3, 4, 1), "Conv2d"),
            (nn.Embedding(4, 3), "Embedding"),
            (nn.LayerNorm(4), "LayerNorm"),
            (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        ],
    )
    def test_a_module_that_is_no_linear_layer(self, layer: nn.Module, kind: str) -> None:
        model = nn.Sequential(nn.Linear(4, 4), layer)
        before = snapshot(model)
        with pytest.raises(TypeError, match=kind) as error:
            get_peft_model(model, SeTARConfig(rank_ratios=0.2, target_modules=["0", "1"]))
        assert "1 is a" in str(error.value)
        assert_unchanged(model, before)

    def test_a_linear_layer_whose_module_is_never_called(self) -> None:
        # torch's attention reads the weight of its out_proj and does not call it: an adapter would have no effect.
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        with pytest.raises(TypeError, match=r"attention\.out_proj"):
            get_peft_model(model, SeTARConfig(rank_ratios=0.2, target_modules=["out_proj"]))

    def test_a_linear_layer_whose_weight_torchs_fast_path_reads(self) -> None:
        def encoder(batch_first: bool) -> nn.Module:
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=batch_first)
            return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        config, x = SeTARConfig(rank_ratios=0.4, target_modules=["linear1", "linear2"]), torch.randn(3, 5, 16)
        with pytest.raises(TypeError, match=r"layers\.0\.linear1 lies in a TransformerEncoderLayer") as error:
            get_peft_model(encoder(True), config)
        assert "set_fastpath_enabled(False)" in str(error.value)

        def not_to_be_called(_: nn.Module) -> float:
            raise AssertionError("searched, though the adapter could not be made")

        searching = SeTARConfig(objective=not_to_be_called, target_modules=["linear1"])
        with pytest.raises(TypeError, match="would have no effect"):
            get_peft_model(encoder(True), searching)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            models = [get_peft_model(encoder(batch_first), copy.copy(config)).eval() for batch_first in (True, False)]
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        for model, enabled in zip(models, (False, True), strict=True):
            argument = x.transpose(0, 1) if enabled else x
            torch.backends.mha.set_fastpath_enabled(enabled)
            try:
                with torch.no_grad():
                    adapted = model(argument)
                    model.merge_adapter()
                    merged = model(argument)
                    model.unmerge_adapter()
                    with model.disable_adapter():
                        base = model(argument)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
            torch.testing.assert_close(adapted, merged)
            assert (adapted - base).abs().max() > 1e-3

    def test_targets_that_match_nothing(self) -> None:
        model = MLP()
        before = snapshot(model)
        with pytest.raises(ValueError, match="not found in the base model"):
            get_peft_model(model, SeTARConfig(rank_ratios=0.2, target_modules=["fc9"]))
        assert_unchanged(model, before)


def test_what_lies_inside_an_adapter_is_no_target() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    peft_model = get_peft_model(model, SeTARConfig(rank_ratios=0.3, target_modules=["0"]))
    peft_model.add_adapter("other", SeTARConfig(rank_ratios=0.5, target_modules=["0", "1"]))
    assert peft_model.peft_config["other"].rank_ratios == {"0": 0.5, "1": 0.5}
    assert torch.isfinite(peft_model(torch.ones(1, 6))).all()


def test_a_module_in_several_places_is_refused_and_a_shared_block_is_not() -> None:
    """PEFT replaces a module under its first name; a block that is shared is adapted in every place."""
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared.append(shared[0])
    config = SeTARConfig(target_modules=["0", "2"], rank_ratios=0.5)
    with pytest.raises(TypeError, match=r"0, 2 are one module, .* Give each name a module of its own"):
        get_peft_model(shared, config)
    assert type(shared[0]) is nn.Linear
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(3, 4)
    adapted = get_peft_model(nn.Sequential(block, block), SeTARConfig(target_modules=["0.0"], rank_ratios=0.5))
    expected = adapted(x)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), expected)

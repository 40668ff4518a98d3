"""The tuner on whole models: creating, saving, loading, merging, and leaving a model alone when something is wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.warning import PeftWarning
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel

from setar_peft import SeTARConfig, SeTARLayer, search_rank_ratios
from setar_peft.decomposition import decompose, residual_rank
from setar_peft.tuner import layer as layer_module
from tests.tuner.models import MLP, Blocks, ConvMLP, assert_unchanged, inputs, snapshot

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RATIOS = {"fc1": 0.25, "fc2": 0.5}


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the layers that are decomposed."""
    names: list[str] = []

    def counted(*args: Any, name: str = "weight", **kwargs: Any) -> Any:
        names.append(name)
        return decompose(*args, name=name, **kwargs)

    monkeypatch.setattr(layer_module, "decompose", counted)
    return names


@pytest.fixture
def clip_batch(golden_clip: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: golden_clip[name] for name in ("input_ids", "attention_mask")} | {
        "pixel_values": golden_clip["pixel_values"][:4]
    }


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits_per_image


def _layers(model: nn.Module) -> Iterator[SeTARLayer]:
    return (module for module in model.modules() if isinstance(module, SeTARLayer))


class TestTrainingFree:
    @pytest.mark.parametrize("make", [MLP, ConvMLP])
    def test_subtracts_the_residual_and_has_no_parameter(self, make: type[nn.Module]) -> None:
        base = make()
        fc1 = base.fc1.weight.detach().clone()
        x = inputs()
        model = get_peft_model(base, SeTARConfig(rank_ratios=RATIOS))
        assert not [name for name, _ in model.named_parameters() if "setar" in name]
        assert not [name for name, value in model.named_parameters() if value.requires_grad]
        assert model.active_adapters == ["default"]
        matrix = fc1 if make is MLP else fc1.T
        expected = x @ decompose(matrix).kept(0.25).T + base.fc1.bias
        torch.testing.assert_close(base.fc1(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(base.fc1.base_layer.weight, fc1)

    def test_disabled_is_exactly_the_base(
        self, load_clip: Callable[..., CLIPModel], clip_batch: dict[str, Tensor]
    ) -> None:
        base = load_clip()
        expected = _logits(base, clip_batch)
        model = get_peft_model(base, SeTARConfig(rank_ratios=0.3)).eval()
        assert not torch.allclose(_logits(model, clip_batch), expected)
        with model.disable_adapter():
            assert torch.equal(_logits(model, clip_batch), expected)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(_logits(model, clip_batch), expected)

    @pytest.mark.parametrize(("stored", "prune"), [("small", "minor"), ("large", "principal")])
    def test_gives_the_published_codes_logits(
        self,
        load_clip: Callable[..., CLIPModel],
        golden_clip: dict[str, Tensor],
        stored: str,
        prune: str,
    ) -> None:
        ratios = {
            "vision_model.encoder.layers.3.mlp.fc1": 0.3,
            "vision_model.encoder.layers.0.mlp.fc2": 0.15,
            "vision_model.encoder.layers.2.self_attn.q_proj": 0.4,
            "visual_projection": 0.1,
            "text_model.encoder.layers.2.mlp.fc1": 0.25,
            "text_model.encoder.layers.0.self_attn.out_proj": 0.35,
        }
        model = get_peft_model(load_clip(), SeTARConfig(rank_ratios=ratios, prune=prune)).eval()
        batch = {name: golden_clip[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        scale = model.logit_scale.exp() / 100
        expected = golden_clip[f"pruned_{stored}.logits_global"]
        torch.testing.assert_close(
            _logits(model, batch) / scale, expected, rtol=0, atol=2e-5 * float(expected.abs().max())
        )


class TestFinetuned:
    def test_starts_at_the_base_and_trains_the_factors_alone(
        self, load_clip: Callable[..., CLIPModel], clip_batch: dict[str, Tensor]
    ) -> None:
        base = load_clip()
        expected = _logits(base, clip_batch)
        model = get_peft_model(base, SeTARConfig(rank_ratios=0.3, finetune=True)).eval()
        torch.testing.assert_close(_logits(model, clip_batch), expected, rtol=0, atol=1e-4)
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        assert len(trained) == 2 * 7
        assert {name.split(".")[-2] for name in trained} == {"setar_A", "setar_B"}
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**clip_batch).logits_per_image.pow(2).sum().backward()
        optimizer.step()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == trained

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_starts_at_the_base_in_every_dtype(self, dtype: torch.dtype) -> None:
        base = MLP().to(dtype)
        x = inputs(dtype=dtype)
        expected = base(x)
        model = get_peft_model(base, SeTARConfig(rank_ratios=RATIOS, finetune=True))
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        assert model(x).dtype == dtype
        torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)

    def test_an_optimiser_made_before_the_first_forward_trains_what_is_there(self, tmp_path: Path) -> None:
        get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, finetune=True)).save_pretrained(tmp_path)
        # A saved config without its file makes a new adapter.
        config = SeTARConfig.from_pretrained(tmp_path)
        config.inference_mode = False
        model = get_peft_model(MLP(), config)
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
        model(inputs()).pow(2).sum().backward()
        start = model.base_model.model.fc1.setar_B["default"].detach().clone()
        optimizer.step()
        assert not torch.equal(model.base_model.model.fc1.setar_B["default"], start)


class TestSavingAndLoading:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("finetune", [False, True])
    @pytest.mark.parametrize("prune", ["minor", "random"])
    def test_same_logits_to_the_bit_without_a_decomposition(
        self,
        load_clip: Callable[..., CLIPModel],
        clip_batch: dict[str, Tensor],
        tmp_path: Path,
        splits: list[str],
        finetune: bool,
        low_cpu_mem_usage: bool,
        prune: str,
    ) -> None:
        config = SeTARConfig(
            rank_ratios={"text_model.encoder.layers.0.mlp.fc1": 0.0, "fc1": 0.3},
            target_modules=["mlp.fc1"],
            finetune=finetune,
            init_weights=not finetune,
            prune=prune,
        )
        model = get_peft_model(load_clip(), config).eval()
        expected = _logits(model, clip_batch)
        model.save_pretrained(tmp_path)
        assert len(splits) == 6
        splits.clear()
        loaded = PeftModel.from_pretrained(load_clip(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(_logits(loaded, clip_batch), expected)
        loaded.merge_adapter()
        loaded.unmerge_adapter()
        assert torch.equal(_logits(loaded, clip_batch), expected)
        assert splits == []
        tensors = [*loaded.parameters(), *loaded.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        assert all(not parameter.requires_grad for parameter in loaded.parameters())

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_in_every_dtype(self, dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
        config = SeTARConfig(rank_ratios=RATIOS, finetune=True, init_weights=False)
        model = get_peft_model(MLP().to(dtype), config)
        x = inputs(dtype=dtype)
        expected = model(x)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(MLP().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded(x), expected)
        # Factors stay in float32 beside a base in half precision: rounded ones would be another adapter.
        factor = loaded.base_model.model.fc1.setar_B0["default"]
        assert factor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    def test_what_the_file_holds(self, tmp_path: Path) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, modules_to_save=["head"]))
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            ratio = float(file.get_tensor("base_model.model.fc1.setar_ratio"))
        prefix = "base_model.model"
        assert shapes == {
            f"{prefix}.fc1.setar_A0": (3, 12),
            f"{prefix}.fc1.setar_B0": (16, 3),
            f"{prefix}.fc1.setar_ratio": (),
            f"{prefix}.fc2.setar_A0": (6, 16),
            f"{prefix}.fc2.setar_B0": (12, 6),
            f"{prefix}.fc2.setar_ratio": (),
            f"{prefix}.head.weight": (3, 12),
            f"{prefix}.head.bias": (3,),
        }
        assert ratio == 0.25
        assert residual_rank((16, 12), 0.25) == 3

    def test_only_the_adapter_that_is_asked_for(self, tmp_path: Path) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS))
        model.add_adapter("other", SeTARConfig(rank_ratios={"head": 0.4}))
        model.save_pretrained(tmp_path, selected_adapters=["other"])
        with safe_open(tmp_path / "other" / "adapter_model.safetensors", "pt") as file:
            assert {key.split(".")[2] for key in file.keys()} == {"head"}  # noqa: SIM118
        assert not (tmp_path / "adapter_config.json").exists()

    def test_a_new_adapter_from_a_loaded_config_is_whole_at_once(self, tmp_path: Path) -> None:
        get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS)).save_pretrained(tmp_path / "first")
        model = get_peft_model(MLP(), SeTARConfig.from_pretrained(tmp_path / "first"))
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        model.save_pretrained(tmp_path / "second")
        files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("first", "second")]
        assert files[0] == files[1]

    def test_no_placeholder_takes_memory_and_none_is_left(self, tmp_path: Path) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, finetune=True))
        model.save_pretrained(tmp_path)
        empty = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, finetune=True), low_cpu_mem_usage=True)
        factors = [value for name, value in empty.state_dict().items() if "setar" in name and "ratio" not in name]
        assert len(factors) == 8
        assert all(value.is_meta for value in factors)
        with pytest.raises(ValueError, match="none was loaded"):
            empty(inputs())
        with pytest.raises(ValueError, match="none was loaded"):
            empty.save_pretrained(tmp_path / "empty")
        empty.load_adapter(tmp_path, "default", low_cpu_mem_usage=True)
        assert torch.equal(empty(inputs()), model(inputs()))

    def test_a_ratio_in_float64_from_before_is_loaded_as_float32(self, tmp_path: Path) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios={"fc1": 0.3}))
        model.save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        name = "base_model.model.fc1.setar_ratio"
        save_file({**load_file(file), name: torch.tensor(0.3, dtype=torch.float64)}, file)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "weights_sha256": None}))
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(MLP(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
            assert loaded.peft_config["default"].rank_ratios == {"fc1": 0.3}


class TestOneConfigForTwoModels:
    def test_each_gets_its_own_map(self) -> None:
        config = SeTARConfig(rank_ratios=0.25, target_modules=["fc", "out"])
        before = dataclasses.asdict(config)
        small, large = (get_peft_model(Blocks(count), config) for count in (2, 4))
        assert dataclasses.asdict(config) == before
        assert len(small.peft_config["default"].rank_ratios) == 4
        assert len(large.peft_config["default"].rank_ratios) == 8
        assert set(large.peft_config["default"].rank_ratios.values()) == {0.25}
        assert small.peft_config["default"] is not config

    def test_each_is_searched(self) -> None:
        calls = []

        def objective(model: nn.Module) -> float:
            calls.append(model)
            return -float(len(calls))

        config = SeTARConfig(target_modules=["fc1"], candidate_ratios=[0.5], objective=objective)
        for seed in (0, 1):
            calls.clear()
            model = get_peft_model(MLP(seed), config)
            assert len(calls) == 2
            assert model.peft_config["default"].rank_ratios == {"fc1": 0.5}
            assert model.peft_config["default"].card.objective
        assert config.objective is objective
        assert config.card.objective == {}


class TestMerging:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("finetune", [False, True])
    def test_merge_and_unmerge_to_the_bit(self, dtype: torch.dtype, finetune: bool) -> None:
        model = get_peft_model(
            MLP().to(dtype), SeTARConfig(rank_ratios=RATIOS, finetune=finetune, init_weights=not finetune)
        )
        before = {name: value.clone() for name, value in model.state_dict().items()}
        x = inputs(dtype=dtype)
        adapted = model(x)
        model.merge_adapter()
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 1e-2}[dtype]
        torch.testing.assert_close(model(x), adapted, rtol=tolerance, atol=tolerance)
        model.unmerge_adapter()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(x), adapted)

    def test_merge_and_unload_is_a_stock_model(
        self, load_clip: Callable[..., CLIPModel], clip_batch: dict[str, Tensor], tmp_path: Path
    ) -> None:
        model = get_peft_model(load_clip(), SeTARConfig(rank_ratios=0.3)).eval()
        expected = _logits(model, clip_batch)
        merged = model.merge_and_unload(safe_merge=True)
        assert type(merged) is CLIPModel
        assert not [name for name in merged.state_dict() if "setar" in name or "base_layer" in name]
        assert not hasattr(merged, "peft_config")
        torch.testing.assert_close(_logits(merged, clip_batch), expected, rtol=0, atol=1e-4)
        merged.save_pretrained(tmp_path)
        again = CLIPModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
        assert torch.equal(_logits(again, clip_batch), _logits(merged, clip_batch))

    def test_unload_gives_the_base_back(self) -> None:
        base = MLP()
        types = {name: type(module) for name, module in base.named_modules()}
        state = {name: value.clone() for name, value in base.state_dict().items()}
        unloaded = get_peft_model(base, SeTARConfig(rank_ratios=RATIOS)).unload()
        assert unloaded is base
        assert {name: type(module) for name, module in base.named_modules()} == types
        assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())

    @pytest.mark.parametrize("unload", [False, True])
    def test_a_safe_merge_publishes_every_layer_or_none(self, unload: bool) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, finetune=True))
        model.base_model.model.fc2.setar_A["default"].data[0, 0] = torch.nan
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="NaN or infinity"):
            (model.merge_and_unload if unload else model.merge_adapter)(safe_merge=True)
        assert not any(layer.merged for layer in _layers(model))
        after = model.state_dict()
        assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in after.items())

    def test_no_adapter_is_made_while_one_is_merged(self, tmp_path: Path) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS))
        model.save_pretrained(tmp_path)
        model.merge_adapter()
        before = snapshot(model)
        for make in (
            lambda: model.add_adapter("other", SeTARConfig(rank_ratios=RATIOS)),
            lambda: model.load_adapter(tmp_path, "other"),
        ):
            with pytest.raises(ValueError, match="merged into fc1") as error:
                make()
            assert "unmerge_adapter" in str(error.value)
            assert_unchanged(model, before)
            assert list(model.peft_config) == ["default"]
        model.unmerge_adapter()
        model.add_adapter("other", SeTARConfig(rank_ratios=RATIOS))


class TestNothingChangesOnAnError:
    @pytest.mark.parametrize(
        ("settings", "fragments"),
        [
            ({"rank_ratios": {"fc1": 0.2, "fc9": 0.2}, "target_modules": ["fc1"]}, ["'fc9'", "match no targeted"]),
            ({}, ["neither rank_ratios nor an objective"]),
            ({"rank_ratios": 0.2}, ["W_up"]),
            ({"rank_ratios": {"fc1": 0.2}, "modules_to_save": ["fc1"]}, ["No modules were targeted"]),
        ],
    )
    def test_in_a_config(self, settings: dict[str, Any], fragments: list[str]) -> None:
        model = MLP()
        before = snapshot(model)
        config = SeTARConfig(**settings)
        values = config.to_dict()
        with pytest.raises(ValueError, match=r"\w") as error:
            get_peft_model(model, config)
        assert all(fragment in str(error.value) for fragment in fragments), error.value
        assert_unchanged(model, before)
        assert config.to_dict() == values

    def test_in_the_last_weight(self) -> None:
        model = MLP()
        model.fc2.weight.data[3, 3] = torch.nan
        before = snapshot(model)
        with pytest.raises(ValueError, match="fc2 holds NaN or infinity"):
            get_peft_model(model, SeTARConfig(rank_ratios=RATIOS))
        after = snapshot(model)
        assert before.pop("state").keys() == after.pop("state").keys()
        assert before == after

    def test_when_replacing_modules_fails_half_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = MLP()
        before = snapshot(model)
        original = layer_module.SeTARLayer.update_layer

        def failing(self: SeTARLayer, adapter_name: str, settings: Any, *args: Any, **kwargs: Any) -> None:
            if settings.name == "fc2":
                raise KeyboardInterrupt
            original(self, adapter_name, settings, *args, **kwargs)

        monkeypatch.setattr(layer_module.SeTARLayer, "update_layer", failing)
        with pytest.raises(KeyboardInterrupt):
            get_peft_model(model, SeTARConfig(rank_ratios=RATIOS))
        assert_unchanged(model, before)

    def test_in_a_second_adapter(self) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, finetune=True))
        before = snapshot(model)
        with pytest.raises(ValueError, match="'fc9'"):
            model.add_adapter("other", SeTARConfig(rank_ratios={"fc9": 0.1}, target_modules=["fc1"]))
        with pytest.raises(ValueError, match="without a dot"):
            model.add_adapter("v1.0", SeTARConfig(rank_ratios=RATIOS))
        assert_unchanged(model, before)
        assert list(model.peft_config) == ["default"]


class TestWrongBase:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS)).save_pretrained(tmp_path)
        return tmp_path

    def test_the_right_one_is_not_complained_of(self, folder: Path) -> None:
        for dtype in FLOATS:
            PeftModel.from_pretrained(MLP().to(dtype), folder, strict_base=True)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_warning_with_layer_and_value(self, folder: Path, low_cpu_mem_usage: bool) -> None:
        with pytest.warns(PeftWarning, match="another base model") as record:
            PeftModel.from_pretrained(MLP(seed=1), folder, low_cpu_mem_usage=low_cpu_mem_usage)
        message = str(record[0].message)
        for name in RATIOS:
            value = float(message.split(f"{name}: ")[1].split(";")[0].split(". ")[0])
            assert abs(value) < 0.5

    def test_strict_raises_and_leaves_the_base_alone(self, folder: Path) -> None:
        base = MLP(seed=1)
        before = snapshot(base)
        with pytest.raises(ValueError, match="another base model") as error:
            PeftModel.from_pretrained(base, folder, strict_base=True)
        assert "fc1: " in str(error.value)
        assert_unchanged(base, before)
        config = SeTARConfig.from_pretrained(folder)
        config.strict_base = True
        with pytest.raises(ValueError, match="another base model"):
            PeftModel.from_pretrained(base, folder, config=config)
        assert_unchanged(base, before)
        # And it can still take an adapter.
        get_peft_model(base, SeTARConfig(rank_ratios=RATIOS))

    def test_strict_in_load_adapter(self, folder: Path) -> None:
        model = get_peft_model(MLP(seed=1), SeTARConfig(rank_ratios={"head": 0.4}))
        before = snapshot(model)
        with pytest.raises(ValueError, match="another base model"):
            model.load_adapter(folder, "other", strict_base=True)
        assert_unchanged(model, before)
        assert list(model.peft_config) == ["default"]
        with pytest.raises(ValueError, match="strict_base is 1"):
            model.load_adapter(folder, "other", strict_base=1)
        with pytest.warns(PeftWarning, match="another base model"):
            model.load_adapter(folder, "other")

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("kind", ["dead units", "rank-deficient", "merged before"])
    def test_the_right_base_where_rounding_noise_was_removed(
        self, kind: str, low_cpu_mem_usage: bool, tmp_path: Path
    ) -> None:
        base = MLP()
        with torch.no_grad():
            if kind == "dead units":
                base.fc1.weight[:10] = 0
            elif kind == "rank-deficient":
                base.fc1.weight.copy_(torch.randn(16, 4) @ torch.randn(4, 12))
            else:
                base = get_peft_model(base, SeTARConfig(rank_ratios=RATIOS)).merge_and_unload()
        get_peft_model(copy.deepcopy(base), SeTARConfig(rank_ratios=RATIOS)).save_pretrained(tmp_path)
        # Rounding differs from one machine's decomposition to another's, so that noise need not agree with the base.
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        b0 = tensors["base_model.model.fc1.setar_B0"]
        assert b0.norm() < 1e-3
        tensors["base_model.model.fc1.setar_B0"] = -b0
        save_file(tensors, file)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "weights_sha256": None}))
        PeftModel.from_pretrained(base, tmp_path, strict_base=True, low_cpu_mem_usage=low_cpu_mem_usage)

    @pytest.mark.parametrize(
        ("kind", "fragment"), [("meta", "not here"), ("nan", "not finite"), ("huge", "not finite")]
    )
    def test_a_base_that_cannot_be_compared_is_not_taken_for_the_right_one(
        self, kind: str, fragment: str, folder: Path
    ) -> None:
        base = MLP()
        if kind == "meta":
            base.to("meta")
        elif kind == "nan":
            base.fc1.weight.data[3, 3] = torch.nan
        else:
            file = folder / "adapter_model.safetensors"
            save_file({name: tensor.fill_(3e38) if name.endswith(("A0", "B0")) else tensor
                       for name, tensor in load_file(file).items()}, file)  # fmt: skip
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**config, "weights_sha256": None}))
        before = {name: type(module) for name, module in base.named_modules()}
        with pytest.raises(ValueError, match="Nothing says whether") as error:
            PeftModel.from_pretrained(base, folder, strict_base=True)
        assert fragment in str(error.value)
        assert "fc1" in str(error.value)
        assert {name: type(module) for name, module in base.named_modules()} == before
        with pytest.warns(PeftWarning, match="Nothing says whether"):
            PeftModel.from_pretrained(base, folder)

    def test_another_shape(self, folder: Path) -> None:
        base = MLP()
        base.fc2 = nn.Linear(16, 13)
        base.head = nn.Linear(13, 3)
        before = snapshot(base)
        with pytest.raises(ValueError, match="fc2") as error:
            PeftModel.from_pretrained(base, folder)
        assert "(12, 16)" in str(error.value)
        assert "(13, 16)" in str(error.value)
        assert_unchanged(base, before)

    def test_a_layer_that_is_not_there(self, folder: Path) -> None:
        base = nn.ModuleDict({"fc1": nn.Linear(12, 16)})
        before = snapshot(base)
        with pytest.raises(ValueError, match="fc2"):
            PeftModel.from_pretrained(base, folder)
        assert_unchanged(base, before)

    def test_a_trained_adapter_survives_a_file_that_does_not_fit_it(self, folder: Path) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios={"fc1": 0.5}))
        before = snapshot(model)
        with pytest.raises(ValueError, match="do not match"):
            model.load_adapter(folder, "default")
        assert_unchanged(model, before)


class TestSearchInOneCall:
    def test_a_callable_objective_on_any_model(self, splits: list[str]) -> None:
        base = MLP()
        x, state = inputs(32), torch.get_rng_state()
        seen = []

        def objective(model: nn.Module) -> float:
            assert not model.training
            seen.append(model)
            with torch.no_grad():
                return float(model(x).pow(2).mean())

        expected = objective(base.eval())
        base.train()
        config = SeTARConfig(target_modules=["fc1", "fc2"], candidate_ratios=[0.1, 0.3, 0.5], objective=objective)
        model = get_peft_model(base, config)
        assert torch.equal(torch.get_rng_state(), state)
        assert base.training
        assert len(seen) == 1 + 1 + 2 * 3
        assert config.objective is objective
        assert config.rank_ratios is None
        assert model.peft_config["default"].objective is None
        ratios = model.peft_config["default"].rank_ratios
        assert list(ratios) == ["fc1", "fc2"]
        assert set(ratios.values()) <= {0.0, 0.1, 0.3, 0.5}
        assert max(ratios.values()) > 0
        model.eval()
        assert objective(model) < expected
        # The search's own decompositions serve the adapter.
        assert splits == []

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("make", [MLP, ConvMLP])
    def test_an_adapter_from_a_finished_search_decomposes_nothing(
        self, make: type[nn.Module], dtype: torch.dtype, splits: list[str]
    ) -> None:
        settings = {"target_modules": ["fc1", "fc2"], "candidate_ratios": [0.25, 0.5], "prune": "random"}
        base = make().to(dtype)

        def loss(model: nn.Module) -> float:
            return -float(sum((p.double() - q).abs().sum() for p, q in zip(model.parameters(), before, strict=True)))

        before = [parameter.detach().clone().double() for parameter in base.parameters()]
        result = search_rank_ratios(base, loss, SeTARConfig(**settings), progress=False)
        assert set(result.rank_ratios.values()) == {0.5}
        twin, other = copy.deepcopy(base), copy.deepcopy(base)
        with torch.no_grad():
            other.fc2.weight.view(-1)[0] += 0.5
        anew = get_peft_model(copy.deepcopy(other), copy.copy(result.config)).state_dict()
        assert splits == ["fc1", "fc2"]  # a copy knows nothing

        def adapted(model: nn.Module) -> dict[str, Tensor]:
            config = copy.copy(result.config)
            config.known_splits = result.config.known_splits
            return get_peft_model(model, config).state_dict()

        state, same = adapted(base), adapted(twin)
        assert splits == ["fc1", "fc2"]
        changed = adapted(other)
        assert splits == ["fc1", "fc2", "fc2"]  # the weight that was written to in between
        for name, value in state.items():
            assert torch.equal(value, same[name])
            assert torch.equal(changed[name], anew[name])

    @pytest.mark.parametrize("change", [{"rank_ratios": {"fc1": 0.25}}, {"prune": "principal"}, {"seed": 1}])
    def test_other_settings_than_the_searchs_decompose_anew(self, change: dict[str, Any], splits: list[str]) -> None:
        config = SeTARConfig(target_modules=["fc1"], candidate_ratios=[0.5], prune="random")
        losses = iter([1.0, 0.5])
        result = search_rank_ratios(MLP(), lambda _: next(losses), config, progress=False)
        for name, value in change.items():
            setattr(result.config, name, value)
        get_peft_model(MLP(), result.config)
        assert splits == ["fc1"]

    def test_an_objective_that_fails_leaves_the_model_alone(self) -> None:
        base = MLP()
        before = snapshot(base)
        calls = []

        def objective(model: nn.Module) -> float:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("no more images")
            return 1.0

        config = SeTARConfig(target_modules=["fc1"], candidate_ratios=[0.1, 0.3], objective=objective)
        with pytest.raises(RuntimeError, match="no more images"):
            get_peft_model(base, config)
        assert_unchanged(base, before)
        assert config.objective is objective

"""What PEFT does with an adapter, on small local models."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.warning import PeftWarning
from torch import Tensor, nn
from transformers import CLIPModel

from setar_peft import SeTARConfig, SeTARLayer
from tests.tuner.models import MLP, assert_unchanged, inputs, snapshot

RATIOS = {"fc1": 0.25, "fc2": 0.5}


def _two() -> PeftModel:
    """Training-free "default" on fc1 and fc2, fine-tuned "other" on fc2 and head."""
    model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS))
    config = SeTARConfig(rank_ratios={"fc2": 0.25, "head": 0.4}, finetune=True, init_weights=False)
    model.add_adapter("other", config)
    return model.eval()


class TestSeveralAdapters:
    def test_added_switched_and_deleted(self) -> None:
        model, x = _two(), inputs()
        base = MLP()(x)
        default = model(x)
        model.set_adapter("other")
        other = model(x)
        assert not torch.allclose(default, other)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        model.set_adapter("default")
        assert torch.equal(model(x), default)
        with pytest.warns(UserWarning, match="Setting active adapter to other"):
            model.delete_adapter("default")
        model.set_adapter("other")
        assert torch.equal(model(x), other)
        assert not [name for name in model.state_dict() if "default" in name]

    def test_active_together(self) -> None:
        model, x = _two(), inputs()
        model.base_model.set_adapter(["default", "other"])
        together = model(x)
        weight = MLP().fc2.weight.detach().clone()
        layer = model.base_model.model.fc2
        for name in ("default", "other"):
            weight += layer.get_delta_weight(name).detach()
        model.merge_adapter()
        torch.testing.assert_close(layer.base_layer.weight.detach(), weight)
        torch.testing.assert_close(model(x), together)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), MLP()(x))

    def test_two_training_free_ones_together_give_a_warning(self) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS))
        model.add_adapter("other", SeTARConfig(rank_ratios={"fc1": 0.5}))
        with pytest.warns(PeftWarning, match="default, other are active together"):
            model.base_model.set_adapter(["default", "other"])

    def test_loaded_beside_another(self, tmp_path: Path) -> None:
        source, x = _two(), inputs()
        source.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(MLP(), tmp_path)
        model.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=True)
        for name in ("default", "other"):
            source.set_adapter(name)
            model.set_adapter(name)
            assert torch.equal(model(x), source(x))

    def test_a_name_twice(self) -> None:
        with pytest.raises(ValueError, match="already exists"):
            _two().add_adapter("other", SeTARConfig(rank_ratios=RATIOS))


class TestMixedBatches:
    def test_each_item_through_its_adapter(self) -> None:
        model, x = _two(), inputs(6)
        names = ["default", "other", "__base__", "other", "default", "__base__"]
        mixed = model(x, adapter_names=names)
        expected = {"__base__": MLP()(x)}
        for name in ("default", "other"):
            model.set_adapter(name)
            expected[name] = model(x)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], expected[name][row])
        assert not [module for module in model.modules() if module._forward_pre_hooks]

    def test_with_modules_to_save(self) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, modules_to_save=["head"])).eval()
        model.base_model.model.head.modules_to_save["default"].weight.data.mul_(2)
        x = inputs(2)
        mixed = model(x, adapter_names=["default", "__base__"])
        torch.testing.assert_close(mixed[0], model(x)[0])
        torch.testing.assert_close(mixed[1], MLP()(x)[1])

    def test_refusals_leave_no_hook(self) -> None:
        model, x = _two(), inputs(3)
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): elsewhere"):
            model(x, adapter_names=["default", "elsewhere", "__base__"])
        with pytest.raises(ValueError, match="got 2 and 3"):
            model(x, adapter_names=["default", "other"])
        with pytest.raises(ValueError, match="training mode"):
            model.train()(x, adapter_names=["default"] * 3)
        model.eval().merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            model(x, adapter_names=["default"] * 3)
        assert not [module for module in model.modules() if module._forward_pre_hooks]

    @pytest.mark.parametrize("rows", [2, 6])
    def test_names_are_repeated_for_the_beams_of_a_decoder(self, rows: int) -> None:
        # `generate` with 3 beams: the encoder sees 2 items, the decoder 6.
        model, x = _two(), inputs(rows)
        with model.base_model._enable_peft_forward_hooks(adapter_names=["default", "__base__"], num_beams=3):
            mixed = model.base_model.model(x)
        names = ["default", "__base__"] if rows == 2 else ["default"] * 3 + ["__base__"] * 3
        torch.testing.assert_close(mixed, model(x, adapter_names=names))


class TestStatus:
    def test_of_layers_and_model(self) -> None:
        model = _two()
        status = {item.name: item for item in get_layer_status(model)}
        assert set(status) == {"model.fc1", "model.fc2", "model.head"}
        assert status["model.fc1"].module_type == "setar.SeTARLinear"
        assert status["model.fc1"].available_adapters == ["default"]
        assert status["model.fc2"].available_adapters == ["default", "other"]
        assert status["model.fc2"].active_adapters == ["default"]
        assert status["model.fc2"].merged_adapters == []
        whole = get_model_status(model)
        assert whole.peft_types == {"default": "SETAR", "other": "SETAR"}
        assert whole.available_adapters == ["default", "other"]
        assert whole.enabled is True
        assert whole.num_adapter_layers == 3
        assert whole.trainable_params == 0
        model.merge_adapter()
        assert get_model_status(model).merged_adapters == ["default"]


class TestInjection:
    def test_and_the_state_dict(self) -> None:
        config = SeTARConfig(rank_ratios=RATIOS, finetune=True, init_weights=False)
        model, x = inject_adapter_in_model(config, MLP()), inputs()
        state = get_peft_model_state_dict(model)
        assert set(state) == {f"{name}.setar_{kind}" for name in RATIOS for kind in ("A", "B", "A0", "B0", "ratio")}
        for low_cpu_mem_usage in (False, True):
            twin = inject_adapter_in_model(
                SeTARConfig(rank_ratios=RATIOS, finetune=True), MLP(), low_cpu_mem_usage=low_cpu_mem_usage
            )
            result = set_peft_model_state_dict(twin, state, low_cpu_mem_usage=low_cpu_mem_usage)
            assert not result.unexpected_keys
            assert not [parameter for parameter in twin.parameters() if parameter.is_meta]
            assert torch.equal(twin(x), model(x))

    def test_from_a_state_dict_alone(self) -> None:
        state = get_peft_model_state_dict(inject_adapter_in_model(SeTARConfig(rank_ratios=RATIOS), MLP()))
        model = inject_adapter_in_model(SeTARConfig(), MLP(), state_dict=state)
        assert model.peft_config["default"].rank_ratios == RATIOS
        set_peft_model_state_dict(model, state)
        assert torch.equal(model(inputs()), get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS))(inputs()))


class TestModulesToSave:
    def test_are_trained_saved_and_loaded(self, tmp_path: Path) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, modules_to_save=["head"]))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert [name.split(".")[-3:] for name in trained] == [
            ["modules_to_save", "default", "weight"],
            ["modules_to_save", "default", "bias"],
        ]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(inputs()).pow(2).sum().backward()
        optimizer.step()
        expected = model(inputs())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(MLP(), tmp_path)
        assert torch.equal(loaded(inputs()), expected)
        with loaded.disable_adapter():
            assert torch.equal(loaded(inputs()), MLP()(inputs()))
        assert torch.equal(loaded.merge_and_unload().head.weight, model.base_model.model.head.weight)

    def test_one_of_another_shape_leaves_the_base_alone(self, tmp_path: Path) -> None:
        config = SeTARConfig(rank_ratios=RATIOS, modules_to_save=["head"])
        get_peft_model(MLP(), config).save_pretrained(tmp_path)
        base = MLP()
        base.head = nn.Linear(12, 4)
        before = snapshot(base)
        with pytest.raises(ValueError, match="head"):
            PeftModel.from_pretrained(base, tmp_path)
        assert_unchanged(base, before)


class TestCopies:
    # PEFT says so of each layer that has no merged adapter.
    @pytest.mark.filterwarnings("ignore:Already unmerged")
    @pytest.mark.parametrize("merged", [False, True])
    def test_deepcopy_and_pickle(self, merged: bool) -> None:
        model, x = _two(), inputs()
        expected = model(x)
        if merged:
            model.merge_adapter()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            if merged:
                twin.unmerge_adapter()
            assert torch.equal(twin(x), expected)
            twin.set_adapter("other")
            assert not torch.allclose(twin(x), expected)
            assert twin.peft_config["default"].rank_ratios == RATIOS

    def test_in_a_spawned_process(self) -> None:
        model, x = _two(), inputs()
        expected = model(x).detach()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(_run, (pickle.dumps(model), pickle.dumps(x)))
        assert torch.equal(pickle.loads(result), expected)


def _run(model: bytes, x: bytes) -> bytes:
    torch.set_num_threads(1)
    with torch.no_grad():
        return pickle.dumps(pickle.loads(model)(pickle.loads(x)))


class TestTraining:
    def test_gradient_checkpointing_changes_nothing(
        self, load_clip: Callable[..., CLIPModel], golden_clip: dict[str, Tensor]
    ) -> None:
        batch = {name: golden_clip[name] for name in ("input_ids", "attention_mask")} | {
            "pixel_values": golden_clip["pixel_values"][:3]
        }
        gradients = []
        for checkpointing in (False, True):
            model = get_peft_model(load_clip(), SeTARConfig(rank_ratios=0.3, finetune=True))
            if checkpointing:
                base = model.base_model.model
                # transformers 5.23 renamed the method.
                enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
                enable({"use_reentrant": False})
            model.train()
            model(**batch).logits_per_image.pow(2).mean().backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert len(gradients[0]) == 14
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient)

    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    def test_adapter_dtype(self, autocast_adapter_dtype: bool, tmp_path: Path) -> None:
        expected = torch.float32 if autocast_adapter_dtype else torch.bfloat16
        config = SeTARConfig(rank_ratios=RATIOS, finetune=True)
        x = inputs(dtype=torch.bfloat16)
        model = get_peft_model(MLP().bfloat16(), config, autocast_adapter_dtype=autocast_adapter_dtype)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(
            MLP().bfloat16(), tmp_path, autocast_adapter_dtype=autocast_adapter_dtype, is_trainable=True
        )
        for each in (model, loaded):
            assert {p.dtype for p in each.parameters() if p.requires_grad} == {expected}
            # What is subtracted is never rounded.
            assert each.base_model.model.fc1.setar_B0["default"].dtype == torch.float32
            each(x).float().sum().backward()
        assert torch.equal(loaded(x), model(x))

    def test_under_autocast(self) -> None:
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, finetune=True))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(inputs())
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

    def test_trainable_again_after_loading(self, tmp_path: Path) -> None:
        get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, finetune=True)).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(MLP(), tmp_path, is_trainable=True)
        assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"setar_A", "setar_B"}


@pytest.fixture
def lora_compiles() -> None:
    """Skips where torch.compile cannot follow what PEFT itself does around a forward (torch 2.6)."""
    torch._dynamo.reset()
    try:
        torch.compile(get_peft_model(MLP(), LoraConfig(target_modules=["fc1"])), fullgraph=True, backend="eager")(
            inputs(5)
        )
    except torch._dynamo.exc.Unsupported:
        pytest.skip("torch.compile cannot follow PEFT's own forward in this version of torch, with LoRA either")


@pytest.mark.usefixtures("lora_compiles")
class TestCompile:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("finetune", [False, True])
    @pytest.mark.parametrize("rows", [5, 500])
    def test_no_graph_break_with_one_adapter(self, backend: str, finetune: bool, rows: int, tmp_path: Path) -> None:
        torch._dynamo.reset()
        model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, finetune=finetune, init_weights=not finetune))
        model.save_pretrained(tmp_path)
        x = inputs(rows)
        for each in (model, PeftModel.from_pretrained(MLP(), tmp_path)):
            compiled = torch.compile(each, fullgraph=True, backend=backend)
            torch.testing.assert_close(compiled(x), each(x))


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_there_is_nothing_to_save_once_the_adapter_is_out(how: str, tmp_path: Path) -> None:
    model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS))
    getattr(model, how)()
    with pytest.raises(ValueError, match=r"no adapter left to save: merge_and_unload\(\) or unload\(\) took it out"):
        model.save_pretrained(tmp_path / "adapter")
    assert not list(tmp_path.rglob("*.*"))


def test_dispatch_by_the_generic_config(tmp_path: Path) -> None:
    get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS)).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is SeTARConfig
    assert config.factors_saved


def test_methods_are_not_mixed() -> None:
    # PEFT lists in its own code the methods that can be mixed or hot-swapped, and this is none of them.
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS), mixed=True)


def test_layers_are_found_by_their_class() -> None:
    model = _two()
    assert sum(isinstance(module, SeTARLayer) for module in model.modules()) == 3
    assert model.base_model.supports_lora_conversion()

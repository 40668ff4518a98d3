from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from setar_peft import SeTARConfig, SeTARLayer
from setar_peft.backbones import ClassWeights, ImageFeatures, backbone_of
from setar_peft.data.images import ImageSource
from setar_peft.detection.adapters import adapter_in_use, blocks_below_adapters
from setar_peft.detection.features import image_logits, reading
from setar_peft.detection.scores import SCORES, local_mcm, score
from setar_peft.objectives.class_prompts import ClassPrompts
from tests.demo.conftest import one_thread  # noqa: F401 - every test here uses it

UP = "vision_model.encoder.layers.{}.mlp.fc1"


@pytest.fixture
def model(load_clip: Callable[..., Any]) -> Any:
    return load_clip()


@pytest.fixture
def prompts(clip_objective: Callable[..., Any]) -> ClassPrompts:
    objective = clip_objective()
    return ClassPrompts(objective._prompts._tokenizer, objective.class_names)


@pytest.fixture
def inputs(golden_clip: dict[str, Tensor]) -> ImageSource:
    return ImageSource(None, golden_clip["pixel_values"], batch_size=5)


def config(level: int, ratio: float = 0.5) -> SeTARConfig:
    names = [UP.format(level)]
    return SeTARConfig(target_modules=names, rank_ratios=dict.fromkeys(names, ratio))


def all_outputs(reader: Any, inputs: Any, names: list[str], top_k: int = 1) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for batch, features in reader.batches(inputs):
        assert batch.errors == {}
        for variant, read in features.items():
            scores = {name: (SCORES[name], reader.settings(variant, SCORES[name], {})) for name in names}
            found.setdefault(variant, []).append(reader.outputs(variant, read, scores, top_k))
    return found


def test_scores_and_predictions_are_those_of_whole_logits(model: Any, prompts: Any, inputs: Any) -> None:
    """However the pass is cut: against the logits of all images at once, which the stock model gives, too."""
    pixels = torch.cat([batch for batch, _ in inputs.batches()])
    logits = image_logits(model, prompts, pixels)
    with torch.no_grad():
        stock = model(pixel_values=pixels, **prompts.tokens(backbone_of(model))).logits_per_image
    torch.testing.assert_close(logits.pooled, stock, rtol=1e-5, atol=1e-4)
    with reading(model, prompts) as reader:
        (outputs,) = all_outputs(reader, inputs, ["mcm", "gl_mcm", "energy"], top_k=3).values()
    for name in ("mcm", "gl_mcm", "energy"):
        found = torch.cat([part.scores[name] for part in outputs])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, score(name, logits), rtol=1e-5, atol=1e-5)
    top = torch.cat([part.top for part in outputs])
    assert torch.equal(top, stock.topk(3).indices)
    expected = stock.softmax(-1).gather(-1, top)
    torch.testing.assert_close(torch.cat([part.probabilities for part in outputs]), expected, rtol=1e-4, atol=1e-4)


def test_the_first_of_equal_classes_is_the_prediction(model: Any, inputs: Any) -> None:
    with reading(model, ClassWeights(torch.zeros(6, model.config.projection_dim))) as reader:
        (outputs,) = all_outputs(reader, inputs, [], top_k=6).values()
    assert torch.equal(outputs[0].top, torch.arange(6).expand(5, 6))


def test_variants_are_what_each_adapter_gives_alone(model: Any, prompts: Any, inputs: Any) -> None:
    """One pass over the images for the base and two adapters, with the blocks below both run once."""
    peft_model = get_peft_model(model, config(2))
    peft_model.add_adapter("other", config(3, 0.25))
    alone = {}
    for name, adapter in (("base", None), ("one", "default"), ("two", "other")):
        with adapter_in_use(peft_model, adapter), reading(peft_model, prompts) as reader:
            ((_, alone[name]),) = all_outputs(reader, inputs, ["gl_mcm"]).items()
    calls = _count_calls(model)
    variants = {"base": None, "one": "default", "two": "other"}
    with reading(peft_model, prompts, adapters=variants) as reader:
        assert blocks_below_adapters(reader.backbone) == 2
        together = all_outputs(reader, inputs, ["gl_mcm"])
    batches = 5
    assert calls[:2] == [batches, batches]
    assert calls[2] == 3 * batches
    for name in variants:
        for found, expected in zip(together[name], alone[name], strict=True):
            assert torch.equal(found.scores["gl_mcm"], expected.scores["gl_mcm"])
            assert torch.equal(found.features, expected.features)
    assert not torch.equal(together["base"][0].features, together["one"][0].features)
    assert not torch.equal(together["two"][0].features, together["one"][0].features)
    assert peft_model.active_adapters == ["default"]


def test_what_removes_nothing_is_shared_and_what_nobody_knows_is_not(model: Any) -> None:
    names = [UP.format(level) for level in range(3)]
    ratios = {UP.format(0): 0.0, UP.format(1): 0.0, UP.format(2): 0.5}
    peft_model = get_peft_model(model, SeTARConfig(target_modules=names, rank_ratios=ratios))
    assert blocks_below_adapters(backbone_of(peft_model.get_base_model())) == 2
    peft_model = get_peft_model(peft_model.unload(), LoraConfig(target_modules=[UP.format(1)]))
    assert blocks_below_adapters(backbone_of(peft_model.get_base_model())) == 1
    peft_model = get_peft_model(peft_model.unload(), LoraConfig(target_modules=["position_embedding"]))
    assert blocks_below_adapters(backbone_of(peft_model.get_base_model())) == 0


def test_features_after_each_block_go_with_the_variant(model: Any, prompts: Any, inputs: Any) -> None:
    peft_model = get_peft_model(model, config(2))
    with reading(peft_model, prompts, layers=True, adapters={"base": None, "setar": "default"}) as reader:
        _, features = next(reader.batches(inputs))
    base, setar = features["base"].layers, features["setar"].layers
    assert base is not None
    assert setar is not None
    assert base.shape[1] == len(model.vision_model.encoder.layers)
    assert torch.equal(base[:, :2], setar[:, :2])
    assert not torch.equal(base[:, 2], setar[:, 2])
    assert torch.equal(setar[:, -1], features["setar"].pooled)


def test_the_model_is_left_as_it_was(model: Any, prompts: Any, inputs: Any) -> None:
    peft_model = get_peft_model(model, config(2))
    peft_model.add_adapter("other", SeTARConfig(**{**vars_of(config(3)), "finetune": True}))
    peft_model.set_adapter("other")
    peft_model.train()
    before = {name: parameter.requires_grad for name, parameter in peft_model.named_parameters()}
    with reading(peft_model, prompts, adapters={"base": None, "one": "default"}) as reader:
        all_outputs(reader, inputs, ["mcm"])
    assert peft_model.active_adapters == ["other"]
    assert {name: parameter.requires_grad for name, parameter in peft_model.named_parameters()} == before
    assert all(module.training for module in peft_model.modules())
    assert not any(module.disable_adapters for module in peft_model.modules() if isinstance(module, SeTARLayer))


def vars_of(given: SeTARConfig) -> dict[str, Any]:
    return {"target_modules": given.target_modules, "rank_ratios": given.rank_ratios}


def test_adapters_that_are_not_there_are_refused(model: Any, prompts: Any) -> None:
    with (
        pytest.raises(ValueError, match="'x', and the model is a CLIPModel without any"),
        reading(model, prompts, adapters={"a": "x"}),
    ):
        pass
    peft_model = get_peft_model(model, config(2))
    with (
        pytest.raises(ValueError, match="no adapter 'x'; it has 'default'"),
        reading(peft_model, prompts, adapters={"a": "x"}),
    ):
        pass
    peft_model.merge_adapter()
    with (
        pytest.raises(ValueError, match=r"merged into 1 layers.*unmerge_adapter"),
        reading(peft_model, prompts, adapters={"a": None}),
    ):
        pass


def test_local_logits_are_only_made_where_a_score_reads_them_and_never_for_a_whole_batch(
    model: Any, prompts: Any, golden_clip: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = ImageSource(None, golden_clip["pixel_values"], batch_size=24)
    shapes: list[tuple[int, ...]] = []
    logits = ClassWeights.logits

    def recorded(classes: Any, features: Tensor) -> Tensor:
        shapes.append(tuple(features.shape))
        return logits(classes, features)

    monkeypatch.setattr(ClassWeights, "logits", recorded)
    with reading(model, prompts) as reader:
        all_outputs(reader, inputs, ["mcm", "energy"])
        assert shapes
        assert all(len(shape) == 2 for shape in shapes)
        monkeypatch.setattr("setar_peft.detection.features.LOCAL_LOGITS_CHUNK", {"cpu": 2 * 16 * 6})
        all_outputs(reader, inputs, ["gl_mcm"])
    assert max(shape[0] for shape in shapes if len(shape) == 3) == 2


def test_patches_that_are_padding_count_for_nothing() -> None:
    local = torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    padded = ClassWeights(torch.eye(5)).logits_of(ImageFeatures(torch.randn(3, 5), local, mask))
    assert padded.local is not None
    for image, logits, real in zip(local, padded.local, mask, strict=True):
        assert torch.equal(local_mcm(logits[None], 1.0), local_mcm(image[real][None], 1.0))


def test_logits_of_a_batch_leave_the_model_in_the_mode_it_was_in(model: Any, prompts: Any, inputs: Any) -> None:
    model.train()
    model.text_model.eval()
    before = [module.training for module in model.modules()]
    pixels, _ = next(inputs.batches())
    assert not image_logits(model, prompts, pixels).pooled.requires_grad
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="The images have shape"):
        image_logits(model, prompts, pixels[..., :16])
    assert [module.training for module in model.modules()] == before


def _count_calls(model: Any) -> list[int]:
    calls = [0] * len(model.vision_model.encoder.layers)
    for level, block in enumerate(model.vision_model.encoder.layers):

        def count(*_: Any, level: int = level) -> None:
            calls[level] += 1

        block.register_forward_pre_hook(count)
    return calls

"""Swin-V2 against the published code on a tiny model, and against a plain computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import Swinv2Config, Swinv2ForImageClassification

from setar_peft import LoCoOpObjective, SeTARConfig, search_rank_ratios
from setar_peft.backbones import backbone_of, default_target_modules
from setar_peft.decomposition import decompose
from setar_peft.objectives.loss import locoop_sums, locoop_values, ood_patch_mask
from tests.backbones import checks
from tests.conftest import GOLDEN, read_json

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def pixel_values(size: int = 64) -> Tensor:
    """The golden images as the published code prepares them (timm's transform), (24, 3, size, size)."""
    shorter = int(size / 0.9)
    images = []
    for path in sorted((GOLDEN / "cases" / "images").rglob("*.png")):
        image = Image.open(path).convert("RGB")
        width, height = (shorter * side // min(image.size) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(image)).float() / 255
        images.append(((pixels - MEAN) / STD).permute(2, 0, 1))
    return torch.stack(images)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tensors_swin_tiny.safetensors")


@pytest.fixture(scope="module")
def images(tensors: dict[str, Tensor]) -> Tensor:
    pixels = pixel_values()
    assert torch.equal(pixels[:4], tensors["pixel_values_first4"])
    return pixels


@pytest.fixture
def golden_model() -> Any:
    return Swinv2ForImageClassification.from_pretrained(GOLDEN / "cases" / "swin_tiny").eval()


@pytest.fixture
def tiny() -> Any:
    config = Swinv2Config(
        image_size=64,
        patch_size=4,
        embed_dim=16,
        depths=[1, 2, 2],
        num_heads=[2, 2, 4],
        window_size=4,
        num_labels=len(checks.CLASSES),
    )
    return checks.randomised(Swinv2ForImageClassification(config))


def near(values: Tensor, expected: Tensor, tolerance: float = 2e-5) -> bool:
    """Equal within a tolerance relative to the scale of what is expected."""
    return bool((values - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.usefixtures("one_thread")
def test_features_and_logits_are_the_published_ones(
    golden_model: Any, images: Tensor, tensors: dict[str, Tensor]
) -> None:
    features = checks.features_of(golden_model, images)
    assert near(features.pooled, tensors["global_features"])
    assert near(features.local, tensors["local_features"].flatten(1, 2))
    logits = checks.logits_of(golden_model, images)
    assert near(logits.pooled, tensors["logits_global"])
    assert near(logits.local, tensors["logits_local"].flatten(1, 2))


@pytest.mark.parametrize("top_k", [2, 4, 6])
def test_ood_patches_are_the_published_ones(
    golden_model: Any, images: Tensor, tensors: dict[str, Tensor], top_k: int
) -> None:
    local = checks.logits_of(golden_model, images).local
    mask = ood_patch_mask(local, tensors["labels"], top_k)
    assert torch.equal(mask, tensors[f"is_ood_patch.k{top_k}"].bool())
    assert mask.any() == (top_k < 6)


@pytest.mark.parametrize(("ood_weight", "top_k"), [(0.1, 2), (0.01, 4), (0.1, 6)])
@pytest.mark.usefixtures("one_thread")
def test_losses_are_the_published_ones(
    golden_model: Any, images: Tensor, tensors: dict[str, Tensor], ood_weight: float, top_k: int
) -> None:
    backbone = backbone_of(golden_model)
    with torch.no_grad():
        features = backbone.embedded(backbone.image_features(images))
        sums = locoop_sums(*features[:2], backbone.class_weights(None), tensors["labels"], top_k=top_k)
    losses = locoop_values(sums, ood_weight)[:3]
    assert losses == pytest.approx(tensors[f"loss.lam{ood_weight}.k{top_k}"].tolist(), rel=2e-5)


@pytest.mark.parametrize(("golden_name", "prune"), [("pruned_small", "minor"), ("pruned_large", "principal")])
@pytest.mark.usefixtures("one_thread")
def test_pruned_weights_and_their_logits_are_the_published_ones(
    golden_model: Any, images: Tensor, tensors: dict[str, Tensor], golden_name: str, prune: Any
) -> None:
    ratios = {
        "swinv2.encoder.layers.1.blocks.1.intermediate.dense": 0.3,
        "swinv2.encoder.layers.1.blocks.0.attention.self.value": 0.4,
        "swinv2.encoder.layers.0.blocks.1.output.dense": 0.2,
        "swinv2.encoder.layers.0.blocks.0.intermediate.dense": 0.25,
    }
    for name, ratio in ratios.items():
        weight = golden_model.get_submodule(name).weight
        kept = decompose(weight.detach(), prune).kept(ratio)
        assert near(kept, tensors[f"{golden_name}.{name}.weight"])
        weight.data.copy_(kept)
    logits = checks.logits_of(golden_model, images)
    assert near(logits.pooled, tensors[f"{golden_name}.logits_global"])
    assert near(logits.local, tensors[f"{golden_name}.logits_local"].flatten(1, 2))


@pytest.mark.usefixtures("one_thread")
def test_search_repeats_the_published_code(
    golden_model: Any, images: Tensor, tensors: dict[str, Tensor], class_names: list[str]
) -> None:
    golden = read_json(GOLDEN / "swin_up_small.json")
    settings = golden["config"]
    objective = LoCoOpObjective(
        None, class_names, images, tensors["labels"], ood_weight=settings["lam"], top_k=settings["top_k"]
    )
    config = SeTARConfig(candidate_ratios=settings["ratios"])
    trace = search_rank_ratios(golden_model, objective, config, progress=False).trace

    stage_and_block = [(1, 1), (1, 0), (0, 1), (0, 0)]
    names = [f"swinv2.encoder.layers.{stage}.blocks.{block}.intermediate.dense" for stage, block in stage_and_block]
    assert [row.module for row in trace.rows] == names
    assert [row.best_ratio for row in trace.rows] == [chosen[-1] for chosen in golden["chosen"]]
    assert [row.total_loss for row in trace.rows] == pytest.approx(
        [row[-1] for row in golden["best_by_step"]], abs=1e-5
    )
    expected = {(row[0], row[4]): row[5:] for row in golden["evals"]}
    assert len(trace.candidates) == len([row for row in golden["evals"] if row[4] > 0])
    for candidate in trace.candidates:
        losses = expected[candidate.step, candidate.rank_ratio]
        assert candidate[3:6] == pytest.approx(losses[:3], abs=1e-5)
        assert 100 * candidate.accuracy == pytest.approx(losses[3], abs=1e-3)
        assert 100 * candidate.ood_patch_share == pytest.approx(losses[4], abs=1e-3)


@torch.no_grad()
def test_logits_are_the_models_own_and_local_ones_go_past_the_attention(tiny: Any) -> None:
    images = checks.random_images(3, 3, 64, 64)
    logits = checks.logits_of(tiny, images)
    torch.testing.assert_close(logits.pooled, tiny(images).logits, rtol=1e-5, atol=1e-5)

    inputs: list[Tensor] = []
    block = tiny.swinv2.encoder.layers[2].blocks[1]
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    tiny(images)
    hidden = inputs[0]
    attention = block.attention
    value = hidden @ attention.self.value.weight.T + attention.self.value.bias
    value = value @ attention.output.dense.weight.T + attention.output.dense.bias
    hidden = hidden + block.layernorm_before(value)
    hidden = hidden + block.layernorm_after(
        block.output.dense(torch.nn.functional.gelu(block.intermediate.dense(hidden)))
    )
    local = tiny.classifier(tiny.swinv2.layernorm(hidden))
    torch.testing.assert_close(logits.local, local, rtol=1e-5, atol=1e-5)
    assert logits.local.shape == (3, 16, len(checks.CLASSES))


def test_search(tiny: Any) -> None:
    assert default_target_modules("swinv2") == {"intermediate.dense"}
    checks.weights_are_where_they_should_be(tiny)
    objective = checks.make_objective(checks.random_images(12, 3, 64, 64))
    checks.same_search_by_replay_and_in_full(tiny, objective)
    checks.stays_within_the_bound(tiny, objective)
    checks.adapter_has_the_searched_loss(tiny, objective)


@pytest.mark.parametrize("weight_type", ["W_q", "W_v", "W_o", "W_down"])
def test_search_of_other_weights(tiny: Any, weight_type: str) -> None:
    objective = checks.make_objective(checks.random_images(12, 3, 64, 64))
    targets = backbone_of(tiny).modules_of_type(weight_type)
    assert len(checks.same_search_by_replay_and_in_full(tiny, objective, target_modules=targets)) == 5


def test_the_merging_of_patches_can_be_searched(tiny: Any) -> None:
    assert backbone_of(tiny).locate("swinv2.encoder.layers.0.downsample.reduction") == ("vision", 0, "reduction")
    objective = checks.make_objective(checks.random_images(12, 3, 64, 64))
    ratios = checks.same_search_by_replay_and_in_full(
        tiny, objective, target_modules=["downsample.reduction", "intermediate.dense"]
    )
    assert len(ratios) == 7


def test_images_without_colour_are_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 1, 64, 64\).*\(images, 3, height, width\).*processor"):
        checks.features_of(tiny, checks.random_images(2, 1, 64, 64))


def test_other_image_sizes_are_taken(tiny: Any) -> None:
    images = checks.random_images(2, 3, 72, 80)
    with torch.no_grad():
        expected = tiny(images).logits
    torch.testing.assert_close(checks.logits_of(tiny, images).pooled, expected, rtol=1e-5, atol=1e-5)


def test_class_names_must_be_the_classifiers(tiny: Any, class_names: list[str]) -> None:
    images = checks.random_images(4, 3, 64, 64)
    objective = LoCoOpObjective(None, class_names, images, checks.labels_of(4), top_k=2)
    with pytest.raises(ValueError, match=r"4 classes, class_names 6.*id2label"):
        objective.losses(tiny)
    named = LoCoOpObjective(None, tiny.config.id2label, images, checks.labels_of(4), top_k=2)
    assert named.class_names == list(tiny.config.id2label.values())
    assert named.losses(tiny).total > 0


def test_half_precision(tiny: Any) -> None:
    logits = checks.logits_of(tiny.bfloat16(), checks.random_images(2, 3, 64, 64))
    assert logits.pooled.dtype == logits.local.dtype == torch.float32

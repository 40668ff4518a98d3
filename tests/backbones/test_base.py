"""What every backbone shares: logits in float32 whatever the context, and inputs from any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPModel, ViTConfig, ViTForImageClassification

from setar_peft import LoCoOpObjective
from setar_peft.backbones import ClassWeights, ImageFeatures, backbone_of
from setar_peft.backbones.classifier import linear_map
from setar_peft.detection.features import image_logits
from setar_peft.objectives.loss import locoop_sums
from tests.backbones import checks


def features(seed: int = 0) -> ImageFeatures:
    generator = torch.Generator().manual_seed(seed)
    pooled, local = torch.randn(4, 32, generator=generator), torch.randn(4, 9, 32, generator=generator)
    return ImageFeatures(pooled, local)


def class_weights() -> ClassWeights:
    """Of logits in the range of CLIP's, where bfloat16 is off by 0.1."""
    return ClassWeights(20 * torch.randn(6, 32, generator=torch.Generator().manual_seed(1)), torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32_under_autocast(dtype: torch.dtype) -> None:
    classes, pooled = class_weights(), features().pooled.to(dtype)
    expected = pooled.float() @ classes.weight.T + 1
    with torch.autocast("cpu", torch.bfloat16):
        found = classes.logits(pooled)
        # What the guard is for.
        assert (nn.functional.linear(pooled, classes.weight, classes.bias) - expected).abs().max() > 0.05
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_the_loss_is_the_same_under_autocast() -> None:
    classes, labels = class_weights(), torch.tensor([0, 1, 2, 3])
    expected = locoop_sums(*features()[:2], classes, labels, top_k=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = locoop_sums(*features()[:2], classes, labels, top_k=2)
    assert found == expected


def test_embedded_features_and_class_weights_are_float32_under_autocast(load_clip: Callable[..., CLIPModel]) -> None:
    backbone = backbone_of(load_clip())
    expected, classes = backbone.embedded(features()), backbone.class_weights(features().pooled)
    with torch.autocast("cpu", torch.bfloat16):
        found, classes_found = backbone.embedded(features()), backbone.class_weights(features().pooled)
    for one, other in zip((*expected[:2], *classes[::2]), (*found[:2], *classes_found[::2]), strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)


def test_a_classifier_with_an_adapter_is_a_float32_map_under_autocast() -> None:
    vit = ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=32,
            num_labels=5,
        )
    )
    config = LoraConfig(target_modules=["classifier"], init_lora_weights=False)
    adapted: Any = get_peft_model(vit, config).get_base_model()
    with torch.no_grad():
        expected = linear_map(adapted.classifier)
        with torch.autocast("cpu", torch.bfloat16):
            found = linear_map(adapted.classifier)
    assert torch.equal(found.weight, expected.weight)
    assert found.weight.dtype == torch.float32


def test_logits_of_a_model_under_autocast_or_in_bfloat16_are_float32(
    load_clip: Callable[..., CLIPModel], clip_objective: Callable[..., LoCoOpObjective], golden_clip: dict[str, Any]
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = image_logits(load_clip(), clip_objective(), golden_clip["pixel_values"])
    in_bfloat16 = image_logits(
        load_clip(dtype=torch.bfloat16), clip_objective(), golden_clip["pixel_values"].bfloat16()
    )
    for logits in (under_autocast, in_bfloat16):
        assert logits.local is not None
        for values in (logits.pooled, logits.local):
            assert values.dtype == torch.float32
            # More values than bfloat16 has between the smallest and the largest.
            assert len(values.unique()) > 0.9 * values.numel()


def test_logits_without_the_local_ones() -> None:
    logits = class_weights().logits_of(features(), local=False)
    assert logits.local is None
    assert torch.equal(logits.pooled, class_weights().logits_of(features()).pooled)


def test_inputs_come_from_any_device() -> None:
    """As far as it shows without a second device: on the meta device nothing but the model's own inputs computes."""
    model = checks.randomised(
        ViTForImageClassification(
            ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=32)
        )
    )
    on_meta = backbone_of(model.to("meta"))
    logits = on_meta.logits(checks.random_images(2, 3, 32, 32), on_meta.class_weights(None))
    assert logits.pooled.device.type == "meta"


def test_logits_go_through_torch_export_with_any_number_of_images() -> None:
    config = ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32)
    model: Any = checks.randomised(ViTForImageClassification(config)).requires_grad_(False)
    backbone = backbone_of(model)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            features = backbone.embedded(backbone.image_features(images, layers=True))
            logits = backbone.class_weights(None).logits_of(features)
            return logits.pooled, logits.local, logits.layers

    program = torch.export.export(
        Logits().eval(),
        (checks.random_images(2, 3, 32, 32),),
        dynamic_shapes=({0: torch.export.Dim("batch", max=64)},),
        strict=False,
    )
    assert not any(block._forward_pre_hooks for block in backbone.towers["vision"].blocks)
    images = checks.random_images(5, 3, 32, 32)
    # Eagerly the blocks are called one by one; the export runs the model's own forward.
    for exported, eager in zip(program.module()(images), Logits()(images), strict=True):
        torch.testing.assert_close(exported, eager, rtol=1e-5, atol=1e-6)

"""Swin: windowed blocks in stages, against the stock model and a plain computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import SwinConfig, SwinForImageClassification

from setar_peft.backbones import default_target_modules
from tests.backbones import checks


@pytest.fixture
def tiny() -> Any:
    config = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=16,
        depths=[1, 2, 2],
        num_heads=[2, 2, 4],
        window_size=4,
        num_labels=len(checks.CLASSES),
    )
    return checks.randomised(SwinForImageClassification(config))


@torch.no_grad()
def test_logits_are_the_models_own_and_local_ones_go_past_the_attention(tiny: Any) -> None:
    images = checks.random_images(3, 3, 64, 64)
    logits = checks.logits_of(tiny, images)
    torch.testing.assert_close(logits.pooled, tiny(images).logits, rtol=1e-5, atol=1e-5)

    inputs: list[Tensor] = []
    block = tiny.swin.encoder.layers[2].blocks[1]
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    tiny(images)
    hidden, attention = inputs[0], block.attention
    value = block.layernorm_before(hidden) @ attention.v_proj.weight.T + attention.v_proj.bias
    hidden = hidden + value @ attention.o_proj.weight.T + attention.o_proj.bias
    hidden = hidden + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.layernorm_after(hidden))))
    local = tiny.classifier(tiny.swin.layernorm(hidden))
    torch.testing.assert_close(logits.local, local, rtol=1e-5, atol=1e-5)


def test_there_is_no_class_token(tiny: Any) -> None:
    checks.has_no_features_by_block(tiny, checks.random_images(3, 3, 64, 64))


def test_search(tiny: Any) -> None:
    assert default_target_modules("swin") == {"mlp.fc1"}
    checks.weights_are_where_they_should_be(tiny)
    objective = checks.make_objective(checks.random_images(12, 3, 64, 64))
    checks.same_search_by_replay_and_in_full(tiny, objective)
    checks.stays_within_the_bound(tiny, objective)
    checks.adapter_has_the_searched_loss(tiny, objective)


def test_images_without_colour_are_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 1, 64, 64\).*\(images, 3, height, width\).*processor"):
        checks.features_of(tiny, checks.random_images(2, 1, 64, 64))


def test_other_image_sizes_are_taken(tiny: Any) -> None:
    images = checks.random_images(2, 3, 72, 80)
    with torch.no_grad():
        expected = tiny(images).logits
    torch.testing.assert_close(checks.logits_of(tiny, images).pooled, expected, rtol=1e-5, atol=1e-5)

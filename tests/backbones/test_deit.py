"""DeiT: a distillation token beside the class token, and a second classifier where there is a teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassification, DeiTForImageClassificationWithTeacher

from setar_peft.backbones import default_target_modules
from tests.backbones import checks


@pytest.fixture(params=[DeiTForImageClassification, DeiTForImageClassificationWithTeacher])
def tiny(request: pytest.FixtureRequest) -> Any:
    config = DeiTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=len(checks.CLASSES),
    )
    return checks.randomised(request.param(config))


@torch.no_grad()
def test_logits_are_the_models_own_and_local_ones_go_past_the_attention(tiny: Any) -> None:
    images = checks.random_images(3, 3, 32, 32)
    logits = checks.logits_of(tiny, images)
    output = tiny(images, output_hidden_states=True)
    torch.testing.assert_close(logits.pooled, output.logits, rtol=1e-5, atol=1e-5)

    block, hidden = tiny.deit.layers[2], output.hidden_states[2][:, 2:]
    hidden = hidden + block.attention.o_proj(block.attention.v_proj(block.layernorm_before(hidden)))
    hidden = hidden + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.layernorm_after(hidden))))
    hidden = tiny.deit.layernorm(hidden)
    if isinstance(tiny, DeiTForImageClassification):
        local = tiny.classifier(hidden)
    else:
        local = (tiny.cls_classifier(hidden) + tiny.distillation_classifier(hidden)) / 2
    torch.testing.assert_close(logits.local, local, rtol=1e-5, atol=1e-5)
    assert logits.local.shape == (3, 16, len(checks.CLASSES))


def test_features_by_block(tiny: Any) -> None:
    """The class token, and with a teacher the distillation token beside it."""
    images, read = {"pixel_values": checks.random_images(3, 3, 32, 32)}, 2 if hasattr(tiny, "cls_classifier") else 1
    checks.features_by_block_are_of_the_hidden_states(
        tiny,
        images,
        lambda model: model(**images, output_hidden_states=True),
        lambda model, hidden: model.deit.layernorm(hidden)[:, :read].flatten(1),
    )


def test_the_last_block_computes_only_what_is_read(tiny: Any) -> None:
    """Both special tokens attend, and every token goes through the MLP once."""
    tokens_of = checks.tokens_in_the_last_block(
        tiny, "vision", lambda: checks.features_of(tiny, checks.random_images(2, 3, 32, 32)).pooled
    )
    assert tokens_of == {"W_q": [2], "W_k": [18], "W_v": [18], "W_o": [18], "W_up": [18], "W_down": [18]}


def test_search(tiny: Any) -> None:
    assert default_target_modules("deit") == {"mlp.fc1"}
    checks.weights_are_where_they_should_be(tiny)
    objective = checks.make_objective(checks.random_images(12, 3, 32, 32))
    checks.same_search_by_replay_and_in_full(tiny, objective)
    checks.stays_within_the_bound(tiny, objective)
    checks.adapter_has_the_searched_loss(tiny, objective)


def test_a_wrong_image_size_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3, 32, 16\).*\(images, 3, 32, 32\).*processor"):
        checks.features_of(tiny, checks.random_images(2, 3, 32, 16))

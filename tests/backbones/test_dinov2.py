"""DINOv2: class token and mean patch, with and without registers and a gated MLP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
)

from setar_peft.backbones import backbone_of, default_target_modules
from tests.backbones import checks

IS_OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)
needs_5_18 = pytest.mark.skipif(IS_OLD, reason="transformers before 5.18 has another DINOv2")
SHAPE = {
    "image_size": 28,
    "patch_size": 7,
    "hidden_size": 32,
    "mlp_ratio": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": len(checks.CLASSES),
}


@pytest.fixture(params=["plain", "registers", "gated"])
def tiny(request: pytest.FixtureRequest) -> Any:
    if request.param == "registers":
        config = Dinov2WithRegistersConfig(num_register_tokens=3, **SHAPE)
        return checks.randomised(Dinov2WithRegistersForImageClassification(config))
    return checks.randomised(
        Dinov2ForImageClassification(Dinov2Config(use_swiglu_ffn=request.param == "gated", **SHAPE))
    )


@needs_5_18
@torch.no_grad()
@pytest.mark.parametrize("size", [28, 42])
def test_logits_are_the_models_own_and_local_ones_a_patchs_share(tiny: Any, size: int) -> None:
    images = checks.random_images(3, 3, size, size)
    logits = checks.logits_of(tiny, images)
    output = tiny(images, output_hidden_states=True)
    torch.testing.assert_close(logits.pooled, output.logits, rtol=1e-5, atol=1e-5)

    block = tiny.base_model.encoder.layer[2]
    special = 1 + getattr(tiny.config, "num_register_tokens", 0)
    hidden = output.hidden_states[2][:, special:]
    hidden = hidden + block.layer_scale1.lambda1 * block.attention.o_proj(block.attention.v_proj(block.norm1(hidden)))
    hidden = hidden + block.layer_scale2.lambda1 * block.mlp(block.norm2(hidden))
    of_patches = tiny.classifier.weight[:, 32:]
    local = nn.functional.linear(tiny.base_model.layernorm(hidden), of_patches, tiny.classifier.bias)
    torch.testing.assert_close(logits.local, local, rtol=1e-5, atol=1e-5)
    assert logits.local.shape == (3, (size // 7) ** 2, len(checks.CLASSES))


@needs_5_18
def test_features_by_block(tiny: Any) -> None:
    """The class token beside the mean of the patches, which the registers are not."""
    images = {"pixel_values": checks.random_images(3, 3, 42, 28)}

    def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        tokens = model.base_model.layernorm(hidden)
        patches = tokens[:, -((42 // 7) * (28 // 7)) :]
        return torch.cat([tokens[:, 0], patches.mean(1)], dim=-1)

    checks.features_by_block_are_of_the_hidden_states(
        tiny, images, lambda model: model(**images, output_hidden_states=True), project
    )


@needs_5_18
def test_search(tiny: Any) -> None:
    assert default_target_modules(tiny.config.model_type) == {"mlp.fc1", "mlp.up_proj"}
    checks.weights_are_where_they_should_be(tiny)
    objective = checks.make_objective(checks.random_images(12, 3, 28, 28))
    assert len(checks.same_search_by_replay_and_in_full(tiny, objective)) == 3
    checks.stays_within_the_bound(tiny, objective)
    checks.adapter_has_the_searched_loss(tiny, objective)


@needs_5_18
def test_the_gated_mlp_has_its_own_names(tiny: Any) -> None:
    gated = tiny.config.use_swiglu_ffn
    assert backbone_of(tiny).weight_names["W_up"] == ("mlp.up_proj" if gated else "mlp.fc1")


@needs_5_18
def test_images_without_colour_are_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 1, 28, 28\).*\(images, 3, height, width\).*processor"):
        checks.features_of(tiny, checks.random_images(2, 1, 28, 28))


def test_before_transformers_5_18_it_is_refused(tiny: Any) -> None:
    attention = tiny.base_model.encoder.layer[0].attention
    if not IS_OLD:
        del attention.o_proj
    with pytest.raises(ValueError, match=r"Dinov2\w+ is built.*before transformers 5\.18.*Update transformers"):
        backbone_of(tiny)

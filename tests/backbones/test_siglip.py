"""SigLIP and SigLIP 2: their logits, their pooling head, and patches that are padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipForImageClassification, SiglipModel

from setar_peft import SeTARConfig, search_rank_ratios
from setar_peft.backbones import backbone_of, default_target_modules
from setar_peft.detection.features import image_logits
from setar_peft.detection.scores import local_mcm, score
from setar_peft.objectives.class_prompts import ClassPrompts
from tests.backbones import checks

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
TEXT = {**WIDTHS, "num_hidden_layers": 2, "vocab_size": 40, "max_position_embeddings": 12}


@pytest.fixture
def tiny() -> Any:
    vision = {**WIDTHS, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    return checks.randomised(SiglipModel(SiglipConfig(vision_config=vision, text_config=TEXT)))


@pytest.fixture
def tiny2() -> Any:
    vision = {**WIDTHS, "num_hidden_layers": 3, "num_patches": 16, "patch_size": 4}
    return checks.randomised(Siglip2Model(Siglip2Config(vision_config=vision, text_config=TEXT)))


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    return checks.WordTokenizer()(["a photo of a cat", "a dog", "frog"], padding="max_length", max_length=12)


def flexible_images(count: int) -> dict[str, Tensor]:
    """Images of different aspect ratios as the processor of SigLIP 2 gives them, padded to 16 patches."""
    shapes = [[4, 4], [2, 7], [5, 3], [3, 3]]
    spatial = torch.tensor([shapes[index % 4] for index in range(count)])
    mask = torch.arange(16) < spatial.prod(1, keepdim=True)
    pixels = checks.random_images(count, 16, 4 * 4 * 3) * mask[..., None]
    return {"pixel_values": pixels, "pixel_attention_mask": mask.int(), "spatial_shapes": spatial}


def past_the_last_attention(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Patches (images, patches, d): the last block without attention, the final norm, the head on each patch alone."""
    vision = model.vision_model
    block = vision.encoder.layers[-1]
    hidden = vision(**inputs, output_hidden_states=True).hidden_states[-2]
    hidden = hidden + block.self_attn.out_proj(block.self_attn.v_proj(block.layer_norm1(hidden)))
    hidden = vision.post_layernorm(hidden + block.mlp(block.layer_norm2(hidden)))
    return vision.head(hidden.flatten(0, 1)[:, None]).unflatten(0, hidden.shape[:2])


def unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


@torch.no_grad()
def test_logits_are_the_models_own_and_local_ones_go_past_the_attention(tiny: Any, tokens: dict[str, Tensor]) -> None:
    images = checks.random_images(3, 3, 32, 32)
    text = backbone_of(tiny).text_features(tokens, batch_size=2)
    logits = checks.logits_of(tiny, images, text)
    output = tiny(pixel_values=images, **tokens)
    torch.testing.assert_close(logits.pooled, output.logits_per_image, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unit(text), output.text_embeds, rtol=1e-5, atol=1e-5)

    local = unit(past_the_last_attention(tiny, {"pixel_values": images})) @ output.text_embeds.T
    local = local * tiny.logit_scale.exp() + tiny.logit_bias
    torch.testing.assert_close(logits.local, local, rtol=1e-5, atol=1e-5)
    # The bias and the scale matter, or this says nothing of them.
    assert abs(tiny.logit_bias.item()) > 0.01
    assert abs(tiny.logit_scale.item()) > 0.01


@torch.no_grad()
def test_padded_patches_of_siglip2(tiny2: Any, tokens: dict[str, Tensor]) -> None:
    inputs = flexible_images(4)
    text = backbone_of(tiny2).text_features(tokens)
    logits = checks.logits_of(tiny2, inputs, text)
    output = tiny2(**inputs, **tokens)
    torch.testing.assert_close(logits.pooled, output.logits_per_image, rtol=1e-5, atol=1e-5)
    assert logits.mask is not None
    assert logits.mask.sum(1).tolist() == [16, 14, 15, 9]
    local = unit(past_the_last_attention(tiny2, inputs)) @ output.text_embeds.T
    local = local * tiny2.logit_scale.exp() + tiny2.logit_bias
    torch.testing.assert_close(logits.local[logits.mask], local[logits.mask], rtol=1e-5, atol=1e-5)


def test_there_is_no_class_token(tiny: Any, tiny2: Any) -> None:
    checks.has_no_features_by_block(tiny, checks.random_images(3, 3, 32, 32))
    checks.has_no_features_by_block(tiny2, flexible_images(3))


def test_padded_patches_count_for_nothing(tiny2: Any) -> None:
    inputs = flexible_images(12)
    losses = checks.make_objective(inputs, checks.WordTokenizer()).losses(tiny2)
    garbage = inputs["pixel_values"].masked_fill(~inputs["pixel_attention_mask"].bool()[..., None], 7.0)
    spoilt = checks.make_objective({**inputs, "pixel_values": garbage}, checks.WordTokenizer()).losses(tiny2)
    assert spoilt == pytest.approx(losses, abs=1e-6)
    assert 0 < losses.ood_patch_share < 1


def test_the_last_block_computes_only_what_is_read(tiny: Any, tokens: dict[str, Tensor]) -> None:
    """Of a prompt its last token is read."""
    tokens_of = checks.tokens_in_the_last_block(tiny, "text", lambda: backbone_of(tiny).text_features(tokens))
    assert tokens_of == {"W_q": [1], "W_k": [12], "W_v": [12], "W_o": [1], "W_up": [1], "W_down": [1]}


def test_prompts_are_padded_to_full_length(tiny: Any) -> None:
    """SigLIP reads the last token, so the padding is part of what it was trained on."""
    objective = checks.make_objective(checks.random_images(12, 3, 32, 32), checks.WordTokenizer(with_mask=False))
    tokens = objective.class_tokens(backbone_of(tiny))
    assert set(tokens) == {"input_ids"}
    assert tokens["input_ids"].shape == (4, 12)


def test_prompts_of_another_length_are_refused(tiny: Any) -> None:
    """Silently 0.3 off otherwise: it reads the last token, whatever it is."""
    for length in (7, 13):
        tokens = checks.WordTokenizer()(["a photo of a cat"], padding="max_length", max_length=length)
        message = rf"have {length} tokens; this model was trained with exactly 12.*padding='max_length', max_length=12"
        with pytest.raises(ValueError, match=message):
            backbone_of(tiny).text_features(tokens)


def test_everybody_encodes_the_prompts_alike(tiny: Any) -> None:
    """Logits of one batch, of a set, and those that the losses read are the stock model's."""
    objective = checks.make_objective(checks.random_images(12, 3, 32, 32), checks.WordTokenizer())
    tokens = checks.WordTokenizer()(objective.prompts, padding="max_length", max_length=12)
    with torch.no_grad():
        output = tiny(pixel_values=checks.random_images(12, 3, 32, 32), **tokens)
    logits = image_logits(tiny, objective, checks.random_images(12, 3, 32, 32))
    torch.testing.assert_close(logits.pooled, output.logits_per_image, rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(output.logits_per_image, checks.labels_of(12))
    assert objective.losses(tiny).id_loss == pytest.approx(float(loss), rel=1e-5)


def test_the_temperature_is_the_scale_alone(tiny: Any) -> None:
    """The bias shifts the logits of all classes alike, which no softmax sees."""
    tiny.logit_scale.data.fill_(math.log(110.0))
    objective = checks.make_objective(checks.random_images(12, 3, 32, 32), checks.WordTokenizer())
    logits = image_logits(tiny, objective, checks.random_images(12, 3, 32, 32))
    cosines = (logits.pooled - tiny.logit_bias.item()) / 110.0
    torch.testing.assert_close(score("mcm", logits), cosines.softmax(-1).amax(-1), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_labels_that_are_none_of_the_classes_have_the_models_own_logits(tiny: Any) -> None:
    """With its bias, or NegLabel's softmax would weigh them against classes that have it."""
    prompts = ClassPrompts(checks.WordTokenizer(), checks.CLASSES, negative_labels=["photo", "a", "of"])
    images, backbone = checks.random_images(3, 3, 32, 32), backbone_of(tiny)
    logits = backbone.logits(images, prompts.class_weights(backbone))
    texts = [*prompts.prompts, *(f"a photo of a {label}" for label in prompts.negative_labels)]
    tokens = checks.WordTokenizer()(texts, padding="max_length", max_length=12)
    expected = tiny(pixel_values=images, **tokens).logits_per_image
    torch.testing.assert_close(logits.pooled, expected[:, :4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.negative, expected[:, 4:], rtol=1e-5, atol=1e-5)


def test_scores_of_padded_patches_are_those_of_the_others(tiny2: Any) -> None:
    objective = checks.make_objective(flexible_images(12), checks.WordTokenizer())
    logits = image_logits(tiny2, objective, flexible_images(4))
    assert logits.local is not None
    assert logits.mask is not None
    alone = [
        local_mcm(patches[real][None], logits.scale) for patches, real in zip(logits.local, logits.mask, strict=True)
    ]
    torch.testing.assert_close(score("local_mcm", logits), torch.cat(alone))


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_search(request: pytest.FixtureRequest, family: str) -> None:
    model = request.getfixturevalue({"siglip": "tiny", "siglip2": "tiny2"}[family])
    data = checks.random_images(12, 3, 32, 32) if family == "siglip" else flexible_images(12)
    assert default_target_modules(family) == {"mlp.fc1"}
    checks.weights_are_where_they_should_be(model)
    assert backbone_of(model).locate("vision_model.head.mlp.fc1") == ("vision", 3, "W_up")
    objective = checks.make_objective(data, checks.WordTokenizer())
    # Three blocks and the pooling head, then two blocks of text.
    assert len(checks.same_search_by_replay_and_in_full(model, objective)) == 6
    checks.stays_within_the_bound(model, objective)
    checks.adapter_has_the_searched_loss(model, objective)


def test_search_of_the_text_projection(tiny: Any) -> None:
    objective = checks.make_objective(checks.random_images(12, 3, 32, 32), checks.WordTokenizer())
    targets = backbone_of(tiny).modules_of_type("W_p")
    assert targets == ["text_model.head"]
    checks.same_search_by_replay_and_in_full(tiny, objective, target_modules=[*targets, "head.mlp.fc2"])


def test_wrong_images_are_refused(tiny: Any, tiny2: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3, 16, 16\).*\(images, 3, 32, 32\).*processor"):
        checks.features_of(tiny, checks.random_images(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"lack pixel_attention_mask, spatial_shapes.*image processor"):
        checks.features_of(tiny2, checks.random_images(2, 3, 16, 16))
    wrong = {**flexible_images(2), "pixel_values": checks.random_images(2, 16, 27)}
    with pytest.raises(ValueError, match=r"shape \(2, 16, 27\).*\(images, patches, 48\)"):
        checks.features_of(tiny2, wrong)


def test_what_is_missing_is_said(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"SiglipForImageClassification.*load it as SiglipModel"):
        backbone_of(SiglipForImageClassification(tiny.config))
    with pytest.raises(ValueError, match=r"SiglipModel classifies by text"):
        backbone_of(tiny).class_weights(None)
    objective = checks.make_objective(checks.random_images(12, 3, 32, 32))
    with pytest.raises(ValueError, match=r"classifies by prompts, and processor is a NoneType.*tokenizer"):
        search_rank_ratios(tiny, objective, SeTARConfig(), progress=False)

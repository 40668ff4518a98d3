"""CLIP against the published code on a tiny model, at other sizes, and with older checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPVisionModel

from setar_peft.backbones import backbone_of, default_target_modules
from setar_peft.decomposition import decompose
from setar_peft.objectives.loss import locoop_sums, locoop_values, ood_patch_mask
from tests.backbones import checks
from tests.conftest import GOLDEN

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


@pytest.fixture
def tiny() -> Any:
    vision = {**WIDTHS, "num_hidden_layers": 3, "image_size": 48, "patch_size": 16}
    text = {**WIDTHS, "num_hidden_layers": 2, "vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 39}
    return checks.randomised(CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)))


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    """Three prompts that begin with 1, end with 39, and are padded with 39 as OpenAI's tokenizer does."""
    ids = torch.tensor([[1, 5, 6, 39, 39], [1, 7, 39, 39, 39], [1, 8, 9, 10, 39]])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}


@torch.no_grad()
def published(model: Any, golden: dict[str, Tensor]) -> tuple[Any, Tensor, Any]:
    """Features of the golden images and prompts, and the logits, by the backbone."""
    backbone = backbone_of(model)
    text = backbone.text_features({name: golden[name] for name in ("input_ids", "attention_mask")})
    return backbone.image_features(golden["pixel_values"]), text, checks.logits_of(model, golden["pixel_values"], text)


def near(values: Tensor, expected: Tensor, tolerance: float = 2e-5) -> bool:
    return bool((values - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.usefixtures("one_thread")
def test_features_and_logits_are_the_published_ones(
    load_clip: Callable[..., CLIPModel], golden_clip: dict[str, Tensor]
) -> None:
    features, text, logits = published(load_clip(), golden_clip)
    assert near(text, golden_clip["text_features"])
    assert near(features.pooled, golden_clip["global_features"])
    assert near(features.local, golden_clip["local_features"].flatten(1, 2))
    assert near(logits.pooled, golden_clip["logits_global"])
    assert near(logits.local, golden_clip["logits_local"].flatten(1, 2))


def test_features_by_block(tiny: Any) -> None:
    images = {"pixel_values": checks.random_images(3, 3, 48, 48)}
    checks.features_by_block_are_of_the_hidden_states(
        tiny,
        images,
        lambda model: getattr(model, "get_base_model", lambda: model)().vision_model(
            **images, output_hidden_states=True
        ),
        lambda model, hidden: model.visual_projection(model.vision_model.post_layernorm(hidden)[:, 0]),
    )


@pytest.mark.parametrize("top_k", [2, 3, 5, 6])
def test_ood_patches_are_the_published_ones(
    load_clip: Callable[..., CLIPModel], golden_clip: dict[str, Tensor], top_k: int
) -> None:
    local = published(load_clip(), golden_clip)[2].local
    mask = ood_patch_mask(local, golden_clip["labels"], top_k)
    assert torch.equal(mask, golden_clip[f"is_ood_patch.k{top_k}"].bool())


@pytest.mark.parametrize(("ood_weight", "top_k"), [(0.1, 2), (0.25, 3), (0.05, 5), (0.1, 6)])
@pytest.mark.usefixtures("one_thread")
def test_losses_are_the_published_ones(
    load_clip: Callable[..., CLIPModel], golden_clip: dict[str, Tensor], ood_weight: float, top_k: int
) -> None:
    model = load_clip()
    features, text, _ = published(model, golden_clip)
    backbone = backbone_of(model)
    embedded = backbone.embedded(features)
    with torch.no_grad():
        classes = backbone.class_weights(text)
        sums = locoop_sums(*embedded[:2], classes, golden_clip["labels"], top_k=top_k)
    expected = golden_clip[f"loss.lam{ood_weight}.k{top_k}"].tolist()
    assert locoop_values(sums, ood_weight)[:3] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(("golden_name", "prune"), [("pruned_small", "minor"), ("pruned_large", "principal")])
@pytest.mark.usefixtures("one_thread")
def test_pruned_weights_and_their_logits_are_the_published_ones(
    load_clip: Callable[..., CLIPModel], golden_clip: dict[str, Tensor], golden_name: str, prune: Any
) -> None:
    ratios = {
        "vision_model.encoder.layers.3.mlp.fc1": 0.3,
        "vision_model.encoder.layers.0.mlp.fc2": 0.15,
        "vision_model.encoder.layers.2.self_attn.q_proj": 0.4,
        "visual_projection": 0.1,
        "text_model.encoder.layers.2.mlp.fc1": 0.25,
        "text_model.encoder.layers.0.self_attn.out_proj": 0.35,
    }
    model = load_clip()
    for name, ratio in ratios.items():
        weight = model.get_parameter(f"{name}.weight")
        kept = decompose(weight.detach(), prune).kept(ratio)
        assert near(kept, golden_clip[f"{golden_name}.{name}.weight"])
        weight.data.copy_(kept)
    features, text, logits = published(model, golden_clip)
    assert near(text, golden_clip[f"{golden_name}.text_features"])
    assert near(features.local, golden_clip[f"{golden_name}.local_features"].flatten(1, 2))
    assert near(logits.pooled, golden_clip[f"{golden_name}.logits_global"])
    assert near(logits.local, golden_clip[f"{golden_name}.logits_local"].flatten(1, 2))


@torch.no_grad()
def test_logits_are_the_models_own_at_any_image_size(tiny: Any, tokens: dict[str, Tensor]) -> None:
    images = checks.random_images(3, 3, 48, 48)
    logits = checks.logits_of(tiny, images, backbone_of(tiny).text_features(tokens))
    expected = tiny(pixel_values=images, **tokens).logits_per_image
    torch.testing.assert_close(logits.pooled, expected, rtol=1e-5, atol=1e-5)
    assert logits.local.shape == (3, 9, 3)


@torch.no_grad()
@pytest.mark.parametrize("end", [39, 2])
def test_prompts_end_where_the_checkpoint_says(tiny: Any, tokens: dict[str, Tensor], end: int) -> None:
    """Older checkpoints carry the end id 2 and mean the largest id of the prompt."""
    tiny.config.text_config.eos_token_id = tiny.text_model.config.eos_token_id = end
    tiny.text_model.eos_token_id = end
    features = backbone_of(tiny).text_features(tokens)
    torch.testing.assert_close(features, tiny.get_text_features(**tokens).pooler_output, rtol=1e-5, atol=1e-5)
    # The end is where the attention mask ends; another position would give other features.
    hidden = tiny.text_model(**tokens).last_hidden_state
    positions = tokens["attention_mask"].sum(1) - 1
    expected = tiny.text_projection(hidden[torch.arange(3), positions])
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_prompts_in_batches_have_the_same_features(tiny: Any, tokens: dict[str, Tensor], batch_size: int) -> None:
    sizes: list[int] = []
    tiny.text_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    backbone = backbone_of(tiny)
    expected = backbone.text_features(tokens)
    sizes.clear()
    features = backbone.text_features(tokens, batch_size)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert max(sizes) <= batch_size
    assert sum(sizes) == 3


def test_search(tiny: Any) -> None:
    assert default_target_modules("clip") == {"mlp.fc1"}
    checks.weights_are_where_they_should_be(tiny)
    tiny.config.text_config.eos_token_id = tiny.text_model.config.eos_token_id = 2
    objective = checks.make_objective(checks.random_images(12, 3, 48, 48), checks.WordTokenizer())
    assert len(checks.same_search_by_replay_and_in_full(tiny, objective)) == 5
    checks.stays_within_the_bound(tiny, objective)
    checks.adapter_has_the_searched_loss(tiny, objective)


def test_a_wrong_image_size_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3, 32, 32\).*\(images, 3, 48, 48\).*processor"):
        checks.features_of(tiny, checks.random_images(2, 3, 32, 32))


def test_what_is_missing_is_said(tiny: Any) -> None:
    vision_only = CLIPVisionModel(tiny.config.vision_config)
    with pytest.raises(ValueError, match=r"'clip_vision_model'.*no known backbone; known are bert, clip.*callable"):
        backbone_of(vision_only)
    with pytest.raises(ValueError, match=r"W_up of model type 'gpt2' is not known.*target_modules"):
        default_target_modules("gpt2")
    with pytest.raises(ValueError, match=r"no weights 'W_gate'; it has W_q, .*W_p"):
        backbone_of(tiny).modules_of_type("W_gate")
    with pytest.raises(ValueError, match=r"embeddings.patch_embedding is in none of the towers.*vision, text"):
        backbone_of(tiny).locate("vision_model.embeddings.patch_embedding")


def test_the_real_tokenizer_ends_prompts_where_the_model_reads_them(load_clip: Callable[..., CLIPModel]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "cases" / "clip_tiny")
    tokens = tokenizer(["a photo of a cat", "a photo of a tree frog"], padding=True, return_tensors="pt")
    model = load_clip()
    with torch.no_grad():
        features = backbone_of(model).text_features(dict(tokens))
        expected = model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_the_last_block_computes_only_what_is_read(tiny: Any, tokens: dict[str, Tensor]) -> None:
    """In the vision tower one query attends, and every token goes through the MLP once; of a prompt its end is read."""
    images = checks.random_images(2, 3, 48, 48)
    vision = checks.tokens_in_the_last_block(tiny, "vision", lambda: checks.features_of(tiny, images).pooled)
    assert vision == {"W_q": [1], "W_k": [10], "W_v": [10], "W_o": [10], "W_up": [10], "W_down": [10]}
    text = checks.tokens_in_the_last_block(tiny, "text", lambda: backbone_of(tiny).text_features(tokens))
    assert text == {"W_q": [1], "W_k": [5], "W_v": [5], "W_o": [1], "W_up": [1], "W_down": [1]}

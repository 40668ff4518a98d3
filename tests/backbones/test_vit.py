"""ViT: the class token and a linear classifier, on a tiny random model and on a trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from setar_peft import LoCoOpObjective, SeTARConfig, search_rank_ratios
from setar_peft.backbones import backbone_of, default_target_modules
from tests.backbones import checks


@pytest.fixture
def tiny() -> Any:
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=len(checks.CLASSES),
    )
    return checks.randomised(ViTForImageClassification(config))


@torch.no_grad()
def test_logits_are_the_models_own_and_local_ones_go_past_the_attention(tiny: Any) -> None:
    images = checks.random_images(3, 3, 32, 32)
    logits = checks.logits_of(tiny, images)
    output = tiny(images, output_hidden_states=True)
    torch.testing.assert_close(logits.pooled, output.logits, rtol=1e-5, atol=1e-5)

    block, hidden = tiny.vit.layers[2], output.hidden_states[2][:, 1:]
    value = block.layernorm_before(hidden) @ block.attention.v_proj.weight.T + block.attention.v_proj.bias
    hidden = hidden + value @ block.attention.o_proj.weight.T + block.attention.o_proj.bias
    hidden = hidden + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.layernorm_after(hidden))))
    local = tiny.classifier(tiny.vit.layernorm(hidden))
    torch.testing.assert_close(logits.local, local, rtol=1e-5, atol=1e-5)
    assert logits.mask is None


def test_features_by_block(tiny: Any) -> None:
    images = {"pixel_values": checks.random_images(3, 3, 32, 32)}
    checks.features_by_block_are_of_the_hidden_states(
        tiny,
        images,
        lambda model: model(**images, output_hidden_states=True),
        lambda model, hidden: model.vit.layernorm(hidden)[:, 0],
    )


def test_the_last_block_computes_only_what_is_read(tiny: Any) -> None:
    """One query attends, and every token goes through the MLP once."""
    tokens_of = checks.tokens_in_the_last_block(
        tiny, "vision", lambda: checks.features_of(tiny, checks.random_images(2, 3, 32, 32)).pooled
    )
    assert tokens_of == {"W_q": [1], "W_k": [17], "W_v": [17], "W_o": [17], "W_up": [17], "W_down": [17]}


def test_search(tiny: Any) -> None:
    assert default_target_modules("vit") == {"mlp.fc1"}
    checks.weights_are_where_they_should_be(tiny)
    objective = checks.make_objective(checks.random_images(12, 3, 32, 32))
    checks.same_search_by_replay_and_in_full(tiny, objective)
    checks.stays_within_the_bound(tiny, objective)
    checks.adapter_has_the_searched_loss(tiny, objective)


@pytest.mark.parametrize("weight_type", ["W_q", "W_k", "W_v", "W_o", "W_down"])
def test_search_of_other_weights(tiny: Any, weight_type: str) -> None:
    objective = checks.make_objective(checks.random_images(12, 3, 32, 32))
    targets = backbone_of(tiny).modules_of_type(weight_type)
    assert len(checks.same_search_by_replay_and_in_full(tiny, objective, target_modules=targets)) == 3


def test_a_wrong_image_size_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3, 16, 16\).*\(images, 3, 32, 32\).*processor"):
        checks.features_of(tiny, checks.random_images(2, 3, 16, 16))


def test_a_model_without_a_classifier_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"ViTModel.*load it as ViTForImageClassification.*callable"):
        backbone_of(ViTModel(tiny.config))
    tiny.classifier = nn.Identity()
    with pytest.raises(ValueError, match=r"classifier is a Identity.*num_labels"):
        backbone_of(tiny).class_weights(None)


def test_the_classifier_itself_cannot_be_searched_by_replay(tiny: Any) -> None:
    objective = checks.make_objective(checks.random_images(4, 3, 32, 32), count=4)
    with pytest.raises(ValueError, match=r"classifier is in none of the towers"):
        search_rank_ratios(tiny, objective, SeTARConfig(target_modules=["classifier"]), progress=False)


def test_an_adapter_on_the_classifier_counts(tiny: Any) -> None:
    """What LoRA adds to the classifier is in the class weights."""
    from peft import LoraConfig, get_peft_model

    images = checks.random_images(3, 3, 32, 32)
    adapted = get_peft_model(tiny, LoraConfig(target_modules=["classifier"], init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = adapted(pixel_values=images).logits
        with adapted.disable_adapter():
            assert not torch.allclose(expected, adapted(pixel_values=images).logits, atol=1e-2)
    torch.testing.assert_close(
        checks.logits_of(adapted.get_base_model(), images).pooled, expected, rtol=1e-4, atol=1e-5
    )


def _fashion(folder: Path, name: str, count: int) -> tuple[Tensor, Tensor]:
    arrays = np.load(folder / name)
    # The images lie class by class.
    spread = slice(None, None, len(arrays["y"]) // count)
    pixels = torch.from_numpy(arrays["x"][spread]).float().div(255).sub(0.5).div(0.5)
    return pixels[:, None], torch.from_numpy(arrays["y"][spread]).long()


@pytest.mark.shared_data
def test_a_trained_classifier(shared_data: Path) -> None:
    """Accuracy as its author gives it, and local logits that know the class of a fair share of the patches."""
    model: Any = ViTForImageClassification.from_pretrained(shared_data / "fashion_vit").eval()
    images, labels = _fashion(shared_data, "fashion_test.npz", 1000)
    objective = LoCoOpObjective(None, model.config.id2label, images, labels, ood_weight=0.1, top_k=3, batch_size=250)
    losses = objective.losses(model)
    assert losses.accuracy == pytest.approx(0.908, abs=0.02)
    assert 0 < losses.ood_patch_share < 0.7


@pytest.mark.shared_data
def test_a_search_on_a_trained_classifier_lowers_its_loss(shared_data: Path) -> None:
    model: Any = ViTForImageClassification.from_pretrained(shared_data / "fashion_vit").eval()
    images, labels = _fashion(shared_data, "fashion_calibration.npz", 100)
    objective = LoCoOpObjective(None, model.config.id2label, images, labels, ood_weight=0.1, top_k=3)
    result = search_rank_ratios(model, objective, progress=False)
    assert result.trace.rows[-1].total_loss < result.trace.initial.total
    assert len(result.rank_ratios) == 6

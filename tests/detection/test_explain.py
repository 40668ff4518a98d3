"""Which patch speaks for which class: against the stock model, the score, and a picture with a known odd place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from setar_peft.backbones import ClassWeights, Logits, PatchGrid, backbone_of
from setar_peft.detection.explain import explanation_of
from setar_peft.detection.scores import local_mcm
from tests.backbones import checks

NAMES = ["cat", "dog", "frog"]


def logits_of(local: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Logits:
    return Logits(local.mean(1), local, scale, mask)


def test_each_patch_speaks_for_the_class_of_its_largest_logit() -> None:
    local = checks.random_images(1, 6, 3) * 30
    explained = explanation_of(logits_of(local, 20.0), NAMES, PatchGrid(2, 3, 8, 4), score=0.5)
    probabilities = torch.exp(local[0] / 20) / torch.exp(local[0] / 20).sum(-1, keepdim=True)
    for number in range(6):
        row, column = divmod(number, 3)
        assert explained.classes[row, column] == local[0, number].argmax()
        assert explained.strengths[row, column] == pytest.approx(float(probabilities[number].max()), rel=1e-6)
    assert explained.strengths[explained.strongest] == explained.strengths.max()
    assert explained.label == NAMES[int(local.mean(1).argmax())]
    assert (explained.score, explained.temperature, explained.patch) == (0.5, 20.0, (8, 4))
    assert (explained.classes.dtype, explained.strengths.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize("temperature", [None, 3.0])
def test_the_strongest_patch_is_the_local_part_of_the_score(temperature: float | None) -> None:
    local = checks.random_images(1, 20, 3) * 30
    explained = explanation_of(logits_of(local, 17.0), NAMES, PatchGrid(4, 5, 1, 1), temperature=temperature)
    assert float(explained.strengths.max()) == float(local_mcm(local, temperature or 17.0))


def test_padding_is_no_part_of_the_map() -> None:
    local = checks.random_images(1, 8, 3)
    mask = torch.tensor([[True] * 6 + [False] * 2])
    local[0, 6:] = torch.tensor([90.0, 0.0, 0.0])
    explained = explanation_of(logits_of(local, mask=mask), NAMES, PatchGrid(3, 2, 4, 4))
    assert explained.strengths.shape == (3, 2)
    assert explained.strengths.max() < 1
    words = list("abcdefgh")
    mask = torch.tensor([[False] * 2 + [True] * 5 + [False]])
    explained = explanation_of(logits_of(local, mask=mask), NAMES, PatchGrid(1, 8, 1, 1), tokens=words)
    assert explained.tokens == tuple("cdefg")
    assert explained.classes[0].tolist() == local[0, 2:7].argmax(-1).tolist()


@torch.no_grad()
def test_a_bright_place_is_the_strongest_there(load_clip: Any) -> None:
    """For a class that points where the bright patch's features do, against one that points nowhere."""
    model = load_clip()
    backbone, image = backbone_of(model), torch.zeros(1, 3, 32, 32)
    grid = backbone.patch_grid(image)
    assert grid.rows * grid.columns > 4
    for number in range(grid.rows * grid.columns):
        row, column = divmod(number, grid.columns)
        odd = image.clone()
        odd[:, :, row * grid.height : (row + 1) * grid.height, column * grid.width : (column + 1) * grid.width] = 3
        feature = backbone.embedded(backbone.image_features(odd)).local[0, number]
        classes = ClassWeights(torch.stack([feature, torch.zeros_like(feature)]))
        explained = explanation_of(backbone.logits(odd, classes), ["odd", "nothing"], grid)
        assert explained.strongest == (row, column)
        assert explained.classes[row, column] == 0


@torch.no_grad()
def test_the_tokens_of_a_text() -> None:
    config = BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    model = checks.randomised(BertForSequenceClassification(config))
    backbone = backbone_of(model)
    inputs = {"input_ids": torch.tensor([[1, 7, 8, 9, 2]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    logits = backbone.logits(inputs, backbone.class_weights(None))
    words = ["the", "cat", "sat", "[SEP]"]
    explained = explanation_of(logits, NAMES, backbone.patch_grid(inputs), tokens=words)
    assert explained.tokens == tuple(words)
    figure = explained.figure()
    assert [text.get_text() for text in figure.axes[0].texts] == words


def test_what_does_not_fit_is_refused() -> None:
    local = checks.random_images(1, 6, 3)
    grid = PatchGrid(2, 3, 8, 8)
    with pytest.raises(ValueError, match="reads local logits, which are None"):
        explanation_of(Logits(local[:, 0], None, 1.0), NAMES, grid)
    with pytest.raises(ValueError, match="are of 2 images; an explanation is of one"):
        explanation_of(logits_of(torch.cat([local, local])), NAMES, grid)
    with pytest.raises(ValueError, match="are of 3 classes, and class_names has 2"):
        explanation_of(logits_of(local), NAMES[:2], grid)
    with pytest.raises(ValueError, match="6 patches, which is no grid of 2 x 2"):
        explanation_of(logits_of(local), NAMES, PatchGrid(2, 2, 8, 8))
    with pytest.raises(ValueError, match="2 tokens and 6 local logits"):
        explanation_of(logits_of(local), NAMES, PatchGrid(1, 6, 1, 1), tokens=["a", "b"])
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"temperature is .*; give a positive number"):
            explanation_of(logits_of(local), NAMES, grid, temperature=temperature)
    with pytest.raises(ValueError, match="no picture to draw its map on"):
        explanation_of(logits_of(local), NAMES, grid).figure()

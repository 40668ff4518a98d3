"""The metric from OOD patches against scikit-learn on the same scores, uncounted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from setar_peft import PatchMetricObjective, search_rank_ratios
from setar_peft.backbones import ClassWeights
from setar_peft.detection.metrics import fpr_at_tpr
from setar_peft.detection.scores import mcm
from tests.conftest import GOLDEN


@pytest.fixture
def objective(golden_clip: dict[str, torch.Tensor], class_names: list[str]) -> Callable[..., PatchMetricObjective]:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "cases" / "clip_tiny")
    images, labels = golden_clip["pixel_values"], golden_clip["labels"]

    def make(metric: str, batch_size: int = 64) -> PatchMetricObjective:
        return PatchMetricObjective(
            tokenizer,
            class_names,
            images,
            labels,
            top_k=2,
            metric=metric,
            batch_size=batch_size,  # type: ignore[arg-type]
        )

    return make


@pytest.mark.parametrize("metric", ["auroc", "fpr95"])
def test_equals_the_metric_of_the_scores(
    load_clip: Callable[..., CLIPModel],
    golden_clip: dict[str, torch.Tensor],
    objective: Callable[..., PatchMetricObjective],
    metric: str,
) -> None:
    losses = objective(metric).losses(load_clip())
    images = mcm(golden_clip["logits_global"], 100.0).numpy()
    local = golden_clip["logits_local"].flatten(1, 2)[golden_clip["is_ood_patch.k2"].bool()]
    patches = mcm(local, 100.0).numpy()
    if metric == "auroc":
        is_image = np.r_[np.ones(len(images)), np.zeros(len(patches))]
        expected = 1 - roc_auc_score(is_image, np.r_[images, patches])
    else:
        expected = fpr_at_tpr(images, patches).fpr
    assert losses.total == pytest.approx(expected, abs=2e-3)
    assert losses.ood_patch_share == pytest.approx(len(patches) / 384)


@pytest.mark.parametrize("metric", ["auroc", "fpr95"])
@pytest.mark.parametrize(
    ("classes", "spread", "scale"),
    [(1000, 3.0, 100.0), (6, 0.3, 100.0), (6, 8.0, 1.0), (1000, 20.0, 1.0), (2, 3.0, 100.0)],
    ids=["CLIP on ImageNet", "cosines that hardly differ", "a classifier", "a sure classifier", "two classes"],
)
def test_the_bins_suit_cosines_and_logits(
    objective: Callable[..., PatchMetricObjective], metric: str, classes: int, spread: float, scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = spread * torch.randn(500, classes, generator=generator)
    images[:, 0] += spread
    patches = spread * torch.randn(2000, classes, generator=generator)
    made = objective(metric)
    weights = ClassWeights(torch.eye(classes), scale=scale)
    counts = [made._counts(weights.logits(logits) / weights.scale) for logits in (images, patches)]
    found = made.values(torch.cat([torch.ones(6, dtype=torch.float64), *counts])).total
    odds = [log_odds(logits.double() / scale) for logits in (images, patches)]
    if metric == "auroc":
        expected = 1 - roc_auc_score(np.r_[np.ones(500), np.zeros(2000)], np.concatenate(odds))
    else:
        expected = fpr_at_tpr(*odds).fpr
    assert found == pytest.approx(expected, abs=5e-4)
    assert min(int((count > 0).sum()) for count in counts) > 300


@pytest.mark.parametrize("metric", ["auroc", "fpr95"])
def test_logits_that_are_no_numbers_win_nothing(
    load_clip: Callable[..., CLIPModel], objective: Callable[..., PatchMetricObjective], metric: str
) -> None:
    model = load_clip()
    model.vision_model.encoder.layers[2].mlp.fc1.weight.data.fill_(torch.nan)
    assert np.isnan(objective(metric).losses(model).total)


def log_odds(logits: Tensor) -> NDArray[np.float64]:
    """Of the likeliest class, which rank as MCM does and do not round where it is near 1."""
    top = logits.sort(-1, descending=True).values
    return (top[:, 0] - top[:, 1:].logsumexp(-1)).numpy()


@pytest.mark.parametrize("metric", ["auroc", "fpr95"])
def test_is_minimised_by_a_search_whatever_the_batches(
    load_clip: Callable[..., CLIPModel], objective: Callable[..., PatchMetricObjective], metric: str
) -> None:
    results = [search_rank_ratios(load_clip(), objective(metric, size), progress=False) for size in (24, 7)]
    assert results[0].rank_ratios == results[1].rank_ratios
    assert results[0].trace.rows[-1].total_loss < results[0].trace.initial.total
    assert results[0].trace.settings["objective"]["metric"] == metric


def test_an_unknown_metric_gets_a_sentence(objective: Callable[..., PatchMetricObjective]) -> None:
    with pytest.raises(ValueError, match="metric is 'f1'; give 'auroc' or 'fpr95'"):
        objective("f1")

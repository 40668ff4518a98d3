"""Resampled figures against scikit-learn on the images drawn, and intervals against a known distribution."""

from __future__ import annotations

from math import erf
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from setar_peft.detection.bootstrap import Interval, drawn, resample
from setar_peft.detection.metrics import fpr_at_tpr


def images_of(seed: int, place: int, size: int, resamples: int) -> list[np.ndarray]:
    """The images of each resample, as `resample` draws them."""
    generator = np.random.default_rng([seed, place])
    return [np.repeat(np.arange(size), drawn(generator, size)) for _ in range(resamples)]


@pytest.mark.parametrize("levels", [7, 10**6])
@pytest.mark.parametrize("positive", ["id", "ood"])
@pytest.mark.parametrize("threshold", ["at_least", "closest"])
@pytest.mark.parametrize("tpr", [0.95, 0.03, 1.0])
def test_figures_are_those_of_the_images_drawn(levels: int, positive: Any, threshold: Any, tpr: float) -> None:
    """Also where scores are equal, within a side and between the two."""
    generator = np.random.default_rng(0)
    id_scores = [generator.integers(0, levels, size=37).astype(np.float32) + levels // 5 for _ in range(2)]
    sets = {
        name: [generator.integers(0, levels, size=size).astype(np.float32) for _ in range(2)]
        for name, size in (("one", 23), ("other", 41))
    }
    conventions: dict[str, Any] = {"positive": positive, "threshold": threshold, "tpr": tpr}
    found = resample(id_scores, sets, **conventions, resamples=12, seed=3)
    assert found.fpr.shape == found.auroc.shape == (12, 2, 2)
    id_images = images_of(3, 0, 37, 12)
    for place, side in enumerate(sets.values()):
        for number, images in enumerate(images_of(3, place + 1, len(side[0]), 12)):
            for column in range(2):
                known, unknown = id_scores[column][id_images[number]], side[column][images]
                is_id = np.repeat([1, 0], [len(known), len(unknown)])
                expected = roc_auc_score(is_id, np.concatenate([known, unknown]))
                assert found.auroc[number, place, column] == pytest.approx(expected, abs=1e-12)
                assert found.fpr[number, place, column] == fpr_at_tpr(known, unknown, **conventions).fpr


def test_draws_are_those_of_the_seed_and_do_not_depend_on_later_sets() -> None:
    generator = np.random.default_rng(0)
    known, one, other = (generator.normal(size=size) for size in (50, 40, 30))
    alone = resample([known], {"one": [one]}, resamples=20)
    again = resample([known], {"one": [one], "other": [other]}, resamples=20)
    assert np.array_equal(alone.auroc[:, 0], again.auroc[:, 0])
    assert not np.array_equal(alone.auroc, resample([known], {"one": [one]}, resamples=20, seed=1).auroc)


def test_equal_columns_differ_by_nothing() -> None:
    generator = np.random.default_rng(0)
    known, unknown = generator.normal(1, 1, size=300), generator.normal(size=200)
    found = resample([known, known.copy()], {"set": [unknown, unknown.copy()]}, resamples=50)
    for figures in found:
        assert Interval.of(figures[:, 0, 0] - figures[:, 0, 1]) == (0.0, 0.0)
        assert Interval.of(figures[:, 0, 0]).low < Interval.of(figures[:, 0, 0]).high


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    generator = np.random.default_rng(0)
    known, unknown = generator.normal(1, 1, size=400), generator.normal(size=400)
    better = known + 0.1 + generator.normal(scale=0.05, size=400)
    paired = resample([better, known], {"set": [unknown, unknown]}, resamples=300).auroc[:, 0]
    apart = resample([known], {"set": [unknown]}, resamples=300, seed=1).auroc[:, 0]
    difference, unpaired = Interval.of(paired[:, 0] - paired[:, 1]), Interval.of(paired[:, 0] - apart[:, 0])
    assert difference.low > 0 > unpaired.low
    assert difference.high - difference.low < (unpaired.high - unpaired.low) / 3


def test_intervals_of_95_percent_hold_the_truth_in_about_95_percent() -> None:
    """Normal scores one apart: AUROC is Phi(1 / sqrt(2)), and FPR95 is Phi(1.645 - 1)."""
    truth = {"auroc": (1 + erf(1 / 2)) / 2, "fpr": (1 + erf((1.6448536 - 1) / 2**0.5)) / 2}
    held = dict.fromkeys(truth, 0)
    generator = np.random.default_rng(0)
    trials = 200
    for trial in range(trials):
        known, unknown = generator.normal(1, 1, size=400), generator.normal(size=300)
        found = resample([known], {"set": [unknown]}, resamples=200, seed=trial)
        for figure, value in truth.items():
            low, high = Interval.of(getattr(found, figure)[:, 0, 0])
            held[figure] += low <= value <= high
    for figure, times in held.items():
        # Four standard deviations of a binomial with p = 0.95 about its mean.
        assert abs(times / trials - 0.95) < 4 * (0.95 * 0.05 / trials) ** 0.5, figure


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        ({"resamples": 0}, ["resamples is 0", "positive number"]),
        ({"ood_scores": {"set": [np.ones(3), np.ones(2)]}}, ["set has columns of [3, 2] scores", "the same images"]),
        ({"ood_scores": {"set": [np.ones(3)]}}, ["set has columns of [3]", "2 columns"]),
        ({"id_scores": [np.ones(3), np.array([1.0, np.nan])]}, ["id_scores hold NaN or infinity in 1 of 2"]),
    ],
)
def test_wrong_input_gets_a_sentence(arguments: dict[str, Any], pieces: list[str]) -> None:
    given = {"id_scores": [np.ones(4), np.zeros(4)], "ood_scores": {"set": [np.ones(3), np.ones(3)]}, **arguments}
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the pieces are looked at below
        resample(**given)
    for piece in pieces:
        assert piece in str(raised.value)

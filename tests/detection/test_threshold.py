from __future__ import annotations

import math
import re
import warnings

import numpy as np
import pytest

from setar_peft.detection.metrics import fpr_at_tpr
from setar_peft.detection.threshold import Threshold, kept


def few(*args: object) -> Threshold:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Threshold.of(*args)  # type: ignore[arg-type]


def test_it_keeps_the_share_that_was_asked_for_and_no_more_than_it_must() -> None:
    scores = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    for tpr in (0.5, 0.9, 0.95, 0.951, 1.0):
        threshold = few(scores, tpr)
        assert (scores >= threshold.value).mean() >= tpr
        stricter = np.nextafter(np.float32(threshold.value), np.float32(np.inf))
        assert (scores >= stricter).mean() < tpr


def test_it_is_the_threshold_of_the_metrics() -> None:
    scores = np.random.default_rng(1).normal(size=400).astype(np.float32)
    assert few(scores, 0.95).value == fpr_at_tpr(scores, [-10.0, 10.0], 0.95).threshold


@pytest.mark.parametrize(
    ("n", "tpr", "expected"), [(20, 0.95, 19), (21, 0.95, 20), (1, 0.5, 1), (100, 0.07, 7), (3, 1, 3)]
)
def test_how_many_are_kept(n: int, tpr: float, expected: int) -> None:
    """Also where the product is a whole number but for rounding: 100 * 0.07 is 7.000000000000001."""
    assert kept(n, tpr) == expected


def test_equal_scores_are_kept_together() -> None:
    threshold = few([1.0] * 50 + [2.0] * 50, 0.95)
    assert threshold.value == 1.0


def test_the_interval_holds_the_share_that_is_realised() -> None:
    """Drawn from a known distribution: the share above the threshold is a tail of the normal distribution."""
    generator = np.random.default_rng(2)
    inside, realised = 0, []
    for _ in range(2000):
        threshold = Threshold.of(generator.normal(size=300), 0.95)
        share = 0.5 * math.erfc(threshold.value / math.sqrt(2))
        assert threshold.interval is not None
        inside += threshold.interval[0] <= share <= threshold.interval[1]
        realised.append(share)
    # 95 %, within three standard deviations of 2,000 draws.
    assert abs(inside / 2000 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 2000)
    assert np.mean(realised) == pytest.approx(285 / 301, abs=1e-3)


@pytest.mark.parametrize(("n", "points"), [(200, 1.5), (1000, 0.7)])
def test_the_deviation_of_the_docstring(n: int, points: float) -> None:
    threshold = Threshold.of(np.random.default_rng(3).normal(size=n), 0.95)
    assert threshold.interval is not None
    deviation = (threshold.interval[1] - threshold.interval[0]) / (2 * 1.96)
    assert 100 * deviation == pytest.approx(points, abs=0.1)


def test_few_inputs_are_said() -> None:
    with pytest.warns(
        UserWarning,
        match=r"199 ID inputs are few for a level of 0.95.*between 9\d.\d% and 9\d.\d% of.*From 200 inputs on",
    ):
        Threshold.of(np.random.default_rng(4).normal(size=199), 0.95)
    Threshold.of(np.random.default_rng(4).normal(size=200), 0.95)


@pytest.mark.parametrize(
    ("scores", "tpr", "said"),
    [
        ([], 0.95, "at least one score"),
        ([[1.0]], 0.95, "shape (1, 1)"),
        ([1.0, math.nan], 0.95, "1 of 2 ID scores are NaN"),
        ([1.0], 0, "tpr is 0"),
        ([1.0], 95, "tpr is 95"),
        ([1.0], True, "tpr is True"),
        ([1.0], math.nan, "tpr is nan"),
    ],
)
def test_bad_input(scores: object, tpr: float, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Threshold.of(scores, tpr)


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.5", True, None])
def test_a_threshold_is_a_number(value: object) -> None:
    with pytest.raises(ValueError, match="finite number in the units of the score"):
        Threshold(value)  # type: ignore[arg-type]


def test_it_says_what_it_is() -> None:
    text = str(Threshold.of(np.arange(1000, dtype=np.float32), 0.95))
    assert "50" in text
    assert "95.0% of 1000 held-out ID inputs" in text
    assert str(Threshold(0.25)) == "0.25, set by hand"


def test_numbers_of_numpy_are_numbers() -> None:
    """A threshold out of an array of scores, and one that goes into a file."""
    threshold = Threshold(np.float32(0.5))
    assert (threshold.value, type(threshold.value)) == (0.5, float)
    assert type(Threshold.of(np.arange(20.0), np.float32(0.5)).tpr) is float
    for value in (True, "0.5", np.float32(np.nan)):
        with pytest.raises(ValueError, match="give a finite number in the units of the score"):
            Threshold(value)  # type: ignore[arg-type]

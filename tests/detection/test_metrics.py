"""Metrics against the published figures, counting by hand, and the paper's Table 1 on its authors' scores."""

from __future__ import annotations

import dataclasses
import doctest
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import published_scores
from benchmarks.published_scores import TABLES_1_AND_15, PublishedRow, evaluated
from setar_peft.detection import metrics
from setar_peft.detection.metrics import (
    accuracy,
    aupr_in,
    aupr_out,
    auroc,
    detection_accuracy,
    fpr_at_tpr,
    ood_metrics,
)
from tests.refusals import message_of

if TYPE_CHECKING:
    from pathlib import Path

SETS = ("iNaturalist", "Sun", "Places", "Texture")


def coarse_scores(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Small sets of either size whose scores are often equal, within a set and between the two."""
    generator = np.random.default_rng(seed)
    id_size, ood_size = generator.integers(1, 40, size=2)
    levels = generator.integers(1, 25)
    id_scores = generator.integers(0, levels, size=id_size) + 2
    return id_scores / 8, generator.integers(0, levels, size=ood_size) / 8


def share_found(scores: np.ndarray, threshold: float) -> float:
    return sum(bool(score >= threshold) for score in scores) / len(scores)


def counted_threshold(positives: np.ndarray, negatives: np.ndarray, tpr: float, rule: str) -> float:
    """The threshold of either rule by trying every score that occurs."""
    candidates = sorted({*positives.tolist(), *negatives.tolist()})
    if rule == "at_least":
        return max(value for value in candidates if share_found(positives, value) >= tpr)
    start = max(value for value in candidates if share_found(positives, value) == 1)
    return min(
        (value for value in candidates if value >= start),
        key=lambda value: (abs(share_found(positives, value) - tpr), value),
    )


def counted_curve(positives: np.ndarray, negatives: np.ndarray) -> list[tuple[float, float]]:
    """(recall, precision) at every score that occurs, from the highest down."""
    curve = []
    for value in sorted({*positives.tolist(), *negatives.tolist()}, reverse=True):
        true, false = (positives >= value).sum(), (negatives >= value).sum()
        curve.append((true / len(positives), true / (true + false)))
    return curve


@pytest.mark.parametrize(("backbone", "temperature"), [("clip", 1), ("clip", 100), ("swin", 1)])
def test_published_figures(golden: Path, backbone: str, temperature: int) -> None:
    tensors = load_file(golden / f"tensors_{backbone}_tiny.safetensors")
    names = [key for key in tensors if key.startswith(f"metrics.T{temperature}.")]
    assert len(names) == 6
    for key in names:
        scores = -tensors[key.replace("metrics", "score")]
        ours = ood_metrics(scores[:12], scores[12:], threshold="closest")
        published_auroc, published_aupr, published_fpr, published_threshold = tensors[key].tolist()
        assert 100 * ours.auroc == pytest.approx(published_auroc, abs=1e-10), key
        assert 100 * ours.aupr_in == pytest.approx(published_aupr, abs=1e-10), key
        assert 100 * ours.fpr == pytest.approx(published_fpr, abs=1e-10), key
        assert ours.threshold == published_threshold, key


def test_figures_tell_the_published_conventions_from_their_neighbours(golden: Path) -> None:
    """The comparison above would see the trapezoid, the other positive class and the other threshold rule."""
    tensors = load_file(golden / "tensors_swin_tiny.safetensors")
    scores = -tensors["score.T1.mcm_score"]
    id_scores, ood_scores = scores[:12], scores[12:]
    _, published_aupr, _, published_threshold = tensors["metrics.T1.mcm_score"].tolist()
    assert abs(100 * aupr_in(id_scores, ood_scores, area="trapezoid") - published_aupr) > 1
    assert abs(100 * aupr_out(id_scores, ood_scores) - published_aupr) > 1
    assert abs(fpr_at_tpr(id_scores, ood_scores).threshold - published_threshold) > 0.05


@pytest.mark.shared_data
@pytest.mark.parametrize("row", TABLES_1_AND_15, ids=lambda row: f"{row.id_set} {row.method}")
def test_tables_1_and_15_from_the_authors_scores(shared_data: Path, row: PublishedRow) -> None:
    found = evaluated(row, shared_data / "scores")
    assert {name: (f"{fpr:.2f}", f"{area:.2f}") for name, (fpr, area) in found.items()} == {
        name: (f"{fpr:.2f}", f"{area:.2f}") for name, (fpr, area) in row.figures.items()
    }


@pytest.mark.shared_data
def test_the_command_prints_the_tables(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SETAR_DATA", str(shared_data))
    published_scores.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * (3 * 5 + 2 * 7) + 1
    assert lines[1].split()[-3:] == ["26.92", "26.92", lines[1].split()[-1]]
    assert "Largest difference: 0.00" in lines[-1]


@pytest.mark.shared_data
def test_the_positive_class_turns_the_ranking_of_methods_around(shared_data: Path) -> None:
    """Why a metric names its convention: on the authors' scores GL-MCM beats MCM with ID positive alone."""
    average = {}
    with np.load(shared_data / "scores" / "clip_base_imagenet1k_setar.npz") as published:
        for score in ("mcm_score", "gl_mcm_score"):
            for positive in ("id", "ood"):
                fprs = [
                    fpr_at_tpr(
                        -published[f"ID_ImageNet1K/{score}"],
                        -published[f"OOD_{ood}/{score}"],
                        positive=positive,
                    ).fpr
                    for ood in SETS
                ]
                average[score, positive] = sum(fprs) / 4
    assert average["gl_mcm_score", "id"] < average["mcm_score", "id"] - 0.05
    assert average["gl_mcm_score", "ood"] > average["mcm_score", "ood"] + 0.02


def test_example_in_the_documentation() -> None:
    assert doctest.testmod(metrics) == (0, 2)


def test_worked_example() -> None:
    id_scores = [0.9, 0.8, 0.7, 0.6]
    ood_scores = [0.85, 0.65, 0.5, 0.4, 0.3]
    # All four ID inputs are at 0.6 or above, and so are 0.85 and 0.65.
    assert fpr_at_tpr(id_scores, ood_scores) == (2 / 5, 1.0, 0.6)
    # Three of four at 0.7; recall 0.75 also holds down to 0.65, an OOD score, which "closest" prefers.
    assert fpr_at_tpr(id_scores, ood_scores, 0.75) == (1 / 5, 0.75, 0.7)
    assert fpr_at_tpr(id_scores, ood_scores, 0.75, threshold="closest") == (2 / 5, 0.75, 0.65)
    # OOD positive: all five are at 0.85 or below, with three of the ID side; four at 0.65, with one.
    assert fpr_at_tpr(id_scores, ood_scores, positive="ood") == (3 / 4, 1.0, 0.85)
    assert fpr_at_tpr(id_scores, ood_scores, 0.8, positive="ood") == (1 / 4, 0.8, 0.65)
    # Of the 20 pairs, 0.9 wins five, 0.8 and 0.7 all but that with 0.85, and 0.6 loses to 0.65 too.
    assert auroc(id_scores, ood_scores) == pytest.approx((5 + 4 + 4 + 3) / 20)
    # Precision as recall reaches each quarter: 1/1, 2/3, 3/4, 4/6.
    assert aupr_in(id_scores, ood_scores) == pytest.approx((1 + 2 / 3 + 3 / 4 + 4 / 6) / 4)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("rule", ["at_least", "closest"])
@pytest.mark.parametrize("positive", ["id", "ood"])
def test_thresholds_by_counting(seed: int, rule, positive) -> None:
    id_scores, ood_scores = coarse_scores(seed)
    sides = (id_scores, ood_scores) if positive == "id" else (-ood_scores, -id_scores)
    for tpr in (0.01, 0.5, 0.9, 0.95, 1.0):
        expected = counted_threshold(*sides, tpr, rule)
        point = fpr_at_tpr(id_scores, ood_scores, tpr, positive=positive, threshold=rule)
        assert point.threshold == (expected if positive == "id" else -expected)
        assert point.tpr == share_found(sides[0], expected)
        assert point.fpr == share_found(sides[1], expected)


@pytest.mark.parametrize("seed", range(40))
def test_areas_by_counting(seed: int) -> None:
    id_scores, ood_scores = coarse_scores(seed)
    wins = sum((a > b) + 0.5 * (a == b) for a in id_scores for b in ood_scores)
    assert auroc(id_scores, ood_scores) == pytest.approx(wins / (len(id_scores) * len(ood_scores)))
    for area, sides in ((aupr_in, (id_scores, ood_scores)), (aupr_out, (-ood_scores, -id_scores))):
        curve = counted_curve(*sides)
        previous = [(0.0, 1.0), *curve[:-1]]
        steps = sum((recall - last) * precision for (recall, precision), (last, _) in zip(curve, previous, strict=True))
        lines = sum(
            (recall - last) * (precision + last_precision) / 2
            for (recall, precision), (last, last_precision) in zip(curve, previous, strict=True)
        )
        assert area(id_scores, ood_scores) == pytest.approx(steps)
        assert area(id_scores, ood_scores, area="trapezoid") == pytest.approx(lines)


@pytest.mark.parametrize("seed", range(40))
def test_detection_accuracy_by_counting(seed: int) -> None:
    id_scores, ood_scores = coarse_scores(seed)

    def told_right(threshold: float) -> float:
        return (share_found(id_scores, threshold) + 1 - share_found(ood_scores, threshold)) / 2

    best = detection_accuracy(id_scores, ood_scores)
    candidates = [*id_scores.tolist(), *ood_scores.tolist(), math.inf]
    assert best.accuracy == pytest.approx(max(map(told_right, candidates)))
    assert told_right(best.threshold) == pytest.approx(best.accuracy)
    assert best.accuracy >= 0.5


@pytest.mark.parametrize("positive", ["id", "ood"])
def test_accuracy_at_the_threshold_by_counting(positive) -> None:
    id_scores, ood_scores = coarse_scores(3)
    found = ood_metrics(id_scores, ood_scores, positive=positive)
    # Where OOD is the positive class, an input at the threshold is taken for OOD.
    taken_for_id = (lambda s: s >= found.threshold) if positive == "id" else (lambda s: s > found.threshold)
    expected = (taken_for_id(id_scores).mean() + 1 - taken_for_id(ood_scores).mean()) / 2
    assert found.accuracy_at_threshold == pytest.approx(expected)
    assert found.accuracy_at_threshold <= found.detection_accuracy


def test_level_is_met_exactly() -> None:
    """19 of 20 is 95%: the twentieth must not be taken in because of a rounding of 0.95."""
    for size in (20, 40, 100, 1000, 50_000):
        id_scores = np.arange(size)
        point = fpr_at_tpr(id_scores, [-1.0])
        assert point.threshold == size // 20
        assert point.tpr == 0.95


def test_dropped_points_of_the_curve_would_be_missed(monkeypatch) -> None:
    """Scikit-learn's default leaves out points on straight pieces; the threshold may be one of them."""
    id_scores, ood_scores = np.arange(100.0, 200.0), np.arange(0.0, 100.0)
    assert fpr_at_tpr(id_scores, ood_scores, 0.95).threshold == 105.0
    whole_curve = metrics.roc_curve
    monkeypatch.setattr(
        metrics, "roc_curve", lambda *args, drop_intermediate: whole_curve(*args, drop_intermediate=True)
    )
    assert fpr_at_tpr(id_scores, ood_scores, 0.95).threshold == 100.0


@pytest.mark.parametrize("rule", ["at_least", "closest"])
@pytest.mark.parametrize("positive", ["id", "ood"])
def test_extremes(rule, positive) -> None:
    def figures(id_scores, ood_scores):
        return ood_metrics(id_scores, ood_scores, positive=positive, threshold=rule)

    apart = figures([3.0, 2.0], [1.0, 0.0])
    assert (apart.fpr, apart.auroc, apart.aupr_in, apart.aupr_out) == (0, 1, 1, 1)
    wrong_way = figures([1.0, 0.0], [3.0, 2.0])
    assert (wrong_way.fpr, wrong_way.auroc) == (1, 0)
    all_equal = figures([1.0] * 3, [1.0])
    assert (all_equal.fpr, all_equal.auroc, all_equal.aupr_in, all_equal.aupr_out) == (1, 0.5, 0.75, 0.25)
    one_each = figures([1.0], [0.0])
    assert (one_each.fpr, one_each.auroc) == (0, 1)
    assert one_each.threshold == (1.0 if positive == "id" else 0.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rule", ["at_least", "closest"])
@pytest.mark.parametrize("positive", ["id", "ood"])
def test_only_the_order_of_scores_counts(seed: int, rule, positive) -> None:
    id_scores, ood_scores = coarse_scores(seed)
    plain = ood_metrics(id_scores, ood_scores, positive=positive, threshold=rule)
    stretched = ood_metrics(np.exp(id_scores), np.exp(ood_scores), positive=positive, threshold=rule)
    assert stretched.threshold == np.exp(plain.threshold)
    assert dataclasses.replace(stretched, threshold=plain.threshold) == plain
    reordered = ood_metrics(id_scores[::-1].copy(), np.sort(ood_scores), positive=positive, threshold=rule)
    assert reordered == plain


@pytest.mark.parametrize("seed", range(5))
def test_swapping_roles(seed: int) -> None:
    """Turning the sign and swapping the sides asks the same question from the other side."""
    id_scores, ood_scores = coarse_scores(seed)
    here = ood_metrics(id_scores, ood_scores, positive="ood")
    there = ood_metrics(-ood_scores, -id_scores, positive="id")
    assert here.fpr == there.fpr
    assert here.threshold == -there.threshold
    assert here.auroc == pytest.approx(there.auroc)
    assert (here.aupr_in, here.aupr_out) == (there.aupr_out, there.aupr_in)
    assert auroc(id_scores, ood_scores) == pytest.approx(1 - auroc(ood_scores, id_scores))


def test_positive_class_leaves_the_areas_and_moves_the_false_positive_rate() -> None:
    id_scores, ood_scores = coarse_scores(2)
    by_id, by_ood = (ood_metrics(id_scores, ood_scores, positive=side) for side in ("id", "ood"))
    assert by_id.auroc == by_ood.auroc
    assert by_id.aupr_in == by_ood.aupr_in
    assert by_id.aupr_out == by_ood.aupr_out
    assert by_id.fpr != by_ood.fpr


@pytest.mark.parametrize("rule", ["at_least", "closest"])
@pytest.mark.parametrize("positive", ["id", "ood"])
def test_all_figures_are_the_single_ones_and_name_their_convention(rule, positive) -> None:
    id_scores, ood_scores = coarse_scores(7)
    figures = ood_metrics(id_scores, ood_scores, positive=positive, threshold=rule, tpr=0.8)
    point = fpr_at_tpr(id_scores, ood_scores, 0.8, positive=positive, threshold=rule)
    assert dataclasses.asdict(figures) == {
        "fpr": point.fpr,
        "auroc": auroc(id_scores, ood_scores),
        "aupr_in": aupr_in(id_scores, ood_scores),
        "aupr_out": aupr_out(id_scores, ood_scores),
        "detection_accuracy": detection_accuracy(id_scores, ood_scores).accuracy,
        "accuracy_at_threshold": (point.tpr + 1 - point.fpr) / 2,
        "threshold": point.threshold,
        "positive": positive,
        "threshold_rule": rule,
        "tpr": 0.8,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        figures.fpr = 0.0
    assert all(type(value) in (float, str) for value in dataclasses.asdict(figures).values())


@pytest.mark.parametrize(
    "convert",
    [
        lambda scores: scores.tolist(),
        lambda scores: tuple(scores.tolist()),
        lambda scores: scores.numpy(),
        lambda scores: scores.double().numpy(),
        lambda scores: scores.bfloat16(),
        lambda scores: scores.clone().requires_grad_(),
    ],
    ids=["list", "tuple", "numpy32", "numpy64", "bfloat16", "grad"],
)
def test_any_kind_of_array(convert) -> None:
    id_scores, ood_scores = (torch.from_numpy(scores).float() for scores in coarse_scores(3))
    expected = ood_metrics(id_scores, ood_scores)
    assert ood_metrics(convert(id_scores), convert(ood_scores)) == expected


def test_float32_ties_stay_ties_and_neighbours_stay_apart() -> None:
    third = torch.tensor([1 / 3], dtype=torch.float32)
    next_up = torch.nextafter(third, torch.ones(1))
    assert auroc(third, third.clone()) == 0.5
    assert auroc(next_up, third) == 1.0
    assert auroc(third, next_up) == 0.0


def test_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 5, generator=generator)
    labels = torch.randint(5, (200,), generator=generator)
    counted = sum(row.index(max(row)) == label for row, label in zip(logits.tolist(), labels.tolist(), strict=True))
    assert accuracy(logits, labels) == counted / 200
    for dtype in (torch.int32, torch.uint8):
        assert accuracy(logits, labels.to(dtype)) == counted / 200
    assert accuracy(logits, logits.argmax(-1)) == 1.0
    assert accuracy(-logits[:1], logits[:1].argmax(-1)) == 0.0
    first_of_equals = torch.zeros(1, 3)
    assert accuracy(first_of_equals, torch.tensor([0])) == 1.0
    assert accuracy(first_of_equals, torch.tensor([1])) == 0.0


@pytest.mark.parametrize("function", [fpr_at_tpr, auroc, aupr_in, aupr_out, detection_accuracy, ood_metrics])
@pytest.mark.parametrize("side", ["id_scores", "ood_scores"])
def test_bad_scores(function, side: str) -> None:
    def message_for(scores) -> str:
        return message_of(function, **{"id_scores": [1.0, 2.0], "ood_scores": [0.0], side: scores})

    empty = message_for([])
    assert f"{side} are empty" in empty
    assert "at least one score" in empty
    flat = message_for(torch.zeros(3, 1))
    assert f"{side} have shape (3, 1)" in flat
    assert "(n,)" in flat
    for broken in (math.nan, math.inf, -math.inf):
        message = message_for([1.0, broken, broken])
        assert f"{side} hold NaN or infinity in 2 of 3 places" in message
        assert "overflow" in message


@pytest.mark.parametrize("function", [fpr_at_tpr, ood_metrics])
@pytest.mark.parametrize("tpr", [0.0, -0.5, 1.01, 95, math.nan])
def test_bad_level(function, tpr: float) -> None:
    message = message_of(function, [1.0], [0.0], tpr=tpr)
    assert f"tpr is {tpr!r}" in message
    assert "(0, 1]" in message
    assert "0.95" in message


@pytest.mark.parametrize("function", [fpr_at_tpr, ood_metrics])
def test_unknown_conventions(function) -> None:
    message = message_of(function, [1.0], [0.0], positive="OOD")
    assert "positive is 'OOD'" in message
    assert "'id', 'ood'" in message
    message = message_of(function, [1.0], [0.0], threshold="nearest")
    assert "threshold is 'nearest'" in message
    assert "'at_least', 'closest'" in message


@pytest.mark.parametrize("function", [aupr_in, aupr_out])
def test_unknown_area(function) -> None:
    message = message_of(function, [1.0], [0.0], area="simpson")
    assert "area is 'simpson'" in message
    assert "'average_precision', 'trapezoid'" in message


def test_bad_labels() -> None:
    logits = torch.zeros(4, 3)
    for labels in (torch.zeros(3, dtype=torch.int64), torch.zeros(4, 1, dtype=torch.int64)):
        message = message_of(accuracy, logits, labels)
        assert "logits have shape (4, 3)" in message
        assert f"labels {tuple(labels.shape)}" in message
        assert "(n, classes) and (n,)" in message
    assert "(0, 3)" in message_of(accuracy, logits[:0], torch.zeros(0, dtype=torch.int64))
    for dtype in (torch.float32, torch.bool):
        message = message_of(accuracy, logits, torch.zeros(4, dtype=dtype))
        assert f"labels have dtype {dtype}" in message
        assert "integers" in message
    for labels in (torch.tensor([0, 1, 2, 3]), torch.tensor([-1, 0, 1, 2])):
        message = message_of(accuracy, logits, labels)
        assert f"labels run from {int(labels.min())} to {int(labels.max())}" in message
        assert "3 classes" in message
        assert "from 0 to 2" in message
    message = message_of(accuracy, logits.index_fill(0, torch.tensor([2]), math.nan), torch.zeros(4).long())
    assert "NaN in 1 of 4 images" in message

"""How well a score tells in-distribution (ID) from out-of-distribution (OOD) inputs, and top-1 accuracy.

Scores are higher for ID. Every figure is a share in [0, 1] and names its convention, because conventions move
it: which side is the positive class, how the threshold is chosen, how the area under a curve is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from torch import Tensor

Scores: TypeAlias = Tensor | NDArray[Any] | Sequence[float]
Positive = Literal["id", "ood"]
ThresholdRule = Literal["at_least", "closest"]
AreaRule = Literal["average_precision", "trapezoid"]


class OperatingPoint(NamedTuple):
    """A threshold on the score and what it does.

    Attributes:
        fpr: Share of the negative class taken for positive, in [0, 1].
        tpr: Share of the positive class found there, in (0, 1]; "closest" may fall short of the level asked.
        threshold: In the units of the score, whichever class is positive: an input is taken for ID at
            score >= threshold where ID is the positive class, for OOD at score <= threshold where OOD is.
    """

    fpr: float
    tpr: float
    threshold: float


class DetectionAccuracy(NamedTuple):
    """How many inputs a threshold tells right.

    Attributes:
        accuracy: Mean of the shares of ID inputs at or above the threshold and of OOD inputs below it, in [0, 1].
        threshold: In the units of the score.
    """

    accuracy: float
    threshold: float


@dataclass(frozen=True)
class OODMetrics:
    """The figures of one score on one pair of sets, with the convention they were taken in.

    Attributes:
        fpr: False-positive rate at the level `tpr`, in [0, 1]; FPR95 where that is 0.95.
        auroc: Area under the ROC curve, in [0, 1]; the same whichever class is positive.
        aupr_in: Average precision with ID as the positive class, in [0, 1].
        aupr_out: Average precision with OOD as the positive class, in [0, 1].
        detection_accuracy: Mean of the shares of ID and of OOD inputs that are told right, at the threshold that tells
            most, in [0.5, 1]; see `detection_accuracy`.
        accuracy_at_threshold: The same mean at the threshold where `fpr` was read off, in [0, 1].
        threshold: Where `fpr` was read off, in the units of the score; see `OperatingPoint`.
        positive: The positive class of `fpr`, "id" or "ood".
        threshold_rule: How the threshold was chosen, "at_least" or "closest".
        tpr: The level asked for.
    """

    fpr: float
    auroc: float
    aupr_in: float
    aupr_out: float
    detection_accuracy: float
    accuracy_at_threshold: float
    threshold: float
    positive: Positive
    threshold_rule: ThresholdRule
    tpr: float


def fpr_at_tpr(
    id_scores: Scores,
    ood_scores: Scores,
    tpr: float = 0.95,
    *,
    positive: Positive = "id",
    threshold: ThresholdRule = "at_least",
) -> OperatingPoint:
    """False-positive rate at a true-positive rate; FPR95 at the default level (paper, section 4.1).

    Args:
        id_scores: Scores of ID inputs, (n,), higher meaning more in-distribution.
        ood_scores: Scores of OOD inputs, (m,).
        tpr: The level, 0 < tpr <= 1.
        positive: "id" gives the share of OOD inputs taken for ID while `tpr` of the ID inputs are kept, as in
            MCM, GL-MCM, LoCoOp and SeTAR. "ood" gives the share of ID inputs taken for OOD while `tpr` of the
            OOD inputs are found, as in OpenOOD and pytorch-ood.
        threshold: "at_least" is the strictest threshold that finds `tpr` or more of the positive class.
            "closest" is the rule of the published tables: among the scores that occur in either set, the one
            whose recall is nearest to `tpr`. Where several do equally well it takes the most lenient, which
            has the largest false-positive rate; but of those that find the whole positive class it only
            considers the strictest.

    Raises:
        ValueError: If a side is empty, not 1-D or not finite, the level is outside (0, 1], or a convention is
            unknown.
    """
    _check_choice("positive", positive, get_args(Positive))
    _check_choice("threshold", threshold, get_args(ThresholdRule))
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr is {tpr!r}; give the share of the positive class to find, in (0, 1], such as 0.95.")
    is_positive, scores = _ranked(id_scores, ood_scores, positive)
    # Dropping points that lie on a straight piece of the curve would drop candidates for the threshold.
    fprs, tprs, thresholds = roc_curve(is_positive, scores, drop_intermediate=False)
    # Index 0 is the threshold above every score, which is no rule's answer: it finds nothing.
    if threshold == "at_least":
        index = int(np.argmax(tprs >= tpr))
    else:
        strictest_with_all = int(np.argmax(tprs >= 1.0))
        from_lenient_to_strict = np.arange(strictest_with_all, 0, -1)
        index = int(from_lenient_to_strict[np.argmin(np.abs(tprs[from_lenient_to_strict] - tpr))])
    value = float(thresholds[index])
    return OperatingPoint(
        fpr=float(fprs[index]), tpr=float(tprs[index]), threshold=value if positive == "id" else -value
    )


def auroc(id_scores: Scores, ood_scores: Scores) -> float:
    """Area under the ROC curve: the chance that an ID input scores above an OOD input, ties counting half.

    It is the same whichever class is positive.

    Args:
        id_scores: Scores of ID inputs, (n,), higher meaning more in-distribution.
        ood_scores: Scores of OOD inputs, (m,).

    Returns:
        In [0, 1].

    Raises:
        ValueError: If a side is empty, not 1-D or not finite.
    """
    return float(roc_auc_score(*_ranked(id_scores, ood_scores, "id")))


def aupr_in(id_scores: Scores, ood_scores: Scores, *, area: AreaRule = "average_precision") -> float:
    """Area under the precision-recall curve with ID as the positive class.

    Args:
        id_scores: Scores of ID inputs, (n,), higher meaning more in-distribution.
        ood_scores: Scores of OOD inputs, (m,).
        area: "average_precision" is the step-wise sum of the published code. "trapezoid" joins the points of
            the curve by straight lines, as OpenOOD does, though precision does not move along a line.

    Returns:
        In [0, 1].

    Raises:
        ValueError: If a side is empty, not 1-D or not finite, or the rule is unknown.
    """
    return _area_under_precision_recall(id_scores, ood_scores, "id", area)


def aupr_out(id_scores: Scores, ood_scores: Scores, *, area: AreaRule = "average_precision") -> float:
    """Area under the precision-recall curve with OOD as the positive class; otherwise as `aupr_in`."""
    return _area_under_precision_recall(id_scores, ood_scores, "ood", area)


def detection_accuracy(id_scores: Scores, ood_scores: Scores) -> DetectionAccuracy:
    """The best that any threshold does where either side is equally likely: the mean of both sides' shares told right.

    One minus the detection error of Liang et al., 2018, https://arxiv.org/abs/1706.02690, section 4.2. The threshold is
    chosen with the OOD inputs at hand, so that the figure is a bound and nothing that a deployed threshold reaches.

    Args:
        id_scores: Scores of ID inputs, (n,), higher meaning more in-distribution.
        ood_scores: Scores of OOD inputs, (m,).

    Returns:
        At least 0.5, and the strictest of the best thresholds; infinity where it is best to reject everything.

    Raises:
        ValueError: If a side is empty, not 1-D or not finite.

    Example:
        >>> detection_accuracy([0.9, 0.8, 0.7, 0.6], [0.5, 0.65])
        DetectionAccuracy(accuracy=0.875, threshold=0.7)
    """
    # A point on a straight piece of the curve is no better than both its ends.
    fprs, tprs, thresholds = roc_curve(*_ranked(id_scores, ood_scores, "id"))
    told_right = (tprs + 1 - fprs) / 2
    best = int(np.argmax(told_right))
    return DetectionAccuracy(float(told_right[best]), float(thresholds[best]))


def ood_metrics(
    id_scores: Scores,
    ood_scores: Scores,
    *,
    positive: Positive = "id",
    threshold: ThresholdRule = "at_least",
    tpr: float = 0.95,
) -> OODMetrics:
    """Every figure of one score on one pair of sets.

    Args:
        id_scores: Scores of ID inputs, (n,), higher meaning more in-distribution.
        ood_scores: Scores of OOD inputs, (m,).
        positive: The positive class of the false-positive rate; see `fpr_at_tpr`.
        threshold: How its threshold is chosen; see `fpr_at_tpr`.
        tpr: Its level, 0 < tpr <= 1.

    Raises:
        ValueError: As `fpr_at_tpr`.

    Example:
        >>> ood_metrics([0.9, 0.8, 0.7, 0.6], [0.5, 0.65]).fpr
        0.5
    """
    # Once here, so that scores on another device travel once.
    id_scores, ood_scores = as_scores("id_scores", id_scores), as_scores("ood_scores", ood_scores)
    point = fpr_at_tpr(id_scores, ood_scores, tpr, positive=positive, threshold=threshold)
    return OODMetrics(
        fpr=point.fpr,
        auroc=auroc(id_scores, ood_scores),
        aupr_in=aupr_in(id_scores, ood_scores),
        aupr_out=aupr_out(id_scores, ood_scores),
        detection_accuracy=detection_accuracy(id_scores, ood_scores).accuracy,
        accuracy_at_threshold=(point.tpr + 1 - point.fpr) / 2,
        threshold=point.threshold,
        positive=positive,
        threshold_rule=threshold,
        tpr=tpr,
    )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy: the share of images whose largest logit is that of their label.

    Args:
        logits: (n, classes).
        labels: (n,) integers in [0, classes).

    Returns:
        In [0, 1]. Between equal logits the first class is the prediction.

    Raises:
        ValueError: If the shapes do not fit each other, there is no image, the labels are not integers or out
            of range, or a logit is not a number.
    """
    if logits.ndim != 2 or logits.shape[0] == 0 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; give (n, classes) "
            "and (n,) with n at least 1."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels have dtype {labels.dtype}; give integers, the index of each image's class.")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= logits.shape[1]:
        raise ValueError(
            f"labels run from {lowest} to {highest}, and logits have {logits.shape[1]} classes; give labels "
            f"from 0 to {logits.shape[1] - 1}."
        )
    broken = int(logits.isnan().any(-1).sum())
    if broken:
        raise ValueError(f"logits hold NaN in {broken} of {len(logits)} images; look for an overflow in the model.")
    return int((logits.argmax(-1) == labels.to(logits.device)).sum()) / len(logits)


def _area_under_precision_recall(id_scores: Scores, ood_scores: Scores, positive: Positive, area: AreaRule) -> float:
    _check_choice("area", area, get_args(AreaRule))
    is_positive, scores = _ranked(id_scores, ood_scores, positive)
    if area == "average_precision":
        return float(average_precision_score(is_positive, scores))
    precisions, recalls, _ = precision_recall_curve(is_positive, scores)
    return float(auc(recalls, precisions))


def _ranked(id_scores: Scores, ood_scores: Scores, positive: Positive) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Both sides for scikit-learn: which are positive, and scores that are higher for those; (n + m,)."""
    id_array, ood_array = as_scores("id_scores", id_scores), as_scores("ood_scores", ood_scores)
    is_id = np.repeat([1, 0], [len(id_array), len(ood_array)])
    scores = np.concatenate([id_array, ood_array])
    return (is_id, scores) if positive == "id" else (1 - is_id, -scores)


def as_scores(argument: str, scores: Scores) -> NDArray[np.float64]:
    """Scores as an array of float64, (n,), which holds every float32 and half-precision value as it is: ties stay ties.

    Args:
        argument: What they are called, for the error.
        scores: (n,).

    Raises:
        ValueError: If they are none, not 1-D or not finite.
    """
    if isinstance(scores, Tensor):
        array = scores.detach().to("cpu", torch.float64).numpy()
    else:
        array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{argument} have shape {array.shape}; give one score for each input, (n,).")
    if len(array) == 0:
        raise ValueError(f"{argument} are empty; give at least one score for each of the two sides.")
    broken = int(np.count_nonzero(~np.isfinite(array)))
    if broken:
        raise ValueError(
            f"{argument} hold NaN or infinity in {broken} of {len(array)} places; look for an overflow in the model."
        )
    return array


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} is {value!r}; write one of {', '.join(map(repr, choices))}.")

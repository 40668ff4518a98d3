"""The threshold of a detector, and how sure it is: from the scores of held-out in-distribution inputs."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from scipy.stats import beta

CONFIDENCE = 0.95
# Below this many inputs that the threshold would reject, one input more or less moves it visibly.
_FEWEST_REJECTED = 10


@dataclass(frozen=True)
class Threshold:
    """A threshold on a score: an input is taken for in-distribution (ID) at score >= `value`.

    Attributes:
        value: The threshold, in the units of the score.
        tpr: Share of ID inputs that was asked to be kept, 0 < tpr <= 1; None for a threshold set by hand.
        n: Held-out ID inputs that it was found on; 0 for one set by hand.
        interval: Where the share of ID inputs that it keeps in the long run lies, with probability `confidence`: from
            and to, in [0, 1]; None for one set by hand.
        confidence: That probability.
    """

    value: float
    tpr: float | None = None
    n: int = 0
    interval: tuple[float, float] | None = None
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        value: Any = self.value
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"The threshold is {self.value!r}; give a finite number in the units of the score.")
        # Figures come as numpy's numbers, too, which no JSON takes.
        object.__setattr__(self, "value", float(value))

    @classmethod
    def of(cls, id_scores: Any, tpr: float = 0.95) -> Threshold:
        """The strictest threshold that keeps a share of some ID inputs.

        That is the k-th largest score, k = ceil(tpr * n). The share of future ID inputs at or above it then follows
        Beta(k, n + 1 - k) where scores are continuous, and is larger where some are equal; its standard deviation is
        about sqrt(tpr * (1 - tpr) / n): 1.5 points at a level of 0.95 and n = 200, 0.7 at n = 1,000.

        Warns where n is too small for the level: where fewer than ten of the inputs would be rejected.

        Args:
            id_scores: Scores of ID inputs that nothing else was chosen on, (n,).
            tpr: The level, 0 < tpr <= 1.

        Raises:
            ValueError: If there are no scores, they are not finite, or the level is outside its range.
        """
        scores = np.asarray(id_scores, dtype=np.float32)
        check_level(tpr)
        tpr = float(tpr)
        if scores.ndim != 1 or not len(scores):
            raise ValueError(f"The ID scores have shape {scores.shape}; give at least one score, (n,).")
        broken = int(np.count_nonzero(~np.isfinite(scores)))
        if broken:
            raise ValueError(
                f"{broken} of {len(scores)} ID scores are NaN or infinite; look for an overflow in the model."
            )
        n = len(scores)
        k = kept(n, tpr)
        value = float(np.partition(scores, n - k)[n - k])
        tails = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
        low, high = (float(beta.ppf(tail, k, n + 1 - k)) for tail in tails)
        if n * (1 - tpr) < _FEWEST_REJECTED and tpr < 1:
            warnings.warn(
                f"{n} ID inputs are few for a level of {tpr:g}: the threshold keeps between {low:.1%} and {high:.1%} "
                f"of ID inputs in the long run (with probability {CONFIDENCE:g}). From "
                f"{math.ceil(_FEWEST_REJECTED / (1 - tpr))} inputs on it is sharper.",
                UserWarning,
                stacklevel=3,
            )
        return cls(value, tpr, n, (low, high))

    def __str__(self) -> str:
        if self.tpr is None or self.interval is None:
            return f"{self.value:.6g}, set by hand"
        return (
            f"{self.value:.6g}, which keeps {self.tpr:.1%} of {self.n} held-out ID inputs, and between "
            f"{self.interval[0]:.1%} and {self.interval[1]:.1%} of ID inputs in the long run (with probability "
            f"{self.confidence:g})"
        )


def kept(n: int, tpr: float) -> int:
    """How many of n ID inputs are to be kept at a level: the smallest number that is a share of `tpr` or more."""
    # What is a whole number but for rounding is that number: 0.95 * 20 is 19.
    return max(1, min(n, math.ceil(round(tpr * n, 9))))


def check_level(tpr: Any) -> None:
    """Raise a `ValueError` unless a level is in (0, 1]."""
    if isinstance(tpr, bool) or not isinstance(tpr, Real) or not 0 < float(tpr) <= 1:
        raise ValueError(f"tpr is {tpr!r}; give the share of ID inputs to be kept, 0 < tpr <= 1, such as 0.95.")

"""The greedy search (paper, Algorithm 1), apart from what a loss is and how it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from setar_peft.objectives.loss import LossValues
from setar_peft.search.plan import Steps


class Candidate(NamedTuple):
    """One evaluated candidate: a layer, its ratio, and the loss with that layer truncated."""

    layer: str
    rank_ratio: float
    losses: LossValues


class Decision(NamedTuple):
    """One step of the search.

    Attributes:
        layer: The layer that was decided.
        rank_ratio: The ratio chosen; 0 if no candidate was better.
        losses: The best losses so far, those of all decisions up to this one.
        candidates: Every candidate evaluated in the step.
    """

    layer: str
    rank_ratio: float
    losses: LossValues
    candidates: list[Candidate]


def total_loss(losses: LossValues) -> float:
    """The paper's criterion."""
    return losses.total


def greedy_search(
    steps: Steps,
    initial: LossValues,
    candidates: Callable[[str], Sequence[float]],
    evaluate: Callable[[str, Sequence[float]], Sequence[LossValues]],
    choose: Callable[[str, float], None],
    *,
    passes: int = 1,
    criterion: Callable[[LossValues], float] = total_loss,
) -> Iterator[Decision]:
    """Decide layer after layer; a candidate wins if its criterion is strictly lower than the best so far.

    The layer's present ratio is never evaluated: its loss is the best so far. A criterion that is not finite never
    wins.

    Args:
        steps: The layers that compete in each step (see `steps_of`).
        initial: Losses of the base.
        candidates: `layer -> ratios` to try, each above 0.
        evaluate: `(layer, ratios) -> losses`, each with that layer truncated by the ratio and all decided layers as
            decided. Ratio 0 stands for the untouched layer.
        choose: `(layer, ratio)`: makes a decision hold for all later evaluations.
        passes: Times to go through `steps`; a pass that changes nothing is the last.
        criterion: What is minimised.

    Yields:
        One decision a step.
    """
    best = initial
    ratios: dict[str, float] = {}
    for _ in range(passes):
        decided: set[str] = set()
        changed_in_pass = False
        settled = False
        for step in steps:
            competing = [layer for layer in step if layer not in decided]
            winner = Candidate(competing[0], ratios.get(competing[0], 0.0), best)
            tried: list[Candidate] = []
            if not settled:
                for layer in competing:
                    present = ratios.get(layer, 0.0)
                    others = [ratio for ratio in (0.0, *candidates(layer)) if ratio != present]
                    for ratio, losses in zip(others, evaluate(layer, others) if others else (), strict=True):
                        tried.append(Candidate(layer, ratio, losses))
                        value = criterion(losses)
                        if math.isfinite(value) and value < criterion(winner.losses):
                            winner = tried[-1]
            changed = winner.rank_ratio != ratios.get(winner.layer, 0.0)
            # Where all layers compete and none improves, the rest of the pass would evaluate the same candidates again.
            settled = len(step) > 1 and not changed
            best = winner.losses
            decided.add(winner.layer)
            ratios[winner.layer] = winner.rank_ratio
            if changed:
                changed_in_pass = True
                choose(winner.layer, winner.rank_ratio)
            yield Decision(winner.layer, winner.rank_ratio, best, tried)
        if not changed_in_pass:
            return

"""Which candidates are evaluated and which of them is taken, apart from what a loss is and how it is computed.

The greedy search (paper, Algorithm 1) evaluates every candidate of a layer. A screened one evaluates those that a
gradient predicts best; nothing is accepted on a prediction. With G = dL/dW, removing component i of W changes the loss
by about -sigma_i u_i^T G v_i, and a candidate by the sum over what it removes. For language models the idea is known:
Sreeram et al., 2025 (arXiv 2510.20800), choose matrices by the gradient of their singular values, Abbasi et al., 2026
(arXiv 2602.02848), components.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from setar_peft.objectives.loss import LossValues
from setar_peft.search.plan import Steps


class Candidate(NamedTuple):
    """One evaluated candidate: a layer, its ratio, and the loss with that layer truncated.

    Attributes:
        layer: The layer.
        rank_ratio: Its ratio.
        losses: The losses.
        trial: Number of the evaluation in which it was one of several changes at once; None for one that was alone.
    """

    layer: str
    rank_ratio: float
    losses: LossValues
    trial: int | None = None


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


def is_better(value: float, best: float) -> bool:
    """Whether a candidate wins: strictly lower; what is not finite never does."""
    return math.isfinite(value) and value < best


def greedy_search(
    steps_of_pass: Callable[[], Steps],
    initial: LossValues,
    candidates: Callable[[str], Sequence[float]],
    evaluate: Callable[[str, Sequence[float]], Mapping[float, LossValues]],
    choose: Callable[[str, float], None],
    *,
    passes: int = 1,
    criterion: Callable[[LossValues], float] = total_loss,
) -> Iterator[Decision]:
    """Decide layer after layer; a candidate wins if its criterion is strictly lower than the best so far.

    The layer's present ratio is never evaluated: its loss is the best so far. A criterion that is not finite never
    wins.

    Args:
        steps_of_pass: Asked at the beginning of each pass: the layers that compete in each of its steps (see
            `plan.steps_of`).
        initial: Losses of the base.
        candidates: `layer -> ratios` to try, each above 0.
        evaluate: `(layer, ratios) -> ratio -> losses` of all these ratios, or of some: each with that layer truncated
            by the ratio and all decided layers as decided. Ratio 0 stands for the untouched layer.
        choose: `(layer, ratio)`: makes a decision hold for all later evaluations.
        passes: Times to go through the steps; a pass that changes nothing is the last.
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
        for step in steps_of_pass():
            competing = [layer for layer in step if layer not in decided]
            winner = Candidate(competing[0], ratios.get(competing[0], 0.0), best)
            tried: list[Candidate] = []
            if not settled:
                for layer in competing:
                    present = ratios.get(layer, 0.0)
                    others = [ratio for ratio in (0.0, *candidates(layer)) if ratio != present]
                    for ratio, losses in (evaluate(layer, others) if others else {}).items():
                        tried.append(Candidate(layer, ratio, losses))
                        if is_better(criterion(losses), criterion(winner.losses)):
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


class Prediction(NamedTuple):
    """What a gradient says of giving one layer another ratio than its present one.

    Attributes:
        change: Change of what is minimised, to first order.
        energy: Share of the weight's squared singular values that is removed, or put back, 0 to 1.
    """

    change: float
    energy: float


# Of the energy, in what a prediction is taken to miss. The second order would be 1; of 1 to 4, 2 lost least over the
# small models of `benchmarks.screening`, also on other images and texts than those it was chosen on.
_POWER = 2

# Layer -> ratio -> what is predicted of going from the present ratio to that one.
Predictions = Mapping[str, Mapping[float, Prediction]]


def screened(
    predictions: Mapping[float, Prediction],
    ratios: Sequence[float],
    evaluate: Callable[[float], LossValues],
    best: float,
    *,
    most: int,
    criterion: Callable[[LossValues], float],
    only_gains: bool = False,
) -> dict[float, LossValues]:
    """Evaluate a few candidates of one layer: the best-predicted first, and each next in the light of those before.

    What the gradient misses is taken to grow with a power of the energy that is removed, by a factor that is fitted to
    what was evaluated. So where the best-predicted candidate went too far the next one is a smaller step, and where it
    went further down than predicted a larger one.

    Args:
        predictions: Ratio -> what is predicted of it.
        ratios: The candidates.
        evaluate: `ratio -> losses`.
        best: The criterion's best value so far.
        most: How many are evaluated at most.
        criterion: What is minimised.
        only_gains: Leave out what no gain is predicted of, in the light of what was evaluated.

    Returns:
        Ratio -> losses of what was evaluated, in that order; ratio 0 stands for the whole weight.
    """
    tried: dict[float, LossValues] = {}
    while len(tried) < min(most, len(ratios)):
        missed = {ratio: criterion(losses) - best for ratio, losses in tried.items()}
        factor = _factor(predictions, missed)
        expected = {
            ratio: predictions[ratio].change + factor * predictions[ratio].energy ** _POWER
            for ratio in ratios
            if ratio not in tried
        }
        ratio = min(expected, key=expected.__getitem__)
        if only_gains and expected[ratio] >= 0:
            break
        tried[ratio] = evaluate(ratio)
    return tried


def _factor(predictions: Mapping[float, Prediction], exact: Mapping[float, float]) -> float:
    """The factor that brings bent predictions nearest to exact changes (least squares); 0 where there are none."""
    points = [
        (predictions[ratio].energy ** _POWER, change - predictions[ratio].change) for ratio, change in exact.items()
    ]
    points = [(power, missing) for power, missing in points if math.isfinite(missing)]
    square = sum(power**2 for power, _ in points)
    return sum(power * missing for power, missing in points) / square if square else 0.0


def by_gain(predictions: Predictions, ratios: Callable[[str], Sequence[float]]) -> dict[str, float]:
    """The best-predicted ratio of each layer of which a gain is predicted, the largest gain first.

    Args:
        predictions: What is predicted.
        ratios: `layer -> ratios` that are candidates; others that are predicted are not.

    Returns:
        Layer -> ratio; layers without a predicted gain are not in it.
    """
    gains: dict[str, tuple[float, float]] = {}
    for layer, of_layer in predictions.items():
        change, ratio = min(((of_layer[ratio].change, ratio) for ratio in ratios(layer)), default=(0.0, 0.0))
        if change < 0:
            gains[layer] = change, ratio
    return {layer: ratio for layer, (_, ratio) in sorted(gains.items(), key=lambda item: item[1][0])}


def joint_search(
    layers: Sequence[str],
    initial: LossValues,
    predict: Callable[[], Predictions],
    candidates: Callable[[str], Sequence[float]],
    evaluate: Callable[[Mapping[str, float]], LossValues],
    choose: Callable[[str, float], None],
    *,
    evaluations: int | None = None,
    criterion: Callable[[LossValues], float],
) -> Iterator[list[Decision]]:
    """Decide all layers at once, round after round.

    In a round every layer takes its best-predicted ratio, if that is a gain, and all changes are evaluated together,
    exactly. If the criterion does not fall, the better half of them is tried, and so on; a round that takes nothing is
    the last.

    Args:
        layers: All layers, in the order in which their decisions are told.
        initial: Losses of the base.
        predict: Asked at the beginning of each round: what is predicted at the present ratios.
        candidates: `layer -> ratios` to try, each above 0.
        evaluate: `changes -> losses` with the decided layers as decided but for these changes.
        choose: `(layer, ratio)`: makes a decision hold for all later evaluations.
        evaluations: The most evaluations of the whole search; by default as many as it takes.
        criterion: What is minimised.

    Yields:
        The decisions of one round, one a layer; each carries its part in every evaluation.
    """
    best, ratios, trial = initial, dict.fromkeys(layers, 0.0), 0
    taken = True
    while taken and (evaluations is None or trial < evaluations):
        gains = by_gain(
            predict(), lambda layer: [ratio for ratio in (0.0, *candidates(layer)) if ratio != ratios[layer]]
        )
        changes, taken = list(gains.items()), False
        tried: dict[str, list[Candidate]] = {layer: [] for layer in layers}
        while changes and not taken and (evaluations is None or trial < evaluations):
            losses = evaluate(dict(changes))
            for layer, ratio in changes:
                tried[layer].append(Candidate(layer, ratio, losses, trial))
            taken = is_better(criterion(losses), criterion(best))
            if taken:
                best = losses
                ratios.update(changes)
            changes, trial = changes[: len(changes) // 2], trial + 1
        for layer in layers:
            choose(layer, ratios[layer])
        yield [Decision(layer, ratios[layer], best, tried[layer]) for layer in layers]

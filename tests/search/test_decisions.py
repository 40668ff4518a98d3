"""Which candidates a screened search evaluates and takes, by hand-made predictions and losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from setar_peft.objectives.loss import LossValues
from setar_peft.search.decisions import Prediction, by_gain, joint_search, screened, total_loss

RATIOS = (0.1, 0.2, 0.3, 0.4)


def _evaluated(
    predictions: Mapping[float, Prediction], exact: Mapping[float, float], most: int, **settings: Any
) -> list[float]:
    tried = screened(
        predictions,
        RATIOS,
        lambda ratio: LossValues(1.0 + exact[ratio]),
        1.0,
        most=most,
        criterion=total_loss,
        **settings,
    )
    assert [repr(losses.total) for losses in tried.values()] == [repr(1.0 + exact[ratio]) for ratio in tried]
    return list(tried)


# A gain that grows with the ratio to first order, and energies as of growing shares.
GROWING = {ratio: Prediction(-ratio, ratio**2) for ratio in RATIOS}


def test_without_surprise_the_best_predicted_come_first() -> None:
    exact = {ratio: one.change for ratio, one in GROWING.items()}
    assert _evaluated(GROWING, exact, 1) == [0.4]
    assert _evaluated(GROWING, exact, 2) == [0.4, 0.3]
    assert _evaluated(GROWING, exact, 9) == [0.4, 0.3, 0.2, 0.1]


def test_a_candidate_that_went_too_far_is_followed_by_a_smaller_step() -> None:
    """One evaluation at 0.4 shows by how much; the bend is a power of the energy, here r^4."""
    assert _evaluated(GROWING, {ratio: -ratio + 0.2 * (ratio / 0.4) ** 4 for ratio in RATIOS}, 2) == [0.4, 0.3]
    assert _evaluated(GROWING, {ratio: -ratio + 1.0 * (ratio / 0.4) ** 4 for ratio in RATIOS}, 2) == [0.4, 0.2]
    assert _evaluated(GROWING, {ratio: -ratio + 9.0 * (ratio / 0.4) ** 4 for ratio in RATIOS}, 2) == [0.4, 0.1]


def test_one_that_went_further_down_than_predicted_is_followed_by_a_larger_step() -> None:
    losing = {ratio: Prediction(ratio, ratio**2) for ratio in RATIOS}
    assert _evaluated(losing, {ratio: ratio for ratio in RATIOS}, 2) == [0.1, 0.2]
    assert _evaluated(losing, {ratio: ratio - (ratio / 0.1) ** 4 * 0.01 for ratio in RATIOS}, 2) == [0.1, 0.4]


def test_the_factor_is_fitted_to_all_that_was_evaluated() -> None:
    """Through two points of the energy's power and what was missed there: least squares, by hand."""
    exact = {0.4: 0.4, 0.2: -0.15, 0.1: 0.0, 0.3: 0.0}
    high, low = 0.16**2, 0.04**2
    factor = (high * 0.8 + low * 0.05) / (high**2 + low**2)
    expected = min((0.1, 0.3), key=lambda ratio: -ratio + factor * ratio**4)
    assert _evaluated(GROWING, exact, 3) == [0.4, 0.2, expected]


def test_what_has_no_finite_loss_teaches_nothing() -> None:
    assert _evaluated(GROWING, {0.4: math.nan, 0.3: math.inf, 0.2: 0.0, 0.1: 0.0}, 3) == [0.4, 0.3, 0.2]


def test_only_gains_leaves_out_what_is_no_gain_in_the_light_of_what_was_seen() -> None:
    losing = {ratio: Prediction(ratio, ratio**2) for ratio in RATIOS}
    assert _evaluated(losing, dict.fromkeys(RATIOS, 0.0), 2, only_gains=True) == []
    assert _evaluated(losing, {ratio: ratio for ratio in RATIOS}, 2) == [0.1, 0.2]  # in other orders they are tried
    exact = {ratio: -ratio + 1e3 * ratio**4 for ratio in RATIOS}
    assert _evaluated(GROWING, exact, 9, only_gains=True) == [0.4]


def test_layers_by_their_predicted_gain() -> None:
    predictions = {
        "a": {0.0: Prediction(0.0, 0.0), 0.1: Prediction(-1.0, 0.1), 0.2: Prediction(-3.0, 0.2)},
        "b": {0.0: Prediction(-9.0, 0.0), 0.1: Prediction(0.5, 0.1), 0.2: Prediction(0.0, 0.2)},
        "c": {0.1: Prediction(-4.0, 0.1)},
        "d": {0.1: Prediction(math.nan, 0.1)},
    }
    assert list(by_gain(predictions, lambda _: (0.1, 0.2) if _ in "ab" else (0.1,)).items()) == [("c", 0.1), ("a", 0.2)]
    assert by_gain(predictions, lambda _: (0.0,) if _ == "b" else ()) == {"b": 0.0}


class _Rounds:
    """A joint search over layers whose changes of the loss are known, and how it went."""

    def __init__(self, predicted: Sequence[Mapping[str, float]], losses: Mapping[Any, float]) -> None:
        self.asked, self.trials, self.held = 0, [], {}
        self._predicted, self._losses = predicted, losses

    def predict(self) -> dict[str, dict[float, Prediction]]:
        changes = self._predicted[self.asked]
        self.asked += 1
        return {
            layer: {ratio: Prediction(change if ratio == 0.1 else 1.0, 0.1) for ratio in (0.0, 0.1)}
            for layer, change in changes.items()
        }

    def evaluate(self, changes: Mapping[str, float]) -> LossValues:
        self.trials.append(list(changes))
        return LossValues(self._losses["".join(sorted({*(k for k, v in self.held.items() if v), *changes}))])

    def run(self, **settings: Any) -> list[Any]:
        layers = list(self._predicted[0])
        return list(
            joint_search(
                layers,
                LossValues(1.0),
                self.predict,
                lambda _: (0.1,),
                self.evaluate,
                lambda layer, ratio: self.held.update({layer: ratio}),
                criterion=total_loss,
                **settings,
            )
        )


def test_a_joint_search_ends_with_a_round_that_takes_nothing() -> None:
    rounds = _Rounds([{"a": -2.0, "b": -1.0, "c": 0.5}, {"a": 0.0, "b": 0.0, "c": -0.1}], {"ab": 0.7, "abc": 0.9})
    found = rounds.run()
    assert rounds.trials == [["a", "b"], ["c"]]
    assert rounds.held == {"a": 0.1, "b": 0.1, "c": 0.0}
    assert [[decision.rank_ratio for decision in one] for one in found] == [[0.1, 0.1, 0.0]] * 2
    assert [decision.losses.total for one in found for decision in one] == [0.7] * 6
    trials = [[(c.layer, c.losses.total, c.trial) for d in one for c in d.candidates] for one in found]
    assert trials == [[("a", 0.7, 0), ("b", 0.7, 0)], [("c", 0.9, 1)]]


def test_a_round_that_is_worse_is_tried_again_with_the_better_half_of_its_changes() -> None:
    predicted = {"a": -1.0, "b": -5.0, "c": -3.0, "d": -4.0, "e": -2.0}
    rounds = _Rounds([predicted, dict.fromkeys(predicted, 0.0)], {"abcde": 1.5, "bd": math.nan, "b": 0.8})
    rounds.run()
    assert rounds.trials == [["b", "d", "c", "e", "a"], ["b", "d"], ["b"]]
    assert [layer for layer, ratio in rounds.held.items() if ratio] == ["b"]
    nothing = _Rounds([predicted], {"abcde": 1.5, "bd": 1.5, "b": 1.0})  # equal is not better
    found = nothing.run()
    assert nothing.trials == [["b", "d", "c", "e", "a"], ["b", "d"], ["b"]]
    assert not any(nothing.held.values())
    assert [decision.losses.total for decision in found[0]] == [1.0] * 5


@pytest.mark.parametrize(("evaluations", "trials"), [(1, 1), (2, 2), (3, 3), (None, 3)])
def test_a_budget_ends_a_joint_search(evaluations: int | None, trials: int) -> None:
    predicted = {"a": -1.0, "b": -5.0, "c": -3.0, "d": -4.0}
    rounds = _Rounds([predicted, dict.fromkeys(predicted, 0.0)], {"abcd": 1.5, "bd": 1.4, "b": 0.8})
    rounds.run(evaluations=evaluations)
    assert len(rounds.trials) == trials
    assert any(rounds.held.values()) == (trials == 3)


def test_a_round_may_put_a_layer_back() -> None:
    first = {"a": {0.0: Prediction(0.0, 0.0), 0.1: Prediction(-1.0, 0.1)}}
    back = {"a": {0.0: Prediction(-0.5, 0.1), 0.1: Prediction(0.0, 0.0)}}
    predictions, losses = iter([first, back, first]), iter([0.9, 0.8, 0.85])
    seen: list[dict[str, float]] = []

    def evaluate(changes: Mapping[str, float]) -> LossValues:
        seen.append(dict(changes))
        return LossValues(next(losses))

    found = list(
        joint_search(
            ["a"],
            LossValues(1.0),
            lambda: next(predictions),
            lambda _: (0.1,),
            evaluate,
            lambda *_: None,
            criterion=total_loss,
        )
    )
    assert seen == [{"a": 0.1}, {"a": 0.0}, {"a": 0.1}]
    assert [one[0].rank_ratio for one in found] == [0.1, 0.0, 0.0]

"""What is shown of a search: the criterion's best, and a time left that follows what was evaluated."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from setar_peft.backbones import Location
from setar_peft.search import progress
from setar_peft.search.plan import Costs, SearchPlan
from setar_peft.search.progress import SearchProgress

VISION, TEXT = Location("vision", 3, "W_up"), Location("text", 2, "W_up")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def _last(capfd: pytest.CaptureFixture[str]) -> str:
    return capfd.readouterr().err.splitlines()[-1]


def test_steps_out_of_a_trace_are_no_work(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    bar = SearchProgress(shown=True)
    bar.begin({"vision": 100.0}, 0.5)
    for _ in range(9):
        bar.decided(VISION, 10.0, 0.4, evaluated=False)
    assert "90%" in (line := _last(capfd))
    assert "0 s passed, about 10 s left" in line
    bar.begin({"vision": 100.0}, 0.5)
    bar.decided(VISION, 50.0, 0.4, evaluated=False)
    clock[0] += 60.0
    bar.decided(VISION, 20.0, 0.3, evaluated=True)
    assert "70%" in (line := _last(capfd))
    assert "best loss 0.300000  60 s passed, about 90 s left" in line


def test_each_tower_has_its_own_pace(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    bar = SearchProgress(shown=True)
    bar.begin({"vision": 40.0, "text": 10.0}, 0.5)
    clock[0] += 40.0
    bar.decided(VISION, 20.0, 0.4, evaluated=True)
    assert "about 60 s left" in _last(capfd)  # twice as long as predicted, so the other tower is taken to be, too
    clock[0] += 40.0
    bar.decided(VISION, 20.0, 0.4, evaluated=True)
    clock[0] += 5.0
    bar.decided(TEXT, 5.0, 0.4, evaluated=True)
    assert "90%" in (line := _last(capfd))
    assert "about 5 s left" in line


def test_within_a_layer_the_time_left_goes_down(clock: list[float]) -> None:
    bar = SearchProgress(shown=False)
    bar.begin({"vision": 40.0}, 0.5)
    task = bar._bar.tasks[0]
    clock[0] += 10.0
    bar.candidate(VISION, 0.1, 0.5, 20.0)
    assert task.fields["left"] == "about 0:00:30 left"
    assert task.completed == 10.0
    assert task.description == "vision 3 W_up  ratio 0.10  best 0.500000"


def test_layers_are_weighed_by_what_their_candidates_cost() -> None:
    """Low layers have more blocks above them, a tower's pass its own price, and each candidate the loss's."""

    class Tower:
        blocks = range(4)

    class Model:
        towers: ClassVar[dict[str, Any]] = {"vision": Tower, "text": Tower}

    locations = {f"{tower}{level}": Location(tower, level, "W_up") for tower in Model.towers for level in (0, 3)}
    steps, candidates = [[layer] for layer in locations], dict.fromkeys(locations, (0.1, 0.2))
    plan = SearchPlan(Model, locations, steps, candidates, 1)  # type: ignore[arg-type]
    costs = Costs({"vision": 3.0, "text": 1.0}, 0.5)
    assert [plan.seconds(layer, costs) for layer in locations] == [12.5, 3.5, 4.5, 1.5]
    assert plan.work(costs) == {"vision": 32.0, "text": 12.0}
    assert plan.work(Costs({}, 0.5)) == {"vision": 2.0, "text": 2.0}  # a callable runs in full for each
    together = SearchPlan(Model, locations, [list(locations)] * 4, candidates, 1)  # type: ignore[arg-type]
    assert sum(together.work(costs).values()) == 2.5 * 44


def test_the_best_of_a_layers_candidates_stays_the_best(capfd: pytest.CaptureFixture[str]) -> None:
    """A screened search evaluates them one by one, and the second may be the worse one."""
    bar = SearchProgress(shown=True)
    bar.begin({"vision": 20.0, "all": 10.0}, 0.5)
    bar.decided(VISION, 10.0, 0.4, evaluated=True)
    bar.decided(VISION, 10.0, 0.45, evaluated=True)
    assert "best loss 0.400000" in _last(capfd)
    bar.decided_together(5.0, 3, 0.45, evaluated=True)
    assert "3 changes at once  best loss 0.400000" in _last(capfd)
    bar.decided_together(5.0, 1, 0.3, evaluated=True)
    assert "1 change  best loss 0.300000" in _last(capfd)

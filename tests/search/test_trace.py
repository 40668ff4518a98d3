"""What a trace of a search may hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from setar_peft.objectives.loss import LossValues
from setar_peft.search.trace import SearchTrace, TraceCandidate, TracePrediction, TraceRow


@pytest.mark.parametrize(("change", "energy"), [(float("nan"), 0.1), (float("-inf"), 0.1), (-0.1, float("nan"))])
def test_a_prediction_is_finite(tmp_path: Path, change: float, energy: float) -> None:
    """One that is not would say of candidates which is evaluated first, and of none that it loses."""
    trace = SearchTrace(LossValues(1.0), predictions=[TracePrediction(0, "layer", 0.1, -0.1, 0.1)])
    trace.save(tmp_path / "trace.json")
    assert SearchTrace.load(tmp_path / "trace.json").predictions == trace.predictions
    trace.predictions.append(TracePrediction(0, "layer", 0.2, change, energy))
    trace.save(tmp_path / "trace.json")
    with pytest.raises(ValueError, match=r"trace\.json is no trace .*predictions\[1\] is of a change of .*(nan|inf)"):
        SearchTrace.load(tmp_path / "trace.json")


def test_what_was_predicted_is_found_in_one_look() -> None:
    """Of 100 layers and 20 rounds there are 6,000 predictions; each is read a few times, and not once a candidate."""

    class Counting(list[TracePrediction]):
        looks = 0

        def __iter__(self) -> Iterator[TracePrediction]:
            self.looks += 1
            return super().__iter__()

    trace = SearchTrace(LossValues(1.0), settings={"criterion": "total", "order": "joint"}, predictions=Counting())
    for step in range(0, 2000, 100):
        loss = 1 - step / 4000
        for layer in range(100):
            name, ratio = f"layer {layer}", 0.1 + 0.1 * (step // 100 % 2)
            trace.predictions += [TracePrediction(step, name, one, one - step, one**2) for one in (0.0, 0.1, 0.2)]
            trace.candidates.append(TraceCandidate(step + layer, name, ratio, loss, 0.0, 0.0, 1.0, 0.0, step // 100))
            trace.rows.append(TraceRow(step + layer, "vision", "W_up", layer, ratio, loss, 0.0, 0.0, 100.0, 0.0, name))
    compared = trace.compared()
    assert [one.predicted for one in compared[:3]] == pytest.approx([10.0, -9980.0, -19990.0])
    assert [one.exact for one in compared[:3]] == pytest.approx([0.0, -0.025, -0.025])
    assert trace.to_csv().splitlines()[150].endswith(f",{compared[1].predicted},{compared[1].exact}")
    assert trace.predictions.looks < 20  # type: ignore[attr-defined]

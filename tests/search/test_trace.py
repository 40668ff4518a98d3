"""What a trace of a search may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from setar_peft.objectives.loss import LossValues
from setar_peft.search.trace import SearchTrace, TracePrediction


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

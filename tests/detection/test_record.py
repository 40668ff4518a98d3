from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from setar_peft.detection.columns import Columns
from setar_peft.detection.record import Detection, Detections

KNOWN = Detection("a.png", "cat", 0.75, 1.5, True, 1.25, (("cat", 0.75), ("dog", 0.25)))
UNKNOWN = Detection("b.png", "dog", 0.5, 1.0, False, 1.25, (("dog", 0.5),))
BROKEN = Detection("c.png", None, None, None, None, 1.25, (), "c.png cannot be read: it is empty.")


def test_a_record_goes_through_json() -> None:
    found = json.loads(json.dumps(KNOWN.to_dict()))
    assert found == {
        "id": "a.png",
        "label": "cat",
        "probability": 0.75,
        "score": 1.5,
        "is_id": True,
        "threshold": 1.25,
        "top": [{"label": "cat", "probability": 0.75}, {"label": "dog", "probability": 0.25}],
        "error": None,
    }


def test_the_table_counts_and_names_everything() -> None:
    records = Detections([KNOWN, UNKNOWN, BROKEN])
    lines = records.table().splitlines()
    assert lines[0].split() == ["id", "verdict", "score", "label", "probability"]
    assert lines[1].split() == ["a.png", "ID", "1.5000", "cat", "0.75"]
    assert lines[2].split()[:2] == ["b.png", "OOD"]
    assert "c.png cannot be read" in lines[3]
    assert lines[4] == "1 ID, 1 OOD, 1 errors; ID at a score of 1.25 or more"
    assert "... and 1 more" in records.table(2)
    assert repr(records) == records.table()


def test_a_list_of_records_is_a_sequence() -> None:
    records = Detections([KNOWN, UNKNOWN, BROKEN])
    assert len(records) == 3
    assert records[0] == KNOWN
    assert records[1:] == Detections([UNKNOWN, BROKEN])
    assert list(records) == [KNOWN, UNKNOWN, BROKEN]
    assert records.to_dicts()[2]["error"] == BROKEN.error
    assert Detections([]).table().splitlines()[-1] == "0 ID, 0 OOD"


def test_columns_go_to_parquet_and_back(tmp_path: Path) -> None:
    from datasets import Dataset

    columns = Columns(
        ["a", "b"],
        {"score": np.array([1.5, np.nan], np.float32), "features": np.array([[1, 2], [3, 4]], np.float32)},
        {"b": "b cannot be read."},
    )
    columns.to_parquet(tmp_path / "out.parquet")
    found = Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "cache"))
    assert found.column_names == ["id", "score", "features", "error"]
    assert found["id"][:] == ["a", "b"]
    assert found["features"][:] == [[1.0, 2.0], [3.0, 4.0]]
    assert found["score"][0] == 1.5
    assert np.isnan(found["score"][1])
    assert found["error"][:] == ["", "b cannot be read."]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.parquet"]
    with pytest.raises(KeyError, match=r"no column 'scores'.*'score'"):
        columns["scores"]

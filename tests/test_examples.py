from __future__ import annotations

import functools
import os
import runpy
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from setar_peft import OODDetector
from setar_peft.demo import digits
from tests.demo.conftest import one_thread  # noqa: F401 - every test here uses it
from tests.detection.conftest import detector, processor  # noqa: F401 - fixtures here, too
from tests.detection.pictures import written

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(digits, "load_model", functools.partial(digits.load_model, steps=2, progress=False))
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "vision_model.encoder.layers.3.mlp.fc1" in printed
    assert "SeTAR - base" in printed
    assert (tmp_path / "digits-setar" / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-setar", "setar_peft"]


def test_the_quickstart_is_short() -> None:
    lines = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 35


def ray(*arguments: object) -> subprocess.Popen[str]:
    """The example as a user starts it, in a group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    environment["PYTHONPATH"] = str(EXAMPLES.parent)
    command = [sys.executable, str(EXAMPLES / "score_with_ray.py"), *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)


@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install -e '.[ray]'")
@pytest.mark.timeout(400)
def test_ray_goes_on_after_a_kill_and_scores_nothing_twice(detector: Any, tmp_path: Path) -> None:  # noqa: F811
    import pyarrow.parquet as pq

    paths = written(tmp_path / "pictures", 300)
    paths[7].write_bytes(b"")
    detector.at(threshold=0.4).save_pretrained(tmp_path / "detector")
    output = tmp_path / "out"
    job = (tmp_path / "detector", tmp_path / "pictures", output, "--part", 1)
    with ray(*job) as killed:
        while len(list(output.glob("*.parquet"))) < 3:
            assert killed.poll() is None, killed.stdout and killed.stdout.read()
            time.sleep(0.01)
        os.killpg(killed.pid, signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert 3 <= len(kept) < 300
    with ray(*job) as run:
        said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    assert "of 300 parts to do" in said
    rows = pq.read_table(output).to_pylist()
    assert [row["id"] for row in rows] == [str(path) for path in paths]
    records = OODDetector.from_pretrained(tmp_path / "detector")(paths)
    assert [row["score"] for row in rows] == pytest.approx([record.score for record in records], abs=1e-6)
    assert [row["error"] for row in rows] == [record.error for record in records]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    detector.at(threshold=0.5).save_pretrained(tmp_path / "detector")
    with ray(*job) as refused:
        said = refused.communicate(timeout=100)[0]
    assert refused.returncode == 2
    assert "was begun with another detector or other inputs" in said


@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install -e '.[ray]'")
@pytest.mark.timeout(400)
def test_ray_on_parquet(detector: Any, tmp_path: Path) -> None:  # noqa: F811
    import pyarrow.parquet as pq
    from datasets import Dataset, Image

    paths = written(tmp_path / "pictures", 10)
    table = Dataset.from_dict({"picture": [{"bytes": path.read_bytes(), "path": None} for path in paths]})
    (tmp_path / "tables").mkdir()
    table.cast_column("picture", Image()).to_parquet(str(tmp_path / "tables" / "a.parquet"), batch_size=4)
    detector.at(threshold=0.4).save_pretrained(tmp_path / "detector")
    with ray(tmp_path / "detector", tmp_path / "tables", tmp_path / "out", "--column", "picture") as run:
        said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    rows = pq.read_table(tmp_path / "out").to_pylist()
    records = OODDetector.from_pretrained(tmp_path / "detector")(paths)
    assert [row["score"] for row in rows] == pytest.approx([record.score for record in records], abs=1e-6)
    assert [row["id"].partition("#")[2] for row in rows][:5] == ["0.0", "0.1", "0.2", "0.3", "1.0"]


def test_the_example_for_ray_is_short() -> None:
    lines = (EXAMPLES / "score_with_ray.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 110

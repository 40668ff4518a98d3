"""A detector on a column: in this process and in others, and what a cache sees of it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import get_peft_model

from setar_peft import SeTARConfig
from setar_peft.detection import batched
from setar_peft.detection.detector import OODDetector
from tests.detection.pictures import pictures, written

UP = "vision_model.encoder.layers.3.mlp.fc1"


@pytest.fixture
def make(load_clip: Any, processor: Any, class_names: list[str]) -> Any:
    """A detector of the golden CLIP with an adapter, at a threshold."""

    def make(ratio: float | None = None, threshold: float = 1.0, **kwargs: Any) -> OODDetector:
        model = load_clip()
        if ratio is not None:
            model = get_peft_model(model, SeTARConfig(target_modules=[UP], rank_ratios={UP: ratio}))
        return OODDetector(model, processor, kwargs.pop("names", class_names), **kwargs).at(threshold=threshold)

    return make


def test_two_processes_say_what_one_says(make: Any) -> None:
    """With threads in the process above, which forked ones must not wait for."""
    detector = make()
    torch.set_num_threads(2)
    images = pictures(10)
    expected = detector(images)
    dataset = Dataset.from_dict({"image": images})
    mapped = dataset.map(detector.on("image"), batched=True, batch_size=3, num_proc=2)
    assert mapped["score"][:] == pytest.approx([record.score for record in expected], abs=1e-6)
    assert mapped["label"][:] == [record.label for record in expected]
    assert mapped["is_id"][:] == [record.is_id for record in expected]


def test_what_cannot_be_read_is_a_row_with_an_error(make: Any, tmp_path: Path) -> None:
    paths = written(tmp_path, 4)
    paths[1].write_bytes(b"")
    dataset = Dataset.from_dict({"path": [str(path) for path in paths]})
    mapped = dataset.map(make().on("path"), batched=True, batch_size=2)
    assert [error is None for error in mapped["error"][:]] == [True, False, True, True]
    assert mapped["score"][1] is None
    assert "001.png cannot be read" in mapped["error"][1]


def test_a_cache_sees_weights_that_were_written_unseen(make: Any) -> None:
    """As averaged weights are swapped in: through `.data`, of which torch keeps no record."""
    detector = make()
    before = Hasher.hash(detector.on("image"))
    assert Hasher.hash(detector.on("image")) == before
    detector.model.visual_projection.weight.data.mul_(2)
    assert Hasher.hash(detector.on("image")) != before


def test_a_cache_sees_what_changes_a_verdict_and_nothing_else(make: Any, class_names: list[str]) -> None:
    def margin(global_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        first, second = (global_logits / temperature).topk(2).values.unbind(-1)
        return first - second

    def other(global_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        first, third = (global_logits / temperature).topk(3).values[:, [0, 2]].unbind(-1)
        return first - third

    detectors = {
        "stock": make(),
        "adapter": make(0.25),
        "another adapter": make(0.5),
        "threshold": make(threshold=2.0),
        "score": make(score="mcm"),
        "temperature": make(temperature=3.0),
        "setting": make(score={"gl_mcm": {"local_weight": 0.5}}),
        "prompt": make(prompt="a {class}"),
        "classes": make(names=class_names[:-1]),
        "own score": make(score=margin),
        "another own score": make(score=other),
        "without its adapter": make(0.25),
        "merged": make(0.25),
    }
    for name, change in (("without its adapter", "disable_adapter_layers"), ("merged", "merge_adapter")):
        model = detectors[name].model
        getattr(model.base_model, change)()
        detectors[name] = OODDetector(model, detectors[name].processor, class_names).at(threshold=1.0)
    digests = {name: Hasher.hash(detector.on("image")) for name, detector in detectors.items()}
    assert digests.pop("without its adapter") == digests["stock"]
    assert len(set(digests.values())) == len(digests)
    assert Hasher.hash(detectors["stock"].on("picture")) not in digests.values()
    # Neither use nor another object of the same content makes a difference.
    detectors["adapter"](pictures(2))
    assert Hasher.hash(detectors["adapter"].on("image")) == digests["adapter"]
    assert Hasher.hash(make(0.25, batch_size=3).on("image")) == digests["adapter"]
    with torch.no_grad():
        stock = make()
        Hasher.hash(stock.on("image"))
        stock.model.logit_scale.add_(1)
    changed = OODDetector(stock.model, stock.processor, class_names).at(threshold=1.0)
    assert Hasher.hash(changed.on("image")) not in digests.values()
    detectors["stock"].processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    assert Hasher.hash(detectors["stock"].on("image")) != digests["stock"]


SCRIPT = """
import pathlib, sys
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, CLIPModel
from setar_peft.detection.detector import OODDetector
model = CLIPModel.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
scores = "gl_mcm", lambda global_logits: global_logits.amax(-1)
detectors = [OODDetector(model, tokenizer, ["cat", "dog"], score).at(threshold=1.0) for score in scores]
pathlib.Path(sys.argv[2]).write_text(" ".join(Hasher.hash(detector.on("image")) for detector in detectors))
"""


def test_a_cache_of_another_day_is_found(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest does not depend on a process's hash seed."""
    arguments = [str(golden / "cases" / "clip_tiny"), str(tmp_path / "digests")]
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    there = (tmp_path / "digests").read_text().split()
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(SCRIPT, {"__name__": "__main__"})
    here = (tmp_path / "digests").read_text().split()
    assert there[0] == here[0]
    assert len(set(here)) == 2


def test_pickled_it_holds_no_model_and_is_found_again(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = make()
    content = pickle.dumps(detector.on("image"))
    assert len(content) < 1000
    images = pictures(3)
    found = pickle.loads(content)
    assert found({"image": images})["score"] == [record.score for record in detector(images)]
    # What was found again can be sent on.
    assert pickle.loads(pickle.dumps(found))({"image": images}) == found({"image": images})
    unused = pickle.loads(content)
    assert pickle.dumps(unused) == content
    detector.at(threshold=2.0)
    with pytest.raises(ValueError, match=r"another threshold, score or model after .*Make the function anew"):
        pickle.loads(content)({"image": images})
    detector.at(threshold=1.0)
    monkeypatch.setattr(batched, "_LIVE", {})
    with pytest.raises(ValueError, match=r"neither saved nor loaded .*save_pretrained\(folder\)"):
        pickle.loads(content)({"image": images})


def test_elsewhere_it_is_loaded_from_its_folder(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its folder it is the same detector also for a cache, and nobody takes another one for it."""
    detector = make(0.25)
    images = pictures(3)
    unsaved = pickle.loads(pickle.dumps(detector.on("image"))).__getstate__()["digest"]
    detector.save_pretrained(tmp_path / "detector")
    content = pickle.dumps(detector.on("image"))
    monkeypatch.setattr(batched, "_LIVE", {})
    elsewhere = pickle.loads(content)
    assert elsewhere({"image": images})["score"] == [record.score for record in detector(images)]
    assert elsewhere.__getstate__()["digest"] == unsaved
    make(0.25, threshold=2.0).save_pretrained(tmp_path / "detector")
    batched._LIVE.clear()
    with pytest.raises(ValueError, match=r"another one than went into this process.*Save it again"):
        pickle.loads(content)({"image": images})


def test_a_model_on_a_gpu_is_refused_in_a_forked_process(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = make()
    content = pickle.dumps(detector.on("image"))
    detector.model.to("meta")
    monkeypatch.setattr(batched, "_HOME", 0)
    with pytest.raises(ValueError, match="is on meta, which a forked process cannot use; leave out num_proc"):
        pickle.loads(content)({"image": []})

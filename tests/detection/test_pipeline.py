"""`transformers.pipeline("ood-detection")`: the detector's own records for everything that pipelines take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import CLIPModel, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from setar_peft import SeTARConfig
from setar_peft.detection.detector import OODDetector
from setar_peft.detection.pipeline import OODDetectionPipeline
from setar_peft.detection.threshold import Threshold
from tests.detection.pictures import pictures, written

RATIOS = {"vision_model.encoder.layers.1.mlp.fc1": 0.4}


@pytest.fixture
def fitted(detector: OODDetector) -> OODDetector:
    return detector.fit(pictures(40, seed=1), tpr=0.7)


@pytest.fixture(params=["stock model", "adapter"])
def saved(request: pytest.FixtureRequest, fitted: OODDetector, golden: Path, tmp_path: Path) -> OODDetector:
    """A detector that was saved, and its folder in the attribute `folder`."""
    if request.param == "adapter":
        base = CLIPModel.from_pretrained(golden / "cases" / "clip_tiny").eval()
        adapted = get_peft_model(base, SeTARConfig(rank_ratios=RATIOS))
        fitted = OODDetector(adapted, fitted.processor, fitted.class_names, batch_size=4)
        fitted.fit(pictures(40, seed=1), tpr=0.7)
    fitted.save_pretrained(tmp_path / "detector")
    return fitted


def folder_of(tmp_path: Path) -> str:
    return str(tmp_path / "detector")


def make(model: Any, **settings: Any) -> Any:
    return pipeline("ood-detection", model=model, device="cpu", **settings)


def as_dicts(records: Any) -> list[dict[str, Any]]:
    """Records as the pipeline gives them: all but the place in the batch."""
    return [{name: value for name, value in record.to_dict().items() if name != "id"} for record in records]


def test_it_gives_the_detectors_own_records_to_the_bit(saved: OODDetector, tmp_path: Path) -> None:
    pipe = make(folder_of(tmp_path))
    assert isinstance(pipe, OODDetectionPipeline)
    some = pictures(10, seed=2)
    expected = as_dicts(saved(some))
    assert {record["is_id"] for record in expected} == {True, False}
    # Four a batch, as the detector has them.
    assert pipe(some, batch_size=4) == expected
    assert pipe(some[0]) == as_dicts([saved(some[0])])[0]
    assert pipe(some) == as_dicts(saved(picture) for picture in some)
    assert "OODDetectionPipeline" in repr(pipe)


def test_it_takes_what_pipelines_take(fitted: OODDetector, tmp_path: Path) -> None:
    pipe = make(fitted, batch_size=4)
    paths = written(tmp_path / "pictures", 6)
    expected = as_dicts(fitted(pictures(6)))
    assert pipe([str(path) for path in paths]) == expected
    assert pipe([np.asarray(picture) for picture in pictures(6)]) == expected
    assert pipe([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures(6)]) == expected
    assert pipe(str(paths[0])) == make(fitted)(pictures(1)[0])
    table = datasets.Dataset.from_dict({"image": list(map(str, paths)), "label": [0] * 6})
    table = table.cast_column("image", datasets.Image())
    generated = pipe(picture for picture in pictures(6))
    assert isinstance(generated, Iterator)
    assert list(generated) == expected
    assert list(pipe(table)) == expected
    assert list(pipe(table.to_iterable_dataset())) == expected
    assert list(pipe(KeyDataset(table, "image"))) == expected
    assert list(pipe(KeyDataset(table, "image"), num_workers=1)) == expected
    assert list(pipe(iter(pictures(6)))) == expected
    assert pipe([]) == []


def test_a_generator_is_read_no_further_than_a_batch(fitted: OODDetector) -> None:
    read = []

    def endless() -> Iterator[Any]:
        while True:
            read.append(1)
            yield pictures(1)[0]

    first = next(iter(make(fitted)(endless(), batch_size=2)))
    assert first["label"] in fitted.class_names
    assert len(read) <= 4


def test_what_cannot_be_read_is_a_record_with_its_error(fitted: OODDetector) -> None:
    found = make(fitted)([pictures(1)[0], "missing.png"], batch_size=2)
    assert found[0]["error"] is None
    assert "missing.png cannot be read" in found[1]["error"]
    assert found[1]["label"] is found[1]["score"] is found[1]["is_id"] is None


def test_threshold_level_and_top_k_at_construction_and_at_a_call(fitted: OODDetector) -> None:
    picture, before = pictures(1)[0], fitted.threshold
    pipe = make(fitted)
    score = pipe(picture)["score"]
    assert pipe(picture, threshold=score)["is_id"]
    assert not pipe(picture, threshold=np.nextafter(score, 9).item())["is_id"]
    assert [len(pipe(picture, top_k=count)["top"]) for count in (1, 3)] == [1, 3]
    assert pipe(picture, tpr=0.5)["threshold"] == Threshold.of(fitted.id_scores, 0.5).value
    assert pipe(picture)["threshold"] == before.value

    strict = make(fitted, tpr=0.5, top_k=2)
    assert strict(picture)["threshold"] == Threshold.of(fitted.id_scores, 0.5).value
    assert len(strict(picture)["top"]) == 2
    assert strict(picture, threshold=0.25)["threshold"] == 0.25
    assert make(fitted, threshold=0.3)(picture)["threshold"] == 0.3
    # What was given is as it was.
    assert fitted.threshold == before


def test_a_detector_of_texts(text_model: tuple[Any, Any]) -> None:
    model, tokenizer = text_model
    texts = [f"the cat {number} sat on {number % 7}" + " mat" * (number % 3) for number in range(20)]
    detector = OODDetector(model, tokenizer, score="msp", batch_size=4).fit(texts, tpr=0.5)
    pipe = make(detector)
    assert pipe(texts, batch_size=4) == as_dicts(detector(texts))
    assert pipe(texts[0]) == as_dicts([detector(texts[0])])[0]
    assert list(pipe(KeyDataset(datasets.Dataset.from_dict({"text": texts}), "text"), batch_size=4)) == pipe(
        texts, batch_size=4
    )
    assert "is empty" in pipe(["", texts[0]], batch_size=2)[0]["error"]


def test_it_is_saved_as_a_detector_with_the_threshold_in_use(saved: OODDetector, tmp_path: Path) -> None:
    pipe = make(folder_of(tmp_path), tpr=0.5)
    pipe.save_pretrained(tmp_path / "again")
    again = OODDetector.from_pretrained(tmp_path / "again")
    assert again.threshold == Threshold.of(saved.id_scores, 0.5)
    picture = pictures(1)[0]
    assert make(str(tmp_path / "again"))(picture) == pipe(picture)


def test_what_is_no_detector_or_is_not_the_detectors_is_refused(
    detector: OODDetector, golden: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="The detector has no threshold"):
        make(detector)
    assert make(detector, threshold=0.4)(pictures(1)[0])["threshold"] == 0.4
    with pytest.raises(ValueError, match="has not been fitted"):
        make(detector, tpr=0.9)
    detector.save_pretrained(tmp_path / "detector")
    with pytest.raises(ValueError, match="The detector has no threshold"):
        make(folder_of(tmp_path))
    detector.fit(pictures(40), tpr=0.7).save_pretrained(tmp_path / "detector")
    with pytest.raises(ValueError, match=r"dtype is torch.float16, and the detector's threshold was found in"):
        make(folder_of(tmp_path), dtype="float16")
    assert make(folder_of(tmp_path), dtype="float32").dtype == torch.float32
    with pytest.raises(ValueError, match="has no parameter 'tau'; it has 'threshold', 'tpr' and 'top_k'"):
        make(folder_of(tmp_path), tau=1.0)
    with pytest.raises(ValueError, match="A detector is not loaded with device_map"):
        pipeline("ood-detection", model=folder_of(tmp_path), device_map="cpu")
    with pytest.raises(ValueError, match="There is a tokenizer beside a detector"):
        make(folder_of(tmp_path), tokenizer=folder_of(tmp_path))
    with pytest.raises(ValueError, match=r"clip_tiny has no detector\.json, so that it is no saved detector"):
        make(str(golden / "cases" / "clip_tiny"))
    with pytest.raises(ValueError, match=r"is a detector: the folder or Hub name of one.* not a CLIPModel"):
        make(detector.model)
    with pytest.raises(ValueError, match="tpr is 2"):
        make(detector)(pictures(1)[0], tpr=2)
    with pytest.raises(ValueError, match="Give either tpr or threshold"):
        make(detector, tpr=0.5, threshold=0.5)


def test_the_task_is_known_whatever_is_imported_first_and_nothing_heavy_is_imported() -> None:
    """In two processes at once, which spend their time on imports."""
    codes = [
        f"""
import sys
import {first}
import setar_peft
if {first!r} == "setar_peft":
    assert not {{"torch", "transformers", "peft"}} & set(sys.modules)
from transformers.pipelines import PIPELINE_REGISTRY
assert "ood-detection" in PIPELINE_REGISTRY.get_supported_tasks()
assert not [name for name in sys.modules if name in ("setar_peft.detection.detector", "setar_peft.backbones")]
"""
        for first in ("setar_peft", "transformers.pipelines")
    ]
    processes = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code]) for code in codes]
    assert [process.wait() for process in processes] == [0, 0]

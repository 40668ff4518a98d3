from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from setar_peft import SeTARConfig
from setar_peft.backbones import backbone_of
from setar_peft.data.images import ImageSource
from setar_peft.detection.detector import OODDetector
from setar_peft.detection.features import image_logits
from setar_peft.detection.record import Detection, Detections
from setar_peft.detection.scores import score
from setar_peft.detection.scoring import Reading, Score
from setar_peft.detection.threshold import Threshold
from setar_peft.objectives.class_prompts import ClassPrompts
from tests.demo.conftest import one_thread  # noqa: F401 - every test here uses it
from tests.detection.pictures import pictures, written

pytestmark = pytest.mark.filterwarnings("ignore:.* ID inputs are few for a level:UserWarning")
UP = "vision_model.encoder.layers.3.mlp.fc1"


def expected_scores(model: Any, processor: Any, names: list[str], images: list[Any], **settings: Any) -> np.ndarray:
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return score("gl_mcm", image_logits(model, ClassPrompts(processor, names), pixels), **settings).numpy()


def test_from_pictures_to_decisions(detector: Any, processor: Any, class_names: list[str]) -> None:
    """Against the score of all images at once, and the labels of the stock model's own forward."""
    held_out, new = pictures(20), pictures(9, seed=1)
    assert detector.fit(held_out, tpr=0.9) is detector
    expected = expected_scores(detector.model, processor, class_names, held_out)
    assert detector.threshold.value == pytest.approx(float(np.sort(expected)[2]), abs=1e-6)
    assert (detector.threshold.tpr, detector.threshold.n) == (0.9, 20)
    np.testing.assert_allclose(detector.id_scores, np.sort(expected), atol=1e-6)
    records = detector(new)
    assert isinstance(records, Detections)
    assert [record.id for record in records] == [str(number) for number in range(9)]
    np.testing.assert_allclose(
        [record.score for record in records],
        expected_scores(detector.model, processor, class_names, new),
        atol=1e-6,
    )
    inputs = processor(
        text=[f"a photo of a {name}" for name in class_names], images=new, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        probabilities = detector.model(**inputs).logits_per_image.softmax(-1)
    for record, row in zip(records, probabilities, strict=True):
        assert record.label == class_names[int(row.argmax())]
        assert record.probability == pytest.approx(float(row.max()), rel=1e-4)
        assert record.is_id == (record.score >= detector.threshold.value)
        assert record.threshold == detector.threshold.value
        assert record.top == ((record.label, record.probability),)


def test_the_share_that_was_asked_for_is_kept_of_the_inputs_of_fit(detector: Any) -> None:
    held_out = pictures(20)
    detector.fit(held_out, tpr=0.95)
    assert sum(record.is_id for record in detector(held_out)) == 19


def test_one_input_gives_one_record_and_a_list_of_one_a_list(detector: Any, tmp_path: Path) -> None:
    (path,) = written(tmp_path, 1)
    detector.at(threshold=0.5)
    picture = pictures(1)[0]
    single = detector(str(path))
    assert isinstance(single, Detection)
    assert single.id == str(path)
    for data in (path, picture, np.asarray(picture), path.read_bytes()):
        found = detector(data)
        assert isinstance(found, Detection)
        assert (found.score, found.label) == (single.score, single.label)
    for several in ([path], tmp_path, [picture]):
        found = detector(several)
        assert isinstance(found, Detections)
        assert len(found) == 1
        assert found[0].score == single.score


def test_top_k(detector: Any, class_names: list[str]) -> None:
    record = detector.at(threshold=0.0)(pictures(1)[0], top_k=99)
    assert sorted(label for label, _ in record.top) == sorted(class_names)
    probabilities = [probability for _, probability in record.top]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    with pytest.raises(ValueError, match="top_k is 0"):
        detector(pictures(1), top_k=0)


def test_what_cannot_be_read_is_a_record_or_an_exception(detector: Any, tmp_path: Path) -> None:
    paths = written(tmp_path, 9)
    paths[2].write_bytes(b"")
    paths[5].write_text("not a picture")
    paths[8] = tmp_path / "missing.png"
    detector.at(threshold=0.0)
    records = detector(paths)
    assert [record.id for record in records] == [str(path) for path in paths]
    assert [number for number, record in enumerate(records) if record.error] == [2, 5, 8]
    for number in (2, 5, 8):
        assert str(paths[number]) in records[number].error
        assert (records[number].label, records[number].score, records[number].is_id) == (None, None, None)
    assert all(record.is_id for record in records if not record.error)
    alone = detector(paths[3])
    assert records[3].score == pytest.approx(alone.score, abs=1e-6)
    with pytest.raises(ValueError, match=r"002\.png"):
        detector(paths, errors="raise")
    with pytest.raises(ValueError, match="errors is 'ignore'"):
        detector(paths, errors="ignore")


def test_what_the_model_refuses_is_a_record_and_the_others_are_decided(detector: Any, text_model: Any) -> None:
    """One text of a batch that is longer than the model's positions; an image of another size, alone in its batch."""
    model, tokenizer = text_model
    texts = ["the cat sat", "the " * 40, "the dog sat"]
    of_texts = OODDetector(model, tokenizer, score="energy").at(threshold=-100.0)
    records = of_texts(texts)
    assert [record.error is None for record in records] == [True, False, True]
    assert "1 is refused" in records[1].error
    assert "at most 32 tokens" in records[1].error
    assert records[2].score == pytest.approx(of_texts(texts[2]).score, abs=1e-5)
    pixels = processed(detector, 1)
    detector.at(threshold=0.0)
    assert "is refused: The images have shape" in detector(pixels[:, :, :-1])[0].error
    with pytest.raises(ValueError, match="is refused"):
        of_texts(texts, errors="raise")
    with pytest.raises(ValueError, match="at most 32 tokens"):
        of_texts.fit(texts)


def test_a_threshold_is_not_found_on_what_cannot_be_read(detector: Any, tmp_path: Path) -> None:
    paths = written(tmp_path, 9)
    paths[2].write_bytes(b"")
    with pytest.raises(ValueError, match=r"002\.png.*Replace it, or take it away"):
        detector.fit(paths)
    assert detector.threshold is None
    assert len(detector.id_scores) == 0


def test_an_overflow_is_an_error_and_no_verdict(detector: Any) -> None:
    detector.at(threshold=0.0)
    broken = torch.full((3, *processed(detector, 1).shape[1:]), math.nan)
    broken[1] = processed(detector, 1)[0]
    records = detector(broken)
    assert [record.error is None for record in records] == [False, True, False]
    assert records[0].is_id is None


def test_a_score_that_is_not_finite_is_an_error_and_no_verdict(
    load_clip: Any, processor: Any, class_names: list[str]
) -> None:
    def sometimes(global_logits: torch.Tensor) -> torch.Tensor:
        values = global_logits.amax(-1)
        return torch.where(values > values.median(), torch.tensor(torch.nan), values)

    detector = OODDetector(load_clip(), processor, class_names, sometimes).at(threshold=0.0)
    records = detector(pictures(4))
    assert sum(record.error is not None for record in records) == 2
    assert all("NaN" in record.error for record in records if record.error)
    assert all((record.is_id is None) == (record.error is not None) for record in records)
    with pytest.raises(ValueError, match="2 of 4 ID scores are NaN"):
        detector.fit(pictures(4))


def processed(detector: Any, count: int) -> torch.Tensor:
    return detector.processor(images=pictures(count), return_tensors="pt")["pixel_values"]


def test_a_stream_is_read_as_it_comes(detector: Any) -> None:
    """Verdicts come before the stream has ended, and are those of a call."""
    taken = []

    def stream() -> Any:
        for number, picture in enumerate(pictures(40)):
            taken.append(number)
            yield picture

    detector.at(threshold=0.0)
    records = detector.stream(stream())
    first = next(records)
    assert len(taken) <= 4 * detector.batch_size + 1
    rest = list(records)
    expected = detector(pictures(40))
    assert [record.id for record in (first, *rest)] == [record.id for record in expected]
    np.testing.assert_allclose(
        [record.score for record in (first, *rest)], [record.score for record in expected], atol=1e-6
    )


def test_between_two_records_of_a_stream_the_model_is_the_callers(detector: Any) -> None:
    """A caller may train it, or another thread use it, while a stream waits."""
    detector.at(threshold=0.0)
    detector.model.train()
    for _ in detector.stream(iter(pictures(9))):
        assert torch.is_grad_enabled()
        assert detector.model.training


def test_several_threads_may_ask_at_once(detector: Any) -> None:
    detector.at(threshold=0.0)
    images = pictures(24)
    expected = [detector(image).score for image in images]
    other = OODDetector(detector.model, detector.processor, detector.class_names).at(threshold=0.0)
    with ThreadPoolExecutor(6) as threads:
        for asked in (detector, other):
            assert [record.score for record in threads.map(asked, images)] == expected
        both = threads.map(lambda pair: pair[0](pair[1]).score, zip([detector, other] * 12, images, strict=True))
        assert list(both) == expected


def test_an_unfitted_detector_does_not_decide(detector: Any) -> None:
    for ask in (lambda: detector(pictures(1)), lambda: detector.stream(pictures(1)), lambda: detector.on("image")):
        with pytest.raises(ValueError, match=r"no threshold.*fit\(id_data\)"):
            ask()
    with pytest.raises(ValueError, match="has not been fitted"):
        detector.at(tpr=0.9)
    with pytest.raises(ValueError, match="either tpr or threshold"):
        detector.at()
    assert len(detector.scores(pictures(3))) == 3


def test_another_threshold_from_the_same_inputs(detector: Any) -> None:
    detector.fit(pictures(20), tpr=0.95)
    assert detector.at(tpr=0.5).threshold == Threshold.of(detector.id_scores, 0.5)
    assert detector.at(threshold=1.5).threshold == Threshold(1.5)


@pytest.mark.parametrize("change", ["weight", "adapter", "merge", "disable"])
def test_a_model_that_was_changed_is_refused(
    load_clip: Any, processor: Any, class_names: list[str], change: str
) -> None:
    """Its class prompts were encoded, and its threshold found, with the model as it was."""
    model = get_peft_model(load_clip(), SeTARConfig(target_modules=[UP], rank_ratios={UP: 0.5}))
    model.add_adapter("other", SeTARConfig(target_modules=[UP], rank_ratios={UP: 0.25}))
    detector = OODDetector(model, processor, class_names).at(threshold=0.0)
    before = detector(pictures(1)[0])
    if change == "weight":
        with torch.no_grad():
            model.get_parameter("base_model.model.visual_projection.weight").mul_(2)
    elif change == "adapter":
        model.set_adapter("other")
    elif change == "merge":
        model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
    for ask in (detector, detector.scores, detector.features, detector.fit):
        with pytest.raises(ValueError, match="has been changed since the detector was made"):
            ask(pictures(2))
    if change == "adapter":
        model.set_adapter("default")
        assert detector(pictures(1)[0]) == before


def _assigned(model: Any) -> None:
    model.load_state_dict(
        {name: 1.5 * value if value.is_floating_point() else value for name, value in model.state_dict().items()},
        assign=True,
    )


def _data_replaced(model: Any) -> None:
    model.visual_projection.weight.data = model.visual_projection.weight.data.flip(0)


@pytest.mark.parametrize(
    "change", [lambda model: model.half(), lambda model: model.to(torch.bfloat16), _assigned, _data_replaced]
)
def test_changes_that_torch_does_not_count_are_seen(
    load_clip: Any, processor: Any, class_names: Any, change: Any
) -> None:
    model = load_clip()
    detector = OODDetector(model, processor, class_names).at(threshold=0.0)
    change(model)
    with pytest.raises(ValueError, match="its weights, their dtype, or which adapters"):
        detector(pictures(1)[0])


def test_what_is_written_through_data_is_seen_when_a_threshold_is_found_or_saved(detector: Any, tmp_path: Path) -> None:
    """As averages of weights are swapped in; torch counts nothing there."""
    detector.at(threshold=0.0).model.visual_projection.weight.data.mul_(-1)
    for ask in (lambda: detector.fit(pictures(2)), lambda: detector.save_pretrained(tmp_path / "saved")):
        with pytest.raises(ValueError, match="has been changed since the detector was made"):
            ask()
    assert not (tmp_path / "saved").exists()


def test_how_strongly_an_adapter_counts_is_seen(load_clip: Any, processor: Any, class_names: list[str]) -> None:
    model = get_peft_model(load_clip(), LoraConfig(target_modules=[UP], init_lora_weights=False))
    detector = OODDetector(model, processor, class_names).at(threshold=0.0)
    model.get_submodule(f"base_model.model.{UP}").set_scale("default", 3.0)
    with pytest.raises(ValueError, match="how strongly"):
        detector(pictures(1)[0])


def test_what_leaves_the_values_as_they_are_is_no_change(
    load_clip: Any, processor: Any, class_names: list[str]
) -> None:
    """Copies and pickles lie elsewhere; merging and its undoing writes, to the bit."""
    model = get_peft_model(load_clip(), SeTARConfig(target_modules=[UP], rank_ratios={UP: 0.5}))
    detector = OODDetector(model, processor, class_names).at(threshold=0.0)
    before = detector(pictures(2))
    assert copy.deepcopy(detector)(pictures(2)) == before
    assert pickle.loads(pickle.dumps(detector))(pictures(2)) == before
    model.merge_adapter()
    model.unmerge_adapter()
    weight = model.get_parameter("base_model.model.visual_projection.weight")
    weight.data = weight.data.clone()
    assert detector(pictures(2)) == before
    model.get_parameter("base_model.model.visual_projection.weight").data.mul_(2)
    with pytest.raises(ValueError, match="has been changed"):
        detector.fit(pictures(2))


def test_settings_that_make_no_score_are_refused_at_once(
    load_clip: Any, processor: Any, class_names: list[str]
) -> None:
    for temperature in (0, -1.0, math.nan, math.inf, "1", True):
        with pytest.raises(ValueError, match=r"temperature is .*; give a finite number above 0"):
            OODDetector(load_clip(), processor, class_names, temperature=temperature)
    with pytest.raises(ValueError, match="batch_size is 0"):
        OODDetector(load_clip(), processor, class_names, batch_size=0)


def test_columns_of_ones_own_are_not_replaced(detector: Any) -> None:
    """Else what was thought to be the truth would be the prediction, and all of it right."""
    data = datasets.Dataset.from_dict({"image": [np.asarray(picture) for picture in pictures(2)], "label": ["a", "b"]})
    detector.at(threshold=0.0)
    with pytest.raises(ValueError, match=r"has a column 'label' of its own.*prefix='detected_'"):
        data.map(detector.on("image"), batched=True)
    found = data.map(detector.on("image", prefix="detected_"), batched=True)
    assert found["label"] == ["a", "b"]
    assert found["detected_label"] == [record.label for record in detector(list(data["image"]))]


def test_a_detector_of_a_peft_model_decides_by_its_adapter(
    load_clip: Any, processor: Any, class_names: list[str]
) -> None:
    model = load_clip()
    base = OODDetector(model, processor, class_names).scores(pictures(5))["score"]
    peft_model = get_peft_model(model, SeTARConfig(target_modules=[UP], rank_ratios={UP: 0.5}))
    truncated = OODDetector(peft_model, processor, class_names).scores(pictures(5))["score"]
    merged = OODDetector(peft_model.merge_and_unload(), processor, class_names).scores(pictures(5))["score"]
    assert np.abs(base - truncated).max() > 1e-5
    np.testing.assert_allclose(truncated, merged, atol=1e-5)


def test_prompts_are_encoded_once(load_clip: Any, processor: Any, class_names: list[str]) -> None:
    model = load_clip()
    calls = []
    model.text_model.final_layer_norm.register_forward_pre_hook(lambda *_: calls.append(1))
    detector = OODDetector(model, processor, class_names).at(threshold=0.0)
    made = len(calls)
    assert made
    detector(pictures(9))
    detector.scores(pictures(9))
    detector.fit(pictures(9))
    assert len(calls) == made


def test_columns_have_a_row_for_every_input(detector: Any, tmp_path: Path) -> None:
    paths = written(tmp_path, 6)
    paths[4].write_bytes(b"")
    scores, features = detector.scores(paths), detector.features(paths)
    assert scores.ids == features.ids == [str(path) for path in paths]
    assert scores["score"].dtype == features["features"].dtype == np.float32
    assert np.flatnonzero(np.isnan(scores["score"])).tolist() == [4]
    assert scores["label"][4] == ""
    assert np.isnan(features["features"][4]).all()
    lengths = np.linalg.norm(np.delete(features["features"], 4, axis=0), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)
    assert list(scores.errors) == [str(paths[4])]
    detector.at(threshold=0.0)
    assert [record.score for record in detector(paths) if not record.error] == np.delete(scores["score"], 4).tolist()


def test_a_classifier_knows_its_classes(golden: Path) -> None:
    from transformers import Swinv2ForImageClassification

    model = Swinv2ForImageClassification.from_pretrained(golden / "cases" / "swin_tiny").eval()
    named = {number: f"class {number}" for number in range(model.config.num_labels)}
    model.config.id2label = named
    side = model.config.image_size
    pixels = torch.randn(6, model.config.num_channels, side, side, generator=torch.Generator().manual_seed(0))
    detector = OODDetector(model, None, score="msp").fit(pixels, tpr=0.5)
    assert detector.prompt is None
    assert detector.settings == {"temperature": 1.0}
    with torch.no_grad():
        expected = model(pixels).logits.softmax(-1).amax(-1)
    np.testing.assert_allclose([record.score for record in detector(pixels)], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="class_names are not the model's"):
        OODDetector(model, None, ["a", "b"], score="msp")
    model.config.id2label = {number: f"LABEL_{number}" for number in named}
    with pytest.raises(ValueError, match="does not name its classes"):
        OODDetector(model, None, score="msp")


def test_the_settings_of_the_score(load_clip: Any, processor: Any, class_names: list[str]) -> None:
    model = load_clip()
    scale = float(model.logit_scale.detach().exp())
    assert OODDetector(model, processor, class_names).settings == {
        "temperature": pytest.approx(scale),
        "pooling": "patch",
        "local_weight": 1.0,
    }
    chosen = OODDetector(model, processor, class_names, {"gl_mcm": {"local_weight": 0.5}}, temperature=7.0)
    assert (chosen.settings["local_weight"], chosen.settings["temperature"]) == (0.5, 7.0)
    images = pictures(3)
    np.testing.assert_allclose(
        chosen.scores(images)["score"],
        expected_scores(model, processor, class_names, images, temperature=7.0, local_weight=0.5),
        atol=1e-6,
    )
    assert "gl_mcm at temperature 7" in repr(chosen)
    with pytest.raises(ValueError, match="decides by one"):
        OODDetector(model, processor, class_names, {"mcm": {}, "gl_mcm": {}})
    with pytest.raises(ValueError, match="give class_names"):
        OODDetector(model, processor)


class _Centred(Score):
    """The distance from the mean feature of some ID inputs, which has to be found first."""

    def __init__(self, mean: torch.Tensor | None = None) -> None:
        super().__init__(self._distance, name="centred")
        self._mean, self.seen = mean, 0

    def _distance(self, features: torch.Tensor) -> torch.Tensor:
        return -(features - self._mean).norm(dim=-1)

    @property
    def needs_fit(self) -> bool:
        return self._mean is None

    def fit(self, readings: Any) -> _Centred:
        parts = [reading.features.pooled for reading in readings]
        assert all(isinstance(part, torch.Tensor) for part in parts)
        fitted = _Centred(torch.cat(parts).mean(0))
        fitted.seen = len(torch.cat(parts))
        return fitted


def test_a_score_that_is_fitted_itself_sees_other_inputs_than_the_threshold(
    load_clip: Any, processor: Any, class_names: list[str]
) -> None:
    detector = OODDetector(load_clip(), processor, class_names, _Centred())
    for ask in (detector.scores, lambda images: detector.at(threshold=0.0)):
        with pytest.raises(ValueError, match="has to be fitted itself"):
            ask(pictures(2))
    images = pictures(11)
    features = torch.from_numpy(detector.features(images)["features"])
    detector.fit(images)
    assert detector.threshold.n == 5
    expected = -(features[1::2] - features[0::2].mean(0)).norm(dim=-1)
    np.testing.assert_allclose(detector.id_scores, expected.sort().values, atol=1e-5)
    # Fitted again it begins anew, and other inputs may be given.
    detector.fit(images[:4], fit_data=images[4:])
    assert detector.threshold.n == 4
    expected = -(features[:4] - features[4:].mean(0)).norm(dim=-1)
    np.testing.assert_allclose(detector.id_scores, expected.sort().values, atol=1e-5)
    with pytest.raises(ValueError, match="two ID inputs or more"):
        detector.fit(images[:1])
    with pytest.raises(ValueError, match="nothing to fit"):
        OODDetector(load_clip(), processor, class_names).fit(images, fit_data=images)


def test_a_score_that_the_model_cannot_give_is_refused_at_once(
    load_clip: Any, processor: Any, class_names: list[str], golden: Path
) -> None:
    from transformers import Swinv2ForImageClassification

    with pytest.raises(ValueError, match=r"neglabel compares with labels.*give negative_labels"):
        OODDetector(load_clip(), processor, class_names, "neglabel")
    swin = Swinv2ForImageClassification.from_pretrained(golden / "cases" / "swin_tiny").eval()
    names = [f"class {number}" for number in range(swin.config.num_labels)]
    swin.config.id2label = dict(enumerate(names))
    with pytest.raises(ValueError, match="no class token that runs through all blocks"):
        OODDetector(swin, None, names, "layer_fusion:mcm")


def test_a_column_of_a_data_set(detector: Any) -> None:
    from datasets import Dataset

    images = pictures(10)
    detector.fit(images, tpr=0.5)
    dataset = Dataset.from_dict({"image": images, "key": list(range(10))})
    mapped = dataset.map(detector.on("image"), batched=True, batch_size=4)
    assert mapped["key"][:] == list(range(10))
    assert mapped["score"][:] == [record.score for record in detector(images)]
    assert mapped["is_id"][:] == [record.is_id for record in detector(images)]
    with pytest.raises(ValueError, match="no 'picture'"):
        detector.on("picture")({"image": images})


def test_labels_of_an_image_source_are_not_needed_and_do_no_harm(
    detector: Any, class_names: list[str], processor: Any
) -> None:
    images = pictures(6)
    source = ImageSource(processor, images, [0, 1, 2, 3, 4, 5], class_names=class_names)
    assert detector.fit(source, tpr=0.5).threshold == detector.fit(images, tpr=0.5).threshold


def test_bfloat16_scores_are_float32(load_clip: Any, processor: Any, class_names: list[str]) -> None:
    detector = OODDetector(load_clip().to(torch.bfloat16), processor, class_names)
    found = detector.scores(pictures(30))["score"]
    assert found.dtype == np.float32
    assert len(set(found.tolist())) > 20


def test_texts_take_the_place_of_images(text_model: tuple[Any, Any]) -> None:
    model, tokenizer = text_model
    texts = [f"the cat number {number} sat" for number in range(12)]
    detector = OODDetector(model, tokenizer, score="energy").fit(texts, tpr=0.75)
    with torch.no_grad():
        expected = [float(model(**tokenizer([text], return_tensors="pt")).logits.logsumexp(-1)) for text in texts]
    np.testing.assert_allclose(detector.id_scores, np.sort(expected), rtol=1e-4)
    record = detector(texts[0])
    assert isinstance(record, Detection)
    assert record.score == pytest.approx(expected[0], rel=1e-4)
    assert record.label in model.config.id2label.values()
    assert len(detector(texts[:1])) == 1


def test_a_reading_is_what_scores_see(detector: Any) -> None:
    """`fit` of a score gets logits, features and labels of every input, in order."""
    seen: list[Reading] = []

    class Watching(_Centred):
        def fit(self, readings: Any) -> _Centred:
            seen.extend(readings)
            return super().fit(iter(seen))

    images = pictures(6)
    watching = OODDetector(detector.model, detector.processor, detector.class_names, Watching())
    watching.fit(images, fit_data=images)
    pixels = detector.processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = backbone_of(detector.model).image_features(pixels).pooled
    found = torch.cat([reading.features.pooled for reading in seen])
    torch.testing.assert_close(found, torch.nn.functional.normalize(features, dim=-1), rtol=1e-4, atol=1e-5)
    assert torch.cat([reading.labels for reading in seen]).tolist() == [-1] * 6

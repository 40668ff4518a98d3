"""Evaluations of models against the published scores, the stock models, and themselves otherwise computed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import Swinv2ForImageClassification

from setar_peft import SeTARConfig
from setar_peft.backbones import backbone_of
from setar_peft.data.images import ImageSource
from setar_peft.detection.detector import OODDetector
from setar_peft.detection.evaluation import evaluate
from setar_peft.detection.features import image_logits
from setar_peft.detection.figures import SetScores
from setar_peft.detection.metrics import ood_metrics
from setar_peft.detection.scores import SCORES, gl_mcm, local_mcm, mcm, score
from setar_peft.detection.scoring import Reading, Score
from setar_peft.objectives.class_prompts import ClassPrompts
from tests.demo.conftest import one_thread  # noqa: F401 - every test here uses it
from tests.detection.pictures import pictures, written
from tests.search.processes import in_two_processes

# The published code's names; its figures have the sign turned: there lower means ID.
PUBLISHED = {
    "mcm": "mcm_score",
    "local_mcm": "l_mcm_score",
    "gl_mcm": "gl_mcm_score",
    "energy": "energy_score",
    "entropy": "entropy_score",
    "variance": "var_score",
}
LABELS = torch.arange(6).repeat_interleave(4)
UP = "vision_model.encoder.layers.2.mlp.fc1"
# What reads neither features nor labels that are none of the classes.
OF_LOGITS = [name for name, known in SCORES.items() if "negative_logits" not in known.reads]


@pytest.fixture
def model(load_clip: Callable[..., Any]) -> Any:
    return load_clip()


@pytest.fixture
def pixels(golden_clip: dict[str, Tensor]) -> Tensor:
    return golden_clip["pixel_values"]


@pytest.fixture
def labelled(pixels: Tensor, class_names: list[str]) -> Callable[..., ImageSource]:
    """The first of the golden images with their labels."""

    def source(count: int = 12, batch_size: int = 5) -> ImageSource:
        return ImageSource(None, pixels[:count], LABELS[:count], class_names=class_names, batch_size=batch_size)

    return source


@pytest.fixture
def evaluated(model: Any, processor: Any, pixels: Tensor, labelled: Any) -> Callable[..., Any]:
    """The golden CLIP on its first 12 images, labelled, against the rest."""

    def run(scores: Any = None, one: Any = None, **settings: Any) -> Any:
        chosen = {"processor": processor, "resamples": 0} | settings
        return evaluate(model if one is None else one, labelled(), {"rest": pixels[12:]}, scores, **chosen)

    return run


def all_scores(evaluation: Any, name: str, model: str = "model") -> Tensor:
    sets = evaluation.models[model].sets.values()
    return torch.cat([torch.from_numpy(images.scores[name]) for images in sets])


def stock_logits(model: Any, processor: Any, names: list[str], pixels: Tensor) -> Tensor:
    tokens = processor.tokenizer([f"a photo of a {name}" for name in names], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(pixel_values=pixels, **tokens).logits_per_image


def test_scores_and_predictions_are_those_of_the_stock_model(
    evaluated: Any, model: Any, processor: Any, class_names: list[str], pixels: Tensor
) -> None:
    found = evaluated(OF_LOGITS)
    expected = stock_logits(model, processor, class_names, pixels)
    logits = image_logits(model, ClassPrompts(processor, class_names), pixels)
    for name in OF_LOGITS:
        torch.testing.assert_close(all_scores(found, name), score(name, logits), rtol=1e-5, atol=1e-5)
    known = found.models["model"].id_set
    assert known.predictions.tolist() == expected[:12].argmax(-1).tolist()
    np.testing.assert_allclose(known.confidence, expected[:12].softmax(-1).amax(-1).numpy(), rtol=1e-3)
    assert known.labels.tolist() == LABELS[:12].tolist()
    assert found.accuracy() == float((expected[:12].argmax(-1) == LABELS[:12]).float().mean())
    assert {values.dtype for values in known.scores.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_the_defaults_give_the_published_codes_scores_of_cosines(
    evaluated: Any, golden: Path, name: str, published: str
) -> None:
    """The scores at temperature 100, and energy, which the published code divides, too, when it is asked for."""
    found = evaluated({"energy": {"temperature": 100}} if name == "energy" else [name])
    ours = all_scores(found, name).double()
    figures = load_file(golden / "tensors_clip_tiny.safetensors")
    torch.testing.assert_close(ours, -figures[f"score.T100.{published}"], rtol=1e-5, atol=2e-6)
    assert (ours + figures[f"score.T1.{published}"]).abs().max() > 0.02
    assert found.models["model"].settings[name]["temperature"] == pytest.approx(100, rel=1e-6)


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_a_classifier_needs_neither_names_nor_prompts(golden: Path, name: str, published: str) -> None:
    classifier = Swinv2ForImageClassification.from_pretrained(golden / "cases" / "swin_tiny").eval()
    classifier.config.id2label = {index: f"thing {index}" for index in range(6)}
    figures = load_file(golden / "tensors_swin_tiny.safetensors")
    images = figures["pixel_values_first4"]
    found = evaluate(classifier, images, {"same": images}, [name], resamples=0)
    ours = all_scores(found, name).double()[:4]
    torch.testing.assert_close(ours, -figures[f"score.T1.{published}"][:4], rtol=1e-5, atol=1e-5)
    assert f"{name} (temperature 1). No prompts." in found.convention()
    assert math.isnan(found.accuracy())
    assert found.class_names == [f"thing {index}" for index in range(6)]


def test_a_score_takes_its_settings_by_name(
    evaluated: Any, model: Any, processor: Any, class_names: list[str], pixels: Tensor
) -> None:
    scores = {"mcm": {}, "gl_mcm": {"local_weight": 0.5, "temperature": 50.0}}
    found = evaluated(scores)
    logits = image_logits(model, ClassPrompts(processor, class_names), pixels)
    expected = mcm(logits.pooled, 50) + 0.5 * local_mcm(logits.local, 50)
    torch.testing.assert_close(all_scores(found, "gl_mcm"), expected)
    assert found.score_label("mcm") == "mcm (temperature 100)"
    assert found.score_label("gl_mcm") == "gl_mcm (temperature 50, local weight 0.5)"
    settings = evaluated(scores, temperature=20.0).to_dict()["models"]["model"]["scores"]
    assert (settings["mcm"]["temperature"], settings["gl_mcm"]["temperature"]) == (20.0, 50.0)
    assert settings["gl_mcm"]["local_weight"] == 0.5
    own = evaluated(Score(lambda global_logits: global_logits.amax(-1), name="mine"))
    torch.testing.assert_close(all_scores(own, "mine"), logits.pooled.amax(-1), rtol=1e-5, atol=1e-4)
    assert own.score_label("mine") == "mine"


def test_figures_are_scikit_learns_at_the_convention_asked_for(evaluated: Any) -> None:
    found = evaluated(["mcm"], positive="ood", threshold="closest", tpr=0.9)
    scores = all_scores(found, "mcm").numpy()
    metrics = found.metrics("rest", "mcm")
    assert metrics.auroc == pytest.approx(roc_auc_score(np.arange(24) < 12, scores))
    assert metrics == ood_metrics(scores[:12], scores[12:], positive="ood", threshold="closest", tpr=0.9)
    assert "FPR90: share of ID images taken for OOD at the threshold where closest to 90 %" in found.convention()


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_how_images_are_cut_changes_rounding_alone(
    evaluated: Any, model: Any, processor: Any, labelled: Any, pixels: Tensor, batch_size: int
) -> None:
    whole = evaluated()
    parts = evaluate(
        model, labelled(batch_size=batch_size), {"rest": pixels[12:]}, processor=processor, batch_size=batch_size
    )
    for name in ("mcm", "gl_mcm"):
        torch.testing.assert_close(all_scores(parts, name), all_scores(whole, name))


def adapted(model: Any) -> Any:
    return get_peft_model(model, SeTARConfig(target_modules=[UP], rank_ratios={UP: 0.4}))


def count_blocks(model: Any) -> list[int]:
    """How often any block ran, and any of the text tower, as they go on counting."""
    counts = [0, 0]

    def hook(place: int) -> Callable[..., None]:
        def counted(*_: Any) -> None:
            counts[place] += 1

        return counted

    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_hook(hook(int("text_model" in name)))
    return counts


def test_adapters_of_one_model_are_compared_in_one_pass(evaluated: Any, model: Any) -> None:
    base = evaluated()
    peft_model = adapted(model)
    alone = evaluated(one=peft_model)
    counts = count_blocks(model)
    both = evaluated(one=peft_model, adapters={"base": None, "SeTAR": "default"}, resamples=20)
    # 3 + 1 batches: two blocks once for both, the others and all text blocks for each.
    blocks = {name: len(tower.blocks) for name, tower in backbone_of(model).towers.items()}
    assert counts == [4 * (2 + 2 * (blocks["vision"] - 2)), 2 * blocks["text"]]
    for name in ("mcm", "gl_mcm"):
        assert torch.equal(all_scores(both, name, "base"), all_scores(base, name))
        assert torch.equal(all_scores(both, name, "SeTAR"), all_scores(alone, name))
    assert both.metrics("rest", "mcm", "SeTAR") == alone.metrics("rest", "mcm")
    assert [(row.model, row.baseline) for row in both.differences] == [("SeTAR", "base")] * 2
    assert both.models["base"].about["adapter"] is None
    assert both.models["SeTAR"].about["adapter"] == "default"
    assert alone.models["model"].about["adapter"] == ["default"]


def test_models_by_name_are_compared_on_the_same_images(
    evaluated: Any, model: Any, load_clip: Any, processor: Any
) -> None:
    merged = adapted(load_clip()).merge_and_unload()
    detector = OODDetector(merged, processor, ["cat", "dog", "red car", "tree frog", "sailing ship", "cup"])
    found = evaluated(["gl_mcm"], {"stock": model, "detector": detector}, processor={"stock": processor})
    assert torch.equal(all_scores(found, "gl_mcm", "stock"), all_scores(evaluated(), "gl_mcm"))
    alone = evaluated(one=merged)
    torch.testing.assert_close(all_scores(found, "gl_mcm", "detector"), all_scores(alone, "gl_mcm"))
    assert len(found.differences) == 1


def test_a_detector_is_evaluated_with_its_own_score(evaluated: Any, detector: Any, pixels: Tensor) -> None:
    found = evaluated(one=detector, processor=None)
    assert list(found.models["model"].settings) == ["gl_mcm"]
    np.testing.assert_array_equal(
        found.models["model"].ood_sets["rest"].scores["gl_mcm"],
        detector.scores(ImageSource(None, pixels[12:]))["score"],
    )
    assert found.prompt == "a photo of a {class}"
    warmer = evaluated(one=detector, temperature=50.0)
    assert warmer.models["model"].settings["gl_mcm"]["temperature"] == 50.0
    other = evaluated(["mcm"], detector)
    assert torch.equal(all_scores(other, "mcm"), all_scores(evaluated(["mcm"]), "mcm"))
    with torch.no_grad():
        detector.model.visual_projection.weight.mul_(2)
    with pytest.raises(ValueError, match="has been changed since the detector was made"):
        evaluated(one=detector)


def test_texts_are_evaluated_as_images_are(text_model: tuple[Any, Any]) -> None:
    model, tokenizer = text_model
    known, unknown = [f"the cat sat on {number}" for number in range(9)], ["the dog", "number 3", "dog on mat"]
    found = evaluate(model, known, {"dogs": unknown}, ["msp", "energy"], processor=tokenizer, resamples=0, batch_size=4)
    with torch.no_grad():
        logits = model(**tokenizer(known + unknown, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(all_scores(found, "energy"), logits.logsumexp(-1), rtol=1e-4, atol=1e-5)
    assert found.class_names == ["small talk", "weather", "banking"]
    assert found.shown is not None
    assert found.shown("dogs", 1) == "number 3"
    assert found.shown("ID", 8) == "the cat sat on 8"


def test_labels_come_from_folders_where_they_are_asked_for(
    model: Any, processor: Any, golden: Path, tmp_path: Path
) -> None:
    names = json.loads((golden / "cases" / "folders.json").read_text())
    written(tmp_path / "noise", 5)
    settings: dict[str, Any] = {"processor": processor, "class_names": names, "resamples": 0, "batch_size": 8}
    folder, oods = golden / "cases" / "images", {"noise": tmp_path / "noise"}
    found = evaluate(model, folder, oods, labelled=True, **settings)
    assert found.models["model"].id_set.labels.tolist() == LABELS.tolist()
    assert 0 <= found.accuracy() <= 1
    plain = evaluate(model, folder, oods, **settings)
    assert math.isnan(plain.accuracy())
    assert plain.rows == found.rows
    assert plain.models["model"].id_set.ids[0].endswith("c000/im0.png")
    assert plain.shown is not None
    assert plain.shown("noise", 2).size == (30, 40)


def test_what_cannot_be_read_is_raised_or_left_out_and_counted(
    model: Any, processor: Any, class_names: list[str], tmp_path: Path
) -> None:
    paths = written(tmp_path, 9)
    paths[2].write_bytes(b"")
    paths[7].write_text("no picture")
    settings: dict[str, Any] = {"processor": processor, "class_names": class_names, "resamples": 0, "batch_size": 4}
    with pytest.raises(ValueError, match=r"002\.png cannot be read.*errors='leave_out'"):
        evaluate(model, pictures(6), {"files": paths}, **settings)
    found = evaluate(model, pictures(6), {"files": paths}, errors="leave_out", **settings)
    files = found.models["model"].ood_sets["files"]
    assert list(files.ids) == [str(path) for number, path in enumerate(paths) if number not in (2, 7)]
    assert files.numbers.tolist() == [0, 1, 3, 4, 5, 6, 8]
    assert list(files.left_out) == [str(paths[2]), str(paths[7])]
    assert "2 images of files could not be read and are left out." in found.table().replace("\n", " ")
    rest = evaluate(model, pictures(6), {"files": [paths[number] for number in files.numbers]}, **settings)
    np.testing.assert_allclose(rest.models["model"].ood_sets["files"].scores["mcm"], files.scores["mcm"], atol=1e-6)
    with pytest.raises(ValueError, match=r"None of the 2 inputs of the set 'broken' can be read\. .*002\.png"):
        evaluate(model, pictures(6), {"broken": [paths[2], paths[7]]}, errors="leave_out", **settings)


def test_a_score_of_nan_names_the_images(evaluated: Any) -> None:
    def odd(global_logits: Tensor) -> Tensor:
        return torch.where(torch.arange(len(global_logits)) == 1, math.nan, global_logits.amax(-1))

    with pytest.raises(ValueError, match=r"'odd' of model 'model' is NaN or infinite for 3 of 12 .* 'ID': 1, 6, 11"):
        evaluated([odd])


class Centre(Score):
    """Minus the distance from the mean feature of what it was fitted on."""

    def __init__(self, centre: Tensor | None = None) -> None:
        super().__init__(self._distance, name="centre")
        self.centre = centre

    def _distance(self, features: Tensor) -> Tensor:
        assert self.centre is not None
        return -(features - self.centre).norm(dim=-1)

    @property
    def needs_fit(self) -> bool:
        return self.centre is None

    def fit(self, readings: Any, **given: Any) -> Score:
        features: list[Reading] = list(readings)
        return Centre(torch.cat([one.features.pooled for one in features]).mean(0))


def test_a_score_that_is_fitted_is_fitted_on_other_data(
    evaluated: Any, model: Any, processor: Any, class_names: list[str], pixels: Tensor, labelled: Any
) -> None:
    peft_model = adapted(model)
    settings = {"one": peft_model, "adapters": {"base": None, "SeTAR": "default"}}
    found = evaluated([Centre(), "mcm"], fit_data=pixels[16:].flip(0), **settings)
    for name, using in (("base", peft_model.disable_adapter), ("SeTAR", None)):
        with using() if using else torch.no_grad(), torch.no_grad():
            features = model.get_image_features(pixel_values=pixels)
        features = getattr(features, "pooler_output", features)
        features = features / features.norm(dim=-1, keepdim=True)
        expected = -(features - features[16:].mean(0)).norm(dim=-1)
        torch.testing.assert_close(all_scores(found, "centre", name), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'centre' has to be fitted on ID data first; give fit_data"):
        evaluated([Centre()])
    with pytest.raises(ValueError, match="None of the scores 'mcm' has to be fitted; leave fit_data out"):
        evaluated(["mcm"], fit_data=pixels[16:])
    for same in (labelled(), pixels[:12], pixels[3:9]):
        with pytest.raises(ValueError, match="fit_data are the test data"):
            evaluated([Centre()], fit_data=same)
    with pytest.warns(UserWarning, match="1 of 5 inputs of fit_data are test data, too"):
        evaluated([Centre()], fit_data=pixels[11:16])


def test_models_are_left_in_the_mode_they_were_in(evaluated: Any, model: Any, processor: Any, pixels: Tensor) -> None:
    model.train()
    model.text_model.eval()
    before = [module.training for module in model.modules()]
    evaluated()
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="The images have shape"):
        evaluate(model, pixels[..., :16], {"rest": pixels}, processor=processor, class_names=["a", "b"])
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ood_data": {}}, "ood_data is empty"),
        ({"ood_data": [1]}, "ood_data is a list; give OOD sets by name"),
        ({"ood_data": {"folder": "nowhere/"}}, "nowhere"),
        ({"ood_data": {"mean": torch.ones(2, 3, 32, 32)}}, "An OOD set is called 'mean'"),
        ({"model": {}}, "model is an empty mapping"),
        ({"scores": ["best"]}, "score is 'best'; write one of"),
        ({"scores": []}, "scores is empty"),
        ({"scores": {"mcm": 100}}, r"scores is \{'mcm': 100\}; give each score its settings by name"),
        ({"scores": {"mcm": {"local_weight": 1.0}}}, "mcm has no setting 'local_weight'; it has 'temperature'"),
        ({"scores": {"mcm": {"temperature": 0.0}}}, r"temperature is 0\.0; give a positive number"),
        ({"errors": "ignore"}, "errors is 'ignore'; write 'raise' or 'leave_out'"),
        ({"positive": "OOD"}, "positive is 'OOD'"),
        ({"threshold": "nearest"}, "threshold is 'nearest'"),
        ({"tpr": 95}, "tpr is 95"),
        ({"resamples": -1}, "resamples is -1"),
        ({"adapters": {"base": None}}, "the model is a CLIPModel without any"),
        ({"class_names": ["cat", "dog"]}, "are not the model's 2 classes in its order"),
        ({"id_data": torch.zeros(2, 3, 32, 32)}, "CLIPModel does not name its classes; give class_names"),
    ],
)
def test_wrong_input_gets_a_sentence(
    model: Any, processor: Any, labelled: Any, pixels: Tensor, changes: dict[str, Any], message: str
) -> None:
    arguments = {"model": model, "id_data": labelled(), "ood_data": {"rest": pixels[12:]}, "processor": processor}
    with pytest.raises(ValueError, match=message):
        evaluate(**arguments | changes)


def test_several_models_take_no_adapters(model: Any, evaluated: Any, detector: Any) -> None:
    for several in ({"a": model, "b": model}, detector):
        with pytest.raises(ValueError, match="adapters are variants of one PEFT model"):
            evaluated(one=several, adapters={"base": None})


def test_progress_is_shown_on_standard_error(evaluated: Any, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(progress=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert "24/24" in said.err


def test_memory_holds_scores_and_no_logits() -> None:
    assert "logits" not in SetScores.__dataclass_fields__


PROCESS = """
import pathlib, sys
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor
from setar_peft.detection.evaluation import evaluate
from setar_peft.processes import Processes

golden, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
model = CLIPModel.from_pretrained(golden / "cases" / "clip_tiny", attn_implementation="eager").eval()
side = model.config.vision_config.image_size
processor = CLIPProcessor(
    image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
    tokenizer=AutoTokenizer.from_pretrained(golden / "cases" / "clip_tiny"),
)
pixels = load_file(golden / "tensors_clip_tiny.safetensors")["pixel_values"]
index = Processes(model.device).index
settings = dict(processor=processor, class_names=["a", "b", "c"], batch_size=4, resamples=20, cache=folder / "cache")
for name, images, errors in (
    ("whole", "whole", "raise"),
    ("again", "whole", "raise"),
    ("broken", "broken", "leave_out"),
    ("small", "small", "raise"),
    ("refused", "broken", "raise"),
):
    try:
        found = evaluate(model, pixels[:11], {"files": folder / images}, errors=errors, **settings)
    except ValueError as error:
        (folder / f"{name}{index}.txt").write_text(str(error))
    else:
        (folder / f"{name}{index}.json").write_text(found.to_json())
        found.to_parquet(folder / f"{name}{index}.parquet")
"""


def test_two_processes_give_the_figures_of_one_exactly(
    golden: Path, tmp_path: Path, model: Any, processor: Any, pixels: Tensor
) -> None:
    """3 and 4 batches of 4, the last ones not full: no image twice, none missing, the same bits; twice from a cache."""
    written(tmp_path / "whole", 14)
    written(tmp_path / "small", 3)  # one batch, so that a process has none
    for number, path in enumerate(written(tmp_path / "broken", 14)):
        if number in (6, 9):
            path.write_bytes(b"")
    arguments = ["-c", PROCESS, str(golden), str(tmp_path)]
    in_two_processes(lambda _: arguments)
    settings: dict[str, Any] = {"processor": processor, "class_names": ["a", "b", "c"], "batch_size": 4}
    for name, images, left_out in (
        ("whole", "whole", 0),
        ("again", "whole", 0),
        ("broken", "broken", 2),
        ("small", "small", 0),
    ):
        errors: Any = "leave_out" if left_out else "raise"
        files = {"files": tmp_path / images}
        one = evaluate(model, pixels[:11], files, resamples=20, errors=errors, **settings)
        one.to_parquet(tmp_path / "one.parquet")
        assert len(one.models["model"].ood_sets["files"].left_out) == left_out
        for index in (0, 1):
            assert json.loads((tmp_path / f"{name}{index}.json").read_text()) == json.loads(one.to_json())
            assert (tmp_path / f"{name}{index}.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    # What one process cannot read, both refuse; number 6 is in the second batch, which is the second process's.
    refused = [(tmp_path / f"refused{index}.txt").read_text() for index in (0, 1)]
    assert all("006.png cannot be read" in sentence for sentence in refused)


def test_golden_logits_give_golden_scores(evaluated: Any, golden_clip: dict[str, Tensor], model: Any) -> None:
    model.logit_scale.data.fill_(math.log(100))
    found = evaluated(["mcm", "gl_mcm"])
    global_logits, local_logits = golden_clip["logits_global"], golden_clip["logits_local"].flatten(1, 2)
    torch.testing.assert_close(all_scores(found, "mcm"), mcm(global_logits, 100), atol=1e-4, rtol=0)
    torch.testing.assert_close(all_scores(found, "gl_mcm"), gl_mcm(global_logits, local_logits, 100), atol=1e-4, rtol=0)

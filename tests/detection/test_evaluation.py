from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from transformers import CLIPModel, CLIPTokenizer, Swinv2ForImageClassification

import setar_peft
from setar_peft import LoCoOpObjective, SeTARConfig
from setar_peft.backbones import backbone_of
from setar_peft.data.images import ImageSource
from setar_peft.detection import evaluation
from setar_peft.detection.evaluation import evaluate, image_logits, image_scores
from setar_peft.detection.scores import SCORES, gl_mcm, local_mcm, mcm, score
from tests.demo.conftest import one_thread  # noqa: F401 - every test here uses it

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
CLASSES = ["cat", "dog", "red car", "tree frog", "sailing ship", "cup"]


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "cases" / "clip_tiny"


@pytest.fixture
def model(folder: Path) -> Any:
    return CLIPModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def objective(golden: Path, folder: Path, golden_clip: dict[str, torch.Tensor]) -> LoCoOpObjective:
    names = json.loads((golden / "cases" / "classes.json").read_text())
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return LoCoOpObjective(tokenizer, names, golden_clip["pixel_values"], LABELS, top_k=2)


@pytest.fixture(scope="module")
def pixels(golden_clip: dict[str, torch.Tensor]) -> torch.Tensor:
    return golden_clip["pixel_values"]


def labelled(pixels: torch.Tensor, batch_size: int = 5) -> ImageSource:
    return ImageSource(None, pixels, LABELS[: len(pixels)], class_names=CLASSES, batch_size=batch_size)


def stock_global_logits(model: Any, objective: LoCoOpObjective, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=pixels, **objective.class_tokens(backbone_of(model))).logits_per_image


def test_global_logits_are_those_of_the_stock_forward(model: Any, objective: Any, pixels: torch.Tensor) -> None:
    expected = stock_global_logits(model, objective, pixels)
    found = image_scores(model, objective, labelled(pixels), scores=["mcm"])
    # Cosines times a scale of about 100.
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.labels, LABELS)
    assert found.accuracy == int((expected.argmax(-1) == LABELS).sum()) / 24


def test_scores_are_those_of_the_published_codes_logits(
    model: Any, objective: Any, pixels: torch.Tensor, golden_clip: dict[str, torch.Tensor]
) -> None:
    model.logit_scale.data.fill_(math.log(100))
    found = image_scores(model, objective, labelled(pixels), scores=["mcm", "gl_mcm"])
    global_logits, local_logits = golden_clip["logits_global"], golden_clip["logits_local"].flatten(1, 2)
    torch.testing.assert_close(found.logits, global_logits, atol=2e-4, rtol=0)
    torch.testing.assert_close(found.scores["mcm"], mcm(global_logits, 100), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.scores["gl_mcm"], gl_mcm(global_logits, local_logits, 100), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_the_defaults_give_the_published_codes_scores_of_cosines(
    model: Any, objective: Any, pixels: torch.Tensor, golden: Path, name: str, published: str
) -> None:
    """The scores at temperature 100, and energy, which the published code divides, too, when it is asked for."""
    scores: Any = {"energy": {"temperature": 100}} if name == "energy" else [name]
    found = evaluate(model, objective, labelled(pixels[:12]), {"rest": pixels[12:]}, scores=scores)
    ours = torch.cat([found.id_images.scores[name], found.ood_images["rest"].scores[name]])
    figures = load_file(golden / "tensors_clip_tiny.safetensors")
    torch.testing.assert_close(ours.double(), -figures[f"score.T100.{published}"], rtol=1e-5, atol=2e-6)
    assert (ours + figures[f"score.T1.{published}"]).abs().max() > 0.02
    assert found.id_images.settings[name]["temperature"] == pytest.approx(100, rel=1e-6)


def test_a_models_own_logits_are_read_at_temperature_1(
    model: Any, objective: Any, pixels: torch.Tensor, golden: Path
) -> None:
    found = image_scores(model, objective, labelled(pixels), scores=["energy", "max_logit", "msp"])
    figures = load_file(golden / "tensors_clip_tiny.safetensors")
    logits = stock_global_logits(model, objective, pixels)
    torch.testing.assert_close(found.scores["energy"].double(), -figures["score.T1.energy_score"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.scores["max_logit"], logits.amax(-1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.scores["msp"].double(), -figures["score.T1.mcm_score"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_a_classifiers_temperature_is_1(golden: Path, class_names: list[str], name: str, published: str) -> None:
    classifier = Swinv2ForImageClassification.from_pretrained(golden / "cases" / "swin_tiny").eval()
    figures = load_file(golden / "tensors_swin_tiny.safetensors")
    objective = LoCoOpObjective(None, class_names, figures["pixel_values_first4"], LABELS[:4], top_k=2)
    found = evaluate(classifier, objective, objective.images, {"same": objective.images}, scores=[name])
    ours, expected = found.id_images.scores[name].double(), -figures[f"score.T1.{published}"][:4]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert f"{name} (temperature 1). No prompts." in found.convention()
    assert found.to_dict()["prompt"] is None


def test_logits_of_a_batch_have_the_scores_of_a_set(model: Any, objective: Any, pixels: torch.Tensor) -> None:
    logits = image_logits(model, objective, pixels[:5])
    found = image_scores(model, objective, labelled(pixels[:5]), scores=[name for name in SCORES if name != "neglabel"])
    assert float(logits.scale) == pytest.approx(100, rel=1e-6)
    for name, values in found.scores.items():
        torch.testing.assert_close(score(name, logits), values)


def test_a_score_takes_its_settings_by_name(model: Any, objective: Any, pixels: torch.Tensor) -> None:
    scores: Any = {"mcm": {}, "gl_mcm": {"local_weight": 0.5, "temperature": 50.0}}
    found = evaluate(model, objective, labelled(pixels[:12]), {"rest": pixels[12:]}, scores=scores)
    logits = image_logits(model, objective, pixels[:12])
    expected = mcm(logits.pooled, 50) + 0.5 * local_mcm(logits.local, 50)
    torch.testing.assert_close(found.id_images.scores["gl_mcm"], expected)
    by_tensor: Any = {"mcm": {"temperature": logits.scale}}
    assert json.dumps(image_scores(model, objective, labelled(pixels[:2]), scores=by_tensor).settings)
    assert found.score_label("mcm") == "mcm (temperature 100)"
    assert found.score_label("gl_mcm") == "gl_mcm (temperature 50, local weight 0.5)"
    both = evaluate(
        model, objective, labelled(pixels[:12]), {"rest": pixels[12:]}, scores=scores, temperature=20.0
    ).to_dict()["scores"]
    assert (both["mcm"]["temperature"], both["gl_mcm"]["temperature"]) == (20.0, 50.0)
    settings = found.to_dict()["scores"]
    assert settings["gl_mcm"] == {"temperature": 50.0, "pooling": "patch", "local_weight": 0.5}


def test_id_images_may_be_whatever_ood_images_may_be(model: Any, objective: Any, pixels: torch.Tensor) -> None:
    plain = evaluate(model, objective, pixels[:12], {"rest": pixels[12:]})
    given = evaluate(model, objective, labelled(pixels[:12]), {"rest": pixels[12:]})
    assert plain.rows == given.rows
    assert math.isnan(plain.accuracy)
    assert plain.table().splitlines()[1].split()[:3] == ["rest", "mcm", "-"]


def test_a_table_says_what_it_depends_on(model: Any, objective: Any, pixels: torch.Tensor) -> None:
    found = evaluate(model, objective, labelled(pixels[:12]), {"rest": pixels[12:]})
    said = " ".join(found.table().split())
    for piece in (
        "Scores: mcm (temperature 100), gl_mcm (temperature 100).",
        'Prompt "a photo of a {class}".',
        f"torch {torch.__version__}",
        f"setar_peft {setar_peft.__version__}",
        "at least 95 % of the ID images",
    ):
        assert piece in said
    values = found.to_dict()
    assert values["prompt"] == "a photo of a {class}"
    assert values["versions"]["torch"] == torch.__version__
    assert {"positive", "threshold_rule", "tpr"} <= set(values["rows"][0])
    own = replace(found, prompt=["a cat", "a dog"])
    assert 'Prompts "a cat" and so on, one a class.' in own.convention()
    assert own.to_dict()["prompt"] == ["a cat", "a dog"]


def test_figures_are_scikit_learns(model: Any, objective: Any, pixels: torch.Tensor) -> None:
    found = evaluate(model, objective, labelled(pixels[:12]), {"rest": pixels[12:]}, scores=["mcm"])
    scores = mcm(stock_global_logits(model, objective, pixels), 100).numpy()
    is_id = np.arange(24) < 12
    metrics = found.metrics("rest", "mcm")
    assert metrics.auroc == pytest.approx(roc_auc_score(is_id, scores))
    # All 12 ID images have to be kept for 95 %, so the threshold is the lowest ID score.
    assert metrics.fpr == np.mean(scores[~is_id] >= scores[is_id].min())


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_how_images_are_cut_changes_nothing(
    model: Any, objective: Any, pixels: torch.Tensor, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = image_scores(model, objective, labelled(pixels, 24))
    monkeypatch.setattr(evaluation, "LOCAL_LOGITS_CHUNK", {"cpu": 1})
    parts = image_scores(model, objective, labelled(pixels, batch_size))
    for name, scores in whole.scores.items():
        torch.testing.assert_close(parts.scores[name], scores)


def test_local_logits_are_only_made_where_a_score_reads_them_and_never_for_a_whole_batch(
    model: Any, objective: Any, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    logits = evaluation.ClassWeights.logits

    def recorded(classes: Any, features: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(features.shape))
        return logits(classes, features)

    monkeypatch.setattr(evaluation.ClassWeights, "logits", recorded)
    image_scores(model, objective, labelled(pixels, 24), scores=["mcm", "energy"])
    assert all(len(shape) == 2 for shape in shapes)
    monkeypatch.setattr(evaluation, "LOCAL_LOGITS_CHUNK", {"cpu": 2 * 16 * 6})
    image_scores(model, objective, labelled(pixels, 24), scores=["gl_mcm"])
    assert max(shape[0] for shape in shapes if len(shape) == 3) == 2


def test_patches_that_are_padding_count_for_nothing() -> None:
    local = torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    features = evaluation.ImageFeatures(torch.randn(3, 5), local, mask)
    (padded,) = evaluation._parts(features, evaluation.ClassWeights(torch.eye(5)), needs_local=True)
    assert padded.local is not None
    for image, logits, real in zip(local, padded.local, mask, strict=True):
        assert torch.equal(local_mcm(logits[None], 1.0), local_mcm(image[real][None], 1.0))


def test_a_peft_model_is_evaluated_with_its_adapter(model: Any, objective: Any, pixels: torch.Tensor) -> None:
    base = image_scores(model, objective, labelled(pixels))
    peft_model = get_peft_model(model, SeTARConfig(rank_ratios=0.4))
    adapted = image_scores(peft_model, objective, labelled(pixels))
    assert not torch.equal(adapted.logits, base.logits)
    with peft_model.disable_adapter():
        assert torch.equal(image_scores(peft_model, objective, labelled(pixels)).logits, base.logits)
    merged = image_scores(peft_model.merge_and_unload(), objective, labelled(pixels))
    torch.testing.assert_close(merged.logits, adapted.logits)


def test_the_model_is_left_in_the_mode_it_was_in(model: Any, objective: Any, pixels: torch.Tensor) -> None:
    model.train()
    model.text_model.eval()
    before = [module.training for module in model.modules()]
    image_scores(model, objective, labelled(pixels))
    logits = image_logits(model, objective, pixels[:2])
    assert [module.training for module in model.modules()] == before
    assert not logits.pooled.requires_grad
    with pytest.raises(ValueError, match="The images have shape"):
        image_scores(model, objective, labelled(pixels[..., :16]))
    assert [module.training for module in model.modules()] == before


def test_labels_that_number_other_classes_are_refused(model: Any, objective: Any, pixels: torch.Tensor) -> None:
    """In another order they would give another accuracy, without a word."""
    other = ImageSource(None, pixels, LABELS, class_names=CLASSES[::-1])
    with pytest.raises(
        ValueError, match=r"not the objective's 6 classes in its order.*cup, .*Give class_names=objective"
    ):
        evaluate(model, objective, other, {"rest": pixels[12:]})
    # The labels of an OOD set are not read.
    assert evaluate(model, objective, labelled(pixels), {"rest": other}).accuracy > 0


def test_images_without_labels_have_no_accuracy(model: Any, objective: Any, pixels: torch.Tensor) -> None:
    found = evaluate(model, objective, ImageSource(None, pixels[:12]), {"rest": pixels[12:]})
    assert math.isnan(found.accuracy)
    assert found.to_dict()["accuracy"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_table_has_a_line_for_each_set_and_score_in_80_columns(
    model: Any, objective: Any, pixels: torch.Tensor
) -> None:
    found = evaluate(model, objective, labelled(pixels[:12]), {"one": pixels[12:18], "another": pixels[18:]})
    lines = found.table().splitlines()
    assert lines[0].split() == ["OOD", "set", "score", "accuracy", "FPR95", "AUROC", "AUPR-in", "AUPR-out"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["one", "mcm"],
        ["one", "gl_mcm"],
        ["another", "mcm"],
        ["another", "gl_mcm"],
    ]
    assert lines[2].split()[4] == f"{100 * found.metrics('one', 'gl_mcm').auroc:.2f}"
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("conventions", "pieces"),
    [
        ({}, ["FPR95", "share of OOD images taken for ID", "at least 95 %"]),
        ({"positive": "ood", "tpr": 0.9}, ["FPR90", "share of ID images taken for OOD", "at least 90 %"]),
        ({"threshold": "closest"}, ["closest to 95 %"]),
    ],
)
def test_the_convention_is_said(
    model: Any, objective: Any, pixels: torch.Tensor, conventions: dict[str, Any], pieces: list[str]
) -> None:
    found = evaluate(model, objective, labelled(pixels[:12]), {"rest": pixels[12:]}, scores=["mcm"], **conventions)
    for piece in pieces:
        assert piece in found.convention()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ood_images": {}}, "ood_images is empty"),
        ({"scores": ["best"]}, "score is 'best'; write one of"),
        ({"scores": []}, r"scores is \[\]"),
        ({"scores": "mcm"}, "scores is 'mcm'; give a list"),
        ({"scores": {"mcm": 100}}, r"scores is \{'mcm': 100\}; give each score its settings by name"),
        ({"scores": {"mcm": {"local_weight": 1.0}}}, "mcm has no setting 'local_weight'; it has 'temperature'"),
        ({"scores": {"mcm": {"temperature": 0.0}}}, r"temperature is 0\.0; give a positive number"),
        ({"ood_images": {"folder": "nowhere"}}, "nowhere is no folder"),
    ],
)
def test_wrong_input_gets_a_sentence(
    model: Any, objective: Any, pixels: torch.Tensor, changes: dict[str, Any], message: str
) -> None:
    arguments = {"ood_images": {"rest": pixels[12:]}} | changes
    with pytest.raises(ValueError, match=message):
        evaluate(model, objective, labelled(pixels[:12]), arguments.pop("ood_images"), **arguments)


def test_an_unknown_row_names_the_rows_there_are(model: Any, objective: Any, pixels: torch.Tensor) -> None:
    found = evaluate(model, objective, labelled(pixels[:12]), {"rest": pixels[12:]}, scores=["mcm"])
    with pytest.raises(ValueError, match=r"\('rest', 'energy'\).*there are some for \('rest', 'mcm'\)"):
        found.metrics("rest", "energy")

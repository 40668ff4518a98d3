"""What an evaluation gives, from plain arrays of scores."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from setar_peft.detection.figures import Conventions, ModelScores, SetScores
from setar_peft.detection.metrics import ood_metrics
from setar_peft.detection.result import Evaluation
from tests.plots.browser import browser

CLASSES = ["cat", "dog", "red car"]
SETTINGS: dict[str, dict[str, Any]] = {
    "mcm": {"temperature": 100.0},
    "gl_mcm": {"temperature": 100.0, "pooling": "patch", "local_weight": 0.5},
}


def set_scores(name: str, size: int, shift: float, *, labelled: bool = False) -> SetScores:
    generator = np.random.default_rng(len(name))
    labels = generator.integers(0, 3, size) if labelled else np.full(size, -1)
    return SetScores(
        [f"{name}/{number}.png" for number in range(size)],
        np.arange(size),
        labels,
        generator.integers(0, 3, size),
        generator.uniform(0.4, 1, size).astype(np.float32),
        {score: generator.normal(shift, 1, size).astype(np.float32) for score in SETTINGS},
    )


def model_scores(shift: float = 1.0, **changes: Any) -> ModelScores:
    scores = {
        "id_set": set_scores("ID", 80, shift, labelled=True),
        "ood_sets": {"noise": set_scores("noise", 60, 0), "crops": set_scores("crops", 40, 0.3)},
        "settings": SETTINGS,
        "about": {"base": "clip", "adapter": "default"},
    }
    return ModelScores(**scores | changes)


def shown(name: str, number: int) -> Any:
    if name == "crops":
        raise OSError("the file is gone")
    return Image.new("RGB", (28, 28), "red") if name == "ID" else f"text {number} <b>"


def evaluation(**conventions: Any) -> Evaluation:
    return Evaluation.of(
        {"base": model_scores(), "SeTAR": model_scores(1.2)},
        Conventions(**{"resamples": 50} | conventions),
        prompt="a photo of a {class}",
        class_names=CLASSES,
        shown=shown,
    )


@pytest.mark.parametrize(
    "conventions", [{}, {"positive": "ood", "tpr": 0.9}, {"threshold_rule": "closest", "resamples": 0}]
)
def test_rows_are_the_metrics_and_their_means(conventions: dict[str, Any]) -> None:
    found = evaluation(**conventions)
    kinds = {("threshold" if name == "threshold_rule" else name): value for name, value in conventions.items()}
    kinds.pop("resamples", None)
    for model, scores in found.models.items():
        for score in SETTINGS:
            sets = [
                ood_metrics(scores.id_set.scores[score], images.scores[score], **kinds)
                for images in scores.ood_sets.values()
            ]
            assert [found.metrics(name, score, model) for name in scores.ood_sets] == sets
            mean = found.metrics("mean", score, model)
            for figure in ("fpr", "auroc", "aupr_in", "aupr_out", "detection_accuracy", "accuracy_at_threshold"):
                assert getattr(mean, figure) == pytest.approx(sum(getattr(one, figure) for one in sets) / 2)
            same = sets[0].threshold == sets[1].threshold
            assert mean.threshold == sets[0].threshold if same else math.isnan(mean.threshold)
    assert len(found.rows) == 2 * 3 * 2
    assert len(found.differences) == 3 * 2


def test_one_set_has_no_mean_and_one_model_no_difference() -> None:
    found = Evaluation.of_scores([1.0, 2.0, 3.0], {"noise": [0.0, 1.5]}, resamples=20)
    assert [row.ood_set for row in found.rows] == ["noise"]
    assert found.differences == []
    assert found.metrics("noise", "score") == ood_metrics([1.0, 2.0, 3.0], [0.0, 1.5])
    assert math.isnan(found.accuracy())
    assert "Accuracy: not known" in found.table()
    assert found.table().splitlines()[0].split() == ["OOD", "set", "score", "FPR95", "AUROC", "AUPR-in", "AUPR-out"]


def test_scores_may_be_tensors_of_any_precision_and_are_named_where_they_are_none() -> None:
    known, unknown = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True), [0.0, 1.5]
    assert Evaluation.of_scores(known, {"noise": unknown}).metrics("noise", "score").auroc == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="mine hold NaN or infinity in 1 of 2"):
        Evaluation.of_scores([1.0, 2.0], {"noise": [0.0, math.nan]}, score="mine")


def test_intervals_hold_their_figures_and_equal_models_differ_by_nothing() -> None:
    found = Evaluation.of({"base": model_scores(), "same": model_scores()}, Conventions(resamples=100))
    for row in found.rows:
        assert row.auroc_interval is not None
        assert row.auroc_interval.low < row.metrics.auroc < row.auroc_interval.high
    for difference in found.differences:
        assert (difference.fpr, difference.auroc) == (0.0, 0.0)
        assert difference.fpr_interval == difference.auroc_interval == (0.0, 0.0)
    assert "no difference" in found.table()


def test_differences_are_those_of_the_figures_and_are_paired() -> None:
    found = evaluation(resamples=200)
    for difference in found.differences:
        ours, first = (found.metrics(difference.ood_set, difference.score, model) for model in ("SeTAR", "base"))
        assert difference.fpr == ours.fpr - first.fpr
        assert difference.auroc == ours.auroc - first.auroc
        assert difference.auroc_interval is not None
        assert difference.auroc_interval.low <= difference.auroc <= difference.auroc_interval.high
        row = next(row for row in found.rows if row[:3] == ("SeTAR", difference.ood_set, difference.score))
        assert row.auroc_interval is not None
        # The shift of all ID scores by a constant is the same in every resample but for the images' number near it.
        assert difference.auroc_interval.high - difference.auroc_interval.low < row.auroc_interval.high - (
            row.auroc_interval.low
        )
    assert "SeTAR - base" in found.table()
    assert "better" in found.table()


def test_a_table_says_what_it_depends_on() -> None:
    found = evaluation(positive="ood", threshold_rule="closest", tpr=0.9)
    said = " ".join(found.table().split())
    for piece in (
        "FPR90: share of ID images taken for OOD at the threshold where closest to 90 % of the OOD images are found.",
        "50 bootstrap resamples",
        "Scores: mcm (temperature 100), gl_mcm (temperature 100, local weight 0.5).",
        'Prompt "a photo of a {class}".',
        "Made with setar_peft",
    ):
        assert piece in said
    own = Evaluation.of({"a": model_scores()}, Conventions(resamples=0), prompt=["a cat", "a dog"])
    assert 'Prompts "a cat" and so on, one a class.' in own.convention()
    assert "bootstrap" not in own.convention()
    other = model_scores(settings=SETTINGS | {"mcm": {"temperature": 1.0}})
    both = Evaluation.of({"a": model_scores(), "b": other}, Conventions(resamples=0))
    assert both.score_label("mcm") == "mcm (a: temperature 100; b: temperature 1)"


def test_markdown_csv_and_json_hold_the_figures() -> None:
    found = evaluation()
    row = found.metrics("noise", "mcm", "base")
    line = next(line for line in found.to_markdown().splitlines() if line.startswith("| noise | mcm | base |"))
    assert f"| {100 * row.fpr:.2f} [" in line
    assert f"| {100 * row.aupr_in:.2f} |" in line
    (first, *_) = records = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(records) == 12
    assert float(first["auroc"]) == row.auroc
    assert (first["baseline"], first["difference_fpr"]) == ("", "")
    second = records[1]
    assert (second["model"], second["baseline"]) == ("SeTAR", "base")
    assert float(second["difference_auroc"]) == found.differences[0].auroc
    values = json.loads(found.to_json())
    assert values == json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["conventions"] == {
        "positive": "id",
        "threshold_rule": "at_least",
        "tpr": 0.95,
        "resamples": 50,
        "seed": 0,
        "level": 0.95,
    }
    assert values["models"]["SeTAR"]["scores"] == SETTINGS
    assert values["models"]["SeTAR"]["adapter"] == "default"
    assert values["models"]["base"]["accuracy"] == found.accuracy("base")
    assert values["images"] == {"ID": 80, "noise": 60, "crops": 40}
    assert values["prompt"] == "a photo of a {class}"
    assert values["rows"][0]["fpr"] == row.fpr
    assert values["differences"][0]["baseline"] == "base"
    assert "torch" in values["versions"]


def test_a_name_with_a_stroke_does_not_break_the_markdown() -> None:
    found = Evaluation.of_scores([1.0, 2.0], {"a|b": [0.0]}, resamples=0)
    assert r"| a\|b | score | " in found.to_markdown()


def test_scores_of_every_image_go_into_a_parquet_file(tmp_path: Path) -> None:
    found = evaluation()
    path = found.to_parquet(tmp_path / "scores.parquet")
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["model", "set", "id", "label", "prediction", "confidence", "mcm", "gl_mcm"]
    assert len(rows) == 2 * (80 + 60 + 40)
    known, noise = found.models["base"].id_set, found.models["base"].ood_sets["noise"]
    assert rows[5]["id"] == "ID/5.png"
    assert (rows[5]["label"], rows[5]["prediction"]) == (known.labels[5], known.predictions[5])
    assert np.float32(rows[5]["mcm"]) == known.scores["mcm"][5]
    assert (rows[85]["set"], rows[85]["label"]) == ("noise", None)
    assert np.float32(rows[85]["confidence"]) == noise.confidence[5]
    assert rows[180]["model"] == "SeTAR"
    assert {file.name for file in tmp_path.iterdir()} == {"scores.parquet", "cache"}
    with pytest.raises(ValueError, match="A score is called 'label', as a column of its own is"):
        Evaluation.of_scores([1.0, 2.0], {"a": [0.0]}, score="label").to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="There is no folder"):
        found.to_parquet(tmp_path / "nowhere" / "scores.parquet")
    assert {file.name for file in tmp_path.iterdir()} == {"scores.parquet", "cache"}


def test_the_report_shows_the_surest_mistakes_in_a_browser(tmp_path: Path) -> None:
    found = evaluation()
    path = found.report(tmp_path / "report.html", mistakes=16)
    with browser(tmp_path) as page:
        page.open(path)
        assert page.messages == []
        assert [address for address in page.requests if not address.startswith("data:")] == [path.as_uri()]
        sizes = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert min(sizes) > 0
        # A curve and a histogram a score.
        assert page.evaluate("document.querySelectorAll('.figure img').length") == 4
        lists = page.evaluate("[...document.querySelectorAll('.pictures')].map(list => list.children.length)")
        titles = page.evaluate("[...document.querySelectorAll('h3')].map(title => title.textContent)")
        assert titles[:3] == [
            "base: OOD taken for ID, with the highest scores",
            "base: ID rejected, with the lowest scores",
            "base: ID classified wrongly, with the highest confidence",
        ]
        # At least 76 of the 80 ID images are found.
        assert lists == [16, 4, 16] * 2
        captions = page.evaluate("[...document.querySelectorAll('.pictures figcaption')].map(one => one.textContent)")
        table = page.evaluate("document.querySelector('table').innerText")
    base = found.models["base"]
    highest = {name: images.scores["mcm"].max() for name, images in base.ood_sets.items()}
    surest = max(highest, key=lambda name: highest[name])
    place = int(base.ood_sets[surest].scores["mcm"].argmax())
    assert captions[0].startswith(f"{surest}/{place}.png: {surest}, score {highest[surest]:.4g}")
    assert captions[16].startswith(f"ID/{int(base.id_set.scores['mcm'].argmin())}.png: score")
    wrong = base.id_set.labels != base.id_set.predictions
    number = int(np.where(wrong, base.id_set.confidence, 0).argmax())
    label, prediction = base.id_set.labels[number], base.id_set.predictions[number]
    confidence = 100 * base.id_set.confidence[number]
    assert captions[20] == (
        f"ID/{number}.png: is {CLASSES[label]}, predicted as {CLASSES[prediction]} ({confidence:.0f} %)"
    )
    assert f"{100 * found.metrics('noise', 'mcm', 'base').fpr:.2f}" in table


def test_the_report_of_scores_alone_names_the_images(tmp_path: Path) -> None:
    found = Evaluation.of_scores([1.0, 2.0, 3.0], {"noise": [0.0, 2.5]}, resamples=0)
    text = found.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1: noise, score 2.5" in text
    assert "ID classified wrongly" not in text
    gone = evaluation().report(tmp_path / "gone.html", score="gl_mcm").read_text(encoding="utf-8")
    assert "It cannot be shown: the file is gone" in gone
    with pytest.raises(ValueError, match="score is 'energy'; write one of 'mcm', 'gl_mcm'"):
        evaluation().report(tmp_path / "other.html", score="energy")


def test_images_that_were_left_out_are_counted() -> None:
    scores = model_scores()
    noise = scores.ood_sets["noise"]
    left = SetScores(**{**vars(noise), "left_out": {"noise/60.png": "it is truncated"}})
    found = Evaluation.of({"a": model_scores(ood_sets={"noise": left})}, Conventions(resamples=0))
    assert "1 images of noise could not be read and are left out." in found.convention()
    assert found.to_dict()["left_out"] == {"noise": {"noise/60.png": "it is truncated"}}


def broken_scores() -> ModelScores:
    scores = model_scores()
    scores.ood_sets["noise"].scores["mcm"][[3, 7, 9, 11]] = [math.nan, math.inf, math.nan, -math.inf]
    return scores


@pytest.mark.parametrize(
    ("models", "pieces"),
    [
        ({}, ["There are no models"]),
        ({"a": model_scores(ood_sets={})}, ["There is no OOD set"]),
        ({"a": model_scores(settings={})}, ["There is no score"]),
        ({"a": model_scores(ood_sets={"mean": set_scores("mean", 4, 0)})}, ["'mean'", "the mean over the sets"]),
        ({"a": model_scores(ood_sets={"ID": set_scores("ID", 4, 0)})}, ["'ID'", "the ID images"]),
        (
            {"a": model_scores(), "b": model_scores(id_set=set_scores("ID", 79, 1))},
            ["Model 'b' has the images {'ID': 79", "model 'a' {'ID': 80", "the same images"],
        ),
        (
            {"a": model_scores(), "b": model_scores(settings={"mcm": {}})},
            ["the scores ['mcm'], model 'a'", "['mcm', 'gl_mcm']"],
        ),
        (
            {"a": model_scores(), "b": model_scores(id_set=replace(set_scores("ID", 80, 1), numbers=np.arange(1, 81)))},
            ["Models 'a' and 'b' have scores of different images of the set 'ID'"],
        ),
        ({"a": model_scores(settings=SETTINGS | {"energy": {}})}, ["Model 'a' has no 'energy' of the set 'ID'"]),
        (
            {"a": broken_scores()},
            ["'mcm' of model 'a' is NaN or infinite for 4 of 60 images of the set 'noise'", "noise/3.png", "1 more"],
        ),
    ],
)
def test_scores_that_do_not_fit_get_a_sentence(models: dict[str, ModelScores], pieces: list[str]) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the pieces are looked at below
        Evaluation.of(models)
    for piece in pieces:
        assert piece in str(raised.value)


def test_an_unknown_row_or_model_names_those_there_are() -> None:
    found = evaluation()
    with pytest.raises(ValueError, match=r"model is None; write one of 'base', 'SeTAR'"):
        found.metrics("noise", "mcm")
    with pytest.raises(ValueError, match=r"model is 'other'; write one of 'base'"):
        found.accuracy("other")
    with pytest.raises(ValueError, match=r"\('noise', 'energy'\).*there are some for \('noise', 'mcm'\)"):
        found.metrics("noise", "energy", "base")

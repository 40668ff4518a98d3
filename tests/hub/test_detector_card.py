"""The section on a detector: what it says, and that it stands beside the adapter's without touching it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from setar_peft import SeTARConfig
from setar_peft.backbones import ClassWeights
from setar_peft.hub.detector_card import write_detector_card
from tests.hub.test_detector_files import NAMES, sample

RATIOS = {"vision_model.encoder.layers.0.mlp.fc1": 0.25}


def save_adapter(load_clip: Callable[..., Any], folder: Path, config: Any = None) -> None:
    base = load_clip()
    base.name_or_path = base.config._name_or_path = "user/base"
    model = get_peft_model(base, config or SeTARConfig(rank_ratios=RATIOS))
    model.save_pretrained(folder, save_embedding_layers=False)


def test_what_it_says(tmp_path: Path) -> None:
    write_detector_card(tmp_path, sample(), "1.25, which keeps 95.0% of 200 held-out ID inputs")
    card = ModelCard.load(tmp_path / "README.md")
    for line in (
        "# Out-of-distribution detector",
        "which of 4 classes it is",
        "- Classes: cat, dog, frog, Ω & 船",
        "- Prompt: a photo of a {class}",
        "- Negative labels: 2",
        "- Score: gl_mcm (temperature 100.003, pooling patch, local_weight 0.3)",
        "- Threshold: 1.25, which keeps 95.0% of 200 held-out ID inputs",
        "- Model: CLIPModel in float32, with the adapter in this folder",
        "- Made with: torch 2.13.0",
        "pip install setar-peft",
    ):
        assert line in card.text, line
    (python,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    ast.parse(python)
    assert len([line for line in python.splitlines() if line]) <= 6
    assert {"ood-detection", "out-of-distribution-detection"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "- Threshold: none; fit one before it decides"),
        ({"prompt": ["one", "two", "three", "four"]}, "- Prompts: one a class, such as one\n"),
        ({"prompt": None, "settings": {}}, "- Score: gl_mcm\n"),
        ({"kind": "text"}, 'found = detector("my card was declined")'),
        ({"adapter_sha256": None}, "- Model: CLIPModel in float32, as it stands here"),
        ({"class_names": [f"c{number}" for number in range(1000)]}, "c18, c19 and 980 more\n"),
    ],
)
def test_other_detectors(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    write_detector_card(tmp_path, sample(**changes))
    assert line in (tmp_path / "README.md").read_text()


def test_it_stands_above_the_adapters_section_and_both_are_kept_up_to_date(
    load_clip: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "README.md"
    save_adapter(load_clip, tmp_path)
    write_detector_card(tmp_path, sample(), base_model="user/base")
    card = ModelCard.load(path)
    assert card.text.index("# Out-of-distribution detector") < card.text.index("# SeTAR (training-free) adapter")
    assert (card.data.library_name, card.data.base_model) == ("peft", "user/base")
    assert {"setar", "ood-detection", "base_model:adapter:user/base"} <= set(card.data.tags)
    path.write_text(path.read_text() + "\n## My notes\n\nHands off.\n")
    write_detector_card(tmp_path, sample(score="mcm"))
    save_adapter(load_clip, tmp_path, SeTARConfig(rank_ratios={next(iter(RATIOS)): 0.5}))
    text = path.read_text()
    assert (text.count("<!-- setar "), text.count("<!-- setar-detector ")) == (1, 1)
    assert "- Score: mcm" in text
    assert "| 0.5 | 32 of 64 |" in text
    assert "## My notes\n\nHands off." in text
    again = path.read_text()
    write_detector_card(tmp_path, sample(score="mcm"))
    assert ModelCard(path.read_text()).text == ModelCard(again).text


def test_an_edited_section_is_the_users(load_clip: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    save_adapter(load_clip, tmp_path, LoraConfig(target_modules=["fc1"]))
    write_detector_card(tmp_path, sample())
    path.write_text(path.read_text().replace("# Out-of-distribution detector", "# Our detector of oddities"))
    text = ModelCard.load(path).text
    write_detector_card(tmp_path, sample(score="mcm"))
    assert ModelCard.load(path).text == text
    assert "setar" not in ModelCard.load(path).data.tags


def test_no_local_path_is_told_and_names_are_no_marks(tmp_path: Path) -> None:
    names = ["<!-- /setar-detector -->", "line\nbreak", *NAMES[:2]]
    files = sample(class_names=names, adapter_sha256=None, class_weights=ClassWeights(sample().class_weights.weight))
    for _ in range(2):
        write_detector_card(tmp_path, files, base_model=str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in text
    assert text.count("<!-- /setar-detector -->") == 1
    assert "- Classes: &lt;!-- /setar-detector -->, line break, cat, dog\n" in text
    write_detector_card(tmp_path, files, base_model="user/base")
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "user/base"

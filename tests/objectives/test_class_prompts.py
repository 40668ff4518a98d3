from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from setar_peft.backbones import backbone_of
from setar_peft.objectives.class_prompts import ClassPrompts

NAMES = ["cat", "dog", "red car", "tree frog", "sailing ship", "cup"]


@pytest.fixture(scope="module")
def tokenizer(golden: Path) -> Any:
    return AutoTokenizer.from_pretrained(golden / "cases" / "clip_tiny")


def stock_text_features(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        features = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt"))
    features = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(features, dim=-1)


def test_negative_labels_are_rows_of_their_own(load_clip: Callable[..., Any], tokenizer: Any) -> None:
    """Against the stock model's own text features, through the same template and scaled alike."""
    model = load_clip()
    prompts = ClassPrompts(tokenizer, NAMES, "the nice {class}", negative_labels=["bucket", "old stone"])
    with torch.no_grad():
        classes = prompts.class_weights(backbone_of(model))
    scale = model.logit_scale.detach().exp()
    expected = scale * stock_text_features(model, tokenizer, ["the nice bucket", "the nice old stone"])
    torch.testing.assert_close(classes.negative, expected, rtol=1e-4, atol=1e-4)
    expected = scale * stock_text_features(model, tokenizer, [f"the nice {name}" for name in NAMES])
    torch.testing.assert_close(classes.weight, expected, rtol=1e-4, atol=1e-4)
    features = torch.randn(3, classes.weight.shape[1])
    logits = classes.logits_of(torch_features(features), local=False)
    torch.testing.assert_close(logits.negative, features @ classes.negative.T)


def torch_features(pooled: torch.Tensor) -> Any:
    from setar_peft.backbones import ImageFeatures

    return ImageFeatures(pooled, pooled[:, None])


def test_without_negative_labels_there_are_none(load_clip: Callable[..., Any], tokenizer: Any) -> None:
    with torch.no_grad():
        assert ClassPrompts(tokenizer, NAMES).class_weights(backbone_of(load_clip())).negative is None


def test_negative_labels_come_from_a_file(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("bucket\n\n  old stone \n", encoding="utf-8")
    for given in (file, str(file), ["bucket", "old stone"], ("bucket", "old stone")):
        assert ClassPrompts(tokenizer, NAMES, negative_labels=given).negative_labels == ["bucket", "old stone"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "is empty"),
        (["stone", ""], "holds ''"),
        (["stone", 3], "holds 3"),
        (["stone", "stone"], "has 'stone' more than once"),
        (["stone", "Red Car"], "has names of classes: 'Red Car'"),
        ("missing.txt", "missing.txt cannot be read"),
        (7, "holds 7"),
    ],
)
def test_bad_negative_labels(tokenizer: Any, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        ClassPrompts(tokenizer, NAMES, negative_labels=given)


def test_negative_labels_need_a_template_and_a_model_that_reads_texts(tokenizer: Any, golden: Path) -> None:
    from transformers import Swinv2ForImageClassification

    with pytest.raises(ValueError, match="prompt is one text a class"):
        ClassPrompts(tokenizer, NAMES, [f"one {name}" for name in NAMES], negative_labels=["stone"])
    swin = Swinv2ForImageClassification.from_pretrained(golden / "cases" / "swin_tiny")
    with pytest.raises(ValueError, match="nothing to compare with negative_labels"):
        ClassPrompts(None, ["a"] * swin.config.num_labels, negative_labels=["stone"]).class_weights(backbone_of(swin))
    with pytest.raises(ValueError, match=f"has {swin.config.num_labels} classes, class_names 2"):
        ClassPrompts(None, ["a", "b"]).class_weights(backbone_of(swin))


def test_templates_are_no_texts_of_classes() -> None:
    """Two templates for two classes would be taken for the two prompts."""
    with pytest.raises(ValueError, match=r"prompt has the text 'a \{class\}'.*names the class itself"):
        ClassPrompts(None, ["cat", "dog"], ["a {class}", "the {class}"])

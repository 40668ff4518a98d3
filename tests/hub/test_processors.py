"""A processor is known again by what it makes of inputs, and not by what is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPProcessor

from setar_peft.hub import processors
from setar_peft.hub.processors import check_preprocessing, load_saved_processor, preprocessing_of
from tests.conftest import GOLDEN


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(GOLDEN / "cases" / "clip_tiny")


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("saved_as", ["processor", "image_processor", "tokenizer", None])
def test_what_was_saved_is_what_is_loaded(saved_as: str | None, kind: str, tokenizer: Any, tmp_path: Path) -> None:
    images = CLIPImageProcessorPil(size={"shortest_edge": 28})
    made = {"image_processor": images, "tokenizer": tokenizer, None: None}
    processor = made.get(saved_as, CLIPProcessor(image_processor=images, tokenizer=tokenizer))
    saved = preprocessing_of(processor, kind)
    assert saved["saved_as"] == saved_as
    if processor is not None:
        processor.save_pretrained(tmp_path)
    loaded = load_saved_processor(tmp_path, saved)
    assert type(loaded) is type(processor)
    check_preprocessing(saved, loaded, kind)
    assert preprocessing_of(loaded, kind) == saved


def test_other_settings_are_named(tokenizer: Any) -> None:
    saved = preprocessing_of(CLIPImageProcessorPil(), "image")
    other = CLIPImageProcessorPil(do_center_crop=False, image_std=[1.0, 1.0, 1.0])
    with pytest.raises(
        ValueError, match=r"do_center_crop is False, not True; image_std is \[1.0, 1.0, 1.0\], not \[0.2"
    ):
        check_preprocessing(saved, other, "image")
    saved = preprocessing_of(tokenizer, "text")
    tokenizer.add_tokens(["unheard"])
    with pytest.raises(ValueError, match=r"does not make of texts what .*vocabulary_sha256 is"):
        check_preprocessing(saved, tokenizer, "text")


def test_the_same_work_by_another_backend_is_said() -> None:
    saved = {**preprocessing_of(CLIPImageProcessorPil(), "image"), "class": "CLIPImageProcessor"}
    message = "by CLIPImageProcessorPil here, and were by CLIPImageProcessor where the threshold was found"
    with pytest.warns(UserWarning, match=message):
        check_preprocessing(saved, CLIPImageProcessorPil(), "image")


@pytest.mark.parametrize(("name", "backend"), [("CLIPImageProcessorPil", "pil"), ("CLIPImageProcessor", "torchvision")])
def test_the_backend_is_the_one_that_was_used(
    name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loader:
        @staticmethod
        def from_pretrained(folder: Path, **settings: Any) -> Any:
            return folder, settings

    monkeypatch.setitem(processors._LOADERS, "image_processor", Loader)
    found = load_saved_processor(tmp_path, {"saved_as": "image_processor", "class": name})
    assert found == (tmp_path, {"trust_remote_code": False, "backend": backend})


def test_what_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a function, which cannot be saved with the detector"):
        preprocessing_of(lambda images: images, "image")
    with pytest.raises(ValueError, match="has a processor of the kind 'pickle'; known are processor, image_processor"):
        load_saved_processor(tmp_path, {"saved_as": "pickle"})
    with pytest.raises(ValueError, match=r"The processor in .* cannot be loaded: .*Give it, processor="):
        load_saved_processor(tmp_path, {"saved_as": "image_processor", "class": "CLIPImageProcessorPil"})

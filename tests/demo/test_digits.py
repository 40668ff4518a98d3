from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from transformers import AutoProcessor

from setar_peft.demo import cache, digits, tiny_clip
from setar_peft.demo.cache import cache_root, cached_folder
from setar_peft.demo.pictures import digit_image, in_digit_format, noise, photograph_crops


def test_no_image_is_in_two_sets_and_every_known_digit_in_one() -> None:
    data = digits.load_images()
    everything = load_digits()
    known = {image.tobytes() for image in map(digit_image, everything.images[everything.target < 7])}
    sets = [{image.tobytes() for image in part.images} for part in (data.train, data.search, data.test)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(known)
    assert set.union(*sets) == known
    assert not known & {image.tobytes() for image in data.ood["digits 7-9"]}
    for part, per_class in ((data.search, 20), (data.test, 50)):
        assert np.bincount(part.labels).tolist() == [per_class] * 7
    assert [len(images) for images in data.ood.values()] == [200] * 3


def test_the_images_are_the_same_each_time_and_all_of_one_format() -> None:
    one, other = digits.load_images(), digits.load_images()
    for images, again in zip(one.ood.values(), other.ood.values(), strict=True):
        assert [image.tobytes() for image in images] == [image.tobytes() for image in again]
        assert {(image.mode, image.size) for image in images} == {("L", (16, 16))}
    assert one.train.labels == other.train.labels


def test_pictures_have_the_size_asked_for() -> None:
    for picture in photograph_crops(3, 40, 0) + noise(2, 40, 0):
        assert (picture.mode, picture.size) == ("RGB", (40, 40))
    (black,) = in_digit_format([photograph_crops(1, 8, 0)[0].point(lambda _: 0)])
    assert black.tobytes() == digit_image(np.zeros((8, 8))).tobytes()


def test_a_model_is_trained_once_and_read_back_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    model, processor = digits.load_model(tmp_path, steps=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert torch.isfinite(model.logit_scale)
    monkeypatch.setattr(tiny_clip, "train", lambda *_, **__: pytest.fail("trained again"))
    again, _ = digits.load_model(tmp_path, steps=1, progress=False)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    text = processor.tokenizer("a photo of a seven")["input_ids"]
    assert text[0] == model.config.text_config.bos_token_id
    assert text[-1] == model.config.text_config.eos_token_id
    assert processor.tokenizer.decode(text[1:-1]) == "a photo of a seven"


def test_stock_transformers_reads_the_processor(tmp_path: Path) -> None:
    folder = digits.model_folder(tmp_path, steps=1, progress=False)
    _, processor = tiny_clip.load(folder)
    stock = AutoProcessor.from_pretrained(folder)
    images = [image.convert("RGB") for image in digits.load_images().test.images[:3]]
    pixels = [
        torch.as_tensor(p.image_processor(images, return_tensors="pt")["pixel_values"]) for p in (processor, stock)
    ]
    assert pixels[0].shape == (3, 3, 16, 16)
    torch.testing.assert_close(pixels[0], pixels[1])
    assert float(pixels[0].min()) == -1.0


def test_training_lowers_the_loss_and_is_reproducible() -> None:
    data = digits.load_images().train
    processor = tiny_clip.build_processor()
    models = [
        tiny_clip.train(processor, data.images, data.labels, digits.CLASS_NAMES, steps=2, progress=False)
        for _ in range(2)
    ]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_interrupted_training_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiny_clip, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            digits.load_model(tmp_path, steps=1, progress=False)
    assert list(tmp_path.iterdir()) == []
    digits.load_model(tmp_path, steps=1, progress=False)


def test_a_process_killed_while_writing_leaves_no_folder_that_is_taken_for_whole(tmp_path: Path) -> None:
    code = (
        f"import os, sys; sys.path.insert(0, {str(Path(cache.__file__).parent)!r})\n"
        "from pathlib import Path; from cache import cached_folder\n"
        "def write(folder):\n    (folder / 'half').write_text('half'); os._exit(9)\n"
        f"cached_folder(Path({str(tmp_path)!r}) / 'model', write)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert not (tmp_path / "model").exists()
    folder = cached_folder(tmp_path / "model", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_of_two_processes_at_once_the_first_wins(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def write(unfinished: Path) -> None:
        (unfinished / "second").touch()
        cached_folder(folder, lambda other: (other / "first").touch())

    assert [path.name for path in cached_folder(folder, write).iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [folder]


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "setar_peft"
    assert cache_root("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "setar_peft"


def test_a_damaged_or_impossible_cache_gets_a_sentence(tmp_path: Path) -> None:
    folder = digits.model_folder(tmp_path, steps=1, progress=False)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=f"The model in {folder} cannot be read.*Delete that folder"):
        digits.load_model(tmp_path, steps=1, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"No folder can be made in .*--cache"):
        digits.load_model(tmp_path / "file", steps=1, progress=False)
    with pytest.raises(ValueError, match="steps is 0"):
        digits.load_model(tmp_path, steps=0)

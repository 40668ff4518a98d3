"""What sets of images and of texts have in common: numbers, names, parts, digests, and what a person sees."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from setar_peft.data.images import ImageSource
from setar_peft.data.inputs import InputBatch, Inputs
from setar_peft.data.sources import source_of
from setar_peft.data.texts import NamedInputs
from tests.backbones import checks

NAMES = ["cat", "dog"]
COUNT = 11
LABELS = [number % 2 for number in range(COUNT)]
TEXTS = [" ".join(["card"] * (1 + 3 * number % 5)) for number in range(COUNT)]


def image_processor(**settings: Any) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, **settings)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 9, 12, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def saved(pictures: list[Image.Image], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:02}.png")
    return sorted(folder.iterdir())


@pytest.fixture(params=["pictures", "files", "pixel values", "texts", "tokens"])
def source(request: pytest.FixtureRequest, pictures: list[Image.Image], tmp_path: Path) -> Inputs:
    settings: dict[str, Any] = {"class_names": NAMES, "batch_size": 3}
    if request.param == "pictures":
        return ImageSource(image_processor(), pictures, LABELS, **settings)
    if request.param == "files":
        return ImageSource(image_processor(), saved(pictures, tmp_path / "images"), LABELS, **settings)
    if request.param == "pixel values":
        return ImageSource(None, torch.randn(COUNT, 3, 4, 4), LABELS, **settings)
    if request.param == "texts":
        return NamedInputs(checks.WordTokenizer(), TEXTS, LABELS, **settings)
    return NamedInputs(None, {"input_ids": torch.randint(9, (COUNT, 5))}, LABELS, **settings)


def values(batch: InputBatch) -> dict[str, torch.Tensor]:
    assert batch.inputs is not None
    return {"pixels": batch.inputs} if isinstance(batch.inputs, torch.Tensor) else dict(batch.inputs)


def alike(batch: InputBatch, other: InputBatch) -> bool:
    ours, theirs = values(batch), values(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_batches_of_shards_are_those_of_one_process(source: Inputs, count: int) -> None:
    """Also in what they are padded to: no batch is cut otherwise, and none is there twice."""
    whole = list(source.readable_batches())
    assert [len(batch.numbers) for batch in whole] == [3, 3, 3, 2]
    shards = [source.select(source.batch_places(index, count)) for index in range(count)]
    found: dict[int, InputBatch] = {}
    for index, shard in enumerate(shards):
        for place, batch in enumerate(shard.readable_batches()):
            found[index + place * count] = batch
            assert [shard.numbers[number] for number in batch.numbers] == whole[index + place * count].numbers
    assert sorted(found) == [0, 1, 2, 3]
    for place, batch in enumerate(whole):
        assert alike(found[place], batch)
        assert torch.equal(found[place].labels, batch.labels)
    assert sum(map(len, shards)) == COUNT


def test_a_part_keeps_names_labels_and_contents(source: Inputs) -> None:
    part = source.select([7, 2, 2, 10])
    assert len(part) == 4
    assert part.numbers == [7, 2, 2, 10]
    assert part.labels.tolist() == [1, 0, 0, 0]
    assert [part.name(number) for number in range(4)] == [source.name(number) for number in (7, 2, 2, 10)]
    for place, number in enumerate((7, 2, 2, 10)):
        alone, same = part.select([place]), source.select([number])
        assert alike(next(alone.readable_batches()), next(same.readable_batches()))
        assert part.shown(place) == source.shown(number)
        assert alone.digest() == same.digest()
    of_a_part = part.select([3, 0])
    assert of_a_part.numbers == [10, 7]
    assert source.select(torch.tensor([3, 1])).numbers == source.select(np.array([3, 1])).numbers == [3, 1]
    assert len(source.select([])) == 0
    assert list(source.select([]).readable_batches()) == []
    assert part.shard(1, 2).numbers == [2, 10]
    assert source.batch_places(5, 6) == []
    masks = (torch.ones(COUNT) > 0, np.ones(COUNT) > 0, [np.True_])
    for strange in ([11], [-1], [True], [0, 99], [1.5], ["1"], *masks):
        with pytest.raises(
            ValueError, match=r"numbers holds .*; give the places of the \w+s that are wanted, from 0 to 10"
        ):
            source.select(strange)


def test_numbers_go_on_in_a_stream(source: Inputs) -> None:
    part = source.numbered_from(100)
    assert list(part.numbers) == list(range(100, 100 + COUNT))
    assert part.select([4]).numbers == [104]
    assert alike(next(part.shard(4, 5).readable_batches()), next(source.shard(4, 5).readable_batches()))
    if not Path(source.name(0)).is_file():
        assert (source.name(4), part.name(4), part.select([4]).name(0)) == ("4", "104", "104")
    assert part.digest() == source.digest()


def test_what_a_person_sees(pictures: list[Image.Image]) -> None:
    shown: Any = ImageSource(image_processor(), [picture.convert("CMYK") for picture in pictures]).shown(3)
    assert (shown.mode, shown.size) == ("RGB", (12, 9))
    pixels = torch.tensor([[-1.0, 0.0], [1.0, 3.0]]).expand(1, 3, 2, 2)
    grey: Any = ImageSource(None, pixels).shown(0)
    assert np.asarray(grey)[..., 1].tolist() == [[0, 64], [128, 255]]
    for flat in (torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), float("nan"))):
        assert np.asarray(ImageSource(None, flat).shown(0)).max() == 0
    assert NamedInputs(None, {"pixel_values": pixels}).shown(0) == grey
    assert NamedInputs(checks.WordTokenizer(), ["a card"]).shown(0) == "a card"
    assert (
        NamedInputs(None, {"mask": torch.ones(1, 2), "input_ids": torch.tensor([[5, 7]])}).shown(0) == "input_ids 5, 7"
    )
    assert NamedInputs(None, {"input_ids": torch.zeros(1, 99)}).shown(0).endswith("0.0, ...")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^nowhere.png cannot be read: No such file"):
        ImageSource(image_processor(), ["nowhere.png"]).shown(0)
    with pytest.raises(ValueError, match=r"Text 1 \(from 0\) is 3, which is no text"):
        NamedInputs(checks.WordTokenizer(), ["a", 3]).shown(1)
    with pytest.raises(ValueError, match=r"pixel values of shape \(5, 2, 2\) are no picture"):
        ImageSource(None, torch.zeros(1, 5, 2, 2)).shown(0)


def test_equal_contents_have_one_digest(pictures: list[Image.Image], tmp_path: Path) -> None:
    paths = saved(pictures, tmp_path / "here")
    elsewhere = saved(pictures, tmp_path / "there" / "deeper")
    read = [path.read_bytes() for path in paths]
    table = datasets.Dataset.from_dict({"image": list(map(str, paths))}).cast_column("image", datasets.Image())
    ways = [paths, elsewhere, list(map(str, paths)), tmp_path / "here", read, [{"bytes": data} for data in read], table]
    digests = {source_of(way, image_processor(), "image").digest() for way in ways}
    assert len(digests) == 1
    assert digests == {source_of(paths, image_processor(), "image", batch_size=2).digest()}
    arrays = [np.asarray(picture) for picture in pictures]
    for one, other in ((pictures, [picture.copy() for picture in pictures]), (arrays, np.stack(arrays))):
        assert ImageSource(image_processor(), one).digest() == ImageSource(image_processor(), other).digest()


def test_whatever_changes_a_score_changes_the_digest(pictures: list[Image.Image], tmp_path: Path) -> None:
    paths = saved(pictures, tmp_path)
    turned = pictures[0].copy()
    turned.getexif()[0x0112] = 3

    def of(data: Any = paths, labels: Any = None, processor: Any = None, **settings: Any) -> str:
        return ImageSource(processor or image_processor(), data, labels, **settings).digest()

    pixels = torch.randn(2, 3, 4, 4)
    digests = [
        of(),
        of(paths[::-1]),
        of(paths[:-1]),
        of([*paths, paths[0]]),
        of([paths[1], *paths[1:]]),
        of([*paths[:-1], tmp_path / "nowhere.png"]),
        of(pictures),
        of([picture.convert("L") for picture in pictures]),
        of([turned, *pictures[1:]]),
        of([np.asarray(picture) for picture in pictures]),
        *(of([torch.full((3, 4, 4), value).bfloat16().requires_grad_()]) for value in (0.25, 0.5)),
        of([np.asarray(picture).transpose(2, 0, 1) for picture in pictures]),
        of(processor=image_processor(do_normalize=False)),
        of(processor=image_processor(resample=2)),
        of(processor=image_processor(do_center_crop=False)),
        of(processor=image_processor(image_mean=[0.5], image_std=[0.5])),
        of(labels=LABELS, class_names=NAMES),
        of(labels=[1 - label for label in LABELS], class_names=NAMES),
        of(labels=LABELS, class_names=["cat", "frog"]),
        of(labels=LABELS, class_names=["cat", "dog", "frog"]),
        of(pixels),
        of(pixels.half()),
        of(pixels.flip(0)),
        of(pixels.flatten(0, 1)[:, None]),
        NamedInputs(None, {"pixel_values": pixels}).digest(),
        NamedInputs(None, {"pixels": pixels}).digest(),
    ]
    assert len(set(digests)) == len(digests)


def test_the_digest_of_texts_is_that_of_their_tokens_and_words(golden: Path) -> None:
    def tokenizer() -> Any:
        return AutoTokenizer.from_pretrained(golden / "cases" / "clip_tiny")

    other = tokenizer()
    other.model_max_length = 4
    left = tokenizer()
    left.padding_side = "left"
    texts = ["a photo of a cat", "dog", "A Photo of a cat"]
    one = NamedInputs(tokenizer(), texts, batch_size=2)
    digest = one.digest()
    list(one.batches())
    assert one.digest() == digest, "a tokenizer keeps what it was last asked to pad to"
    assert NamedInputs(tokenizer(), texts, batch_size=1).digest() == digest
    table = datasets.Dataset.from_dict({"text": texts})
    assert NamedInputs(tokenizer(), table).digest() == digest
    digests = [
        digest,
        NamedInputs(other, texts).digest(),
        NamedInputs(left, texts).digest(),
        NamedInputs(tokenizer(), texts[::-1]).digest(),
        NamedInputs(tokenizer(), [texts[0], texts[1], texts[0]]).digest(),
        NamedInputs(tokenizer(), [*texts[:2], None]).digest(),
    ]
    assert len(set(digests)) == len(digests)


class Cut:
    """A tokenizer of words that takes six tokens."""

    model_max_length = 6

    def __init__(self) -> None:
        self.words = checks.WordTokenizer()

    def __call__(self, texts: list[str], **settings: Any) -> Any:
        return self.words(texts, max_length=6, **settings)


def test_texts_that_are_cut_are_said() -> None:
    texts = ["one two", "a b c d", "a b c d e", "f", *["x " * 9] * 5]
    source = NamedInputs(Cut(), texts, batch_size=2)
    with pytest.warns(UserWarning, match=r"6 of 9 texts are longer than the 6 tokens .*: Text 2 \(from 0\), Text 4 "):
        assert sum(len(labels) for _, labels in source.batches()) == 9
    list(NamedInputs(Cut(), texts[:2]).batches())


def test_a_real_tokenizer_says_which_texts_are_cut(golden: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden / "cases" / "clip_tiny")
    whole = len(tokenizer("a cat")["input_ids"])
    tokenizer.model_max_length = whole
    source = NamedInputs(tokenizer, ["a cat", "cat", "a cat " * 20])
    with pytest.warns(UserWarning, match=rf"1 of 3 texts are longer than the {whole} tokens .*: Text 2 \(from 0\)\."):
        (batch,) = source.readable_batches()
    assert values(batch)["input_ids"].shape == (3, whole)


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        (None, r"Text 1 \(from 0\) is None, which is no text\."),
        (float("nan"), "is nan, which is no text"),
        (b"bytes", "is b'bytes', which is no text"),
        (7, "is 7, which is no text"),
        (["a", "b"], r"is \['a', 'b'\], which is no text"),
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("\ud800", "cannot be read: "),
    ],
)
def test_what_is_no_text_is_a_sentence_and_the_others_go_on(golden: Path, text: Any, piece: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden / "cases" / "clip_tiny")
    source = source_of(["a cat", text, "a dog on a sofa"], tokenizer, "text")
    (batch,) = source.readable_batches()
    assert batch.numbers == [0, 2]
    with pytest.raises(ValueError, match=piece):
        raise ValueError(batch.errors[1])
    (alone,) = NamedInputs(tokenizer, ["a cat", "a dog on a sofa"]).readable_batches()
    assert alike(batch, alone)
    assert len(source.digest()) == 64
    with pytest.raises(ValueError, match="1 of 3 texts come before it"):
        list(source.batches())


def test_a_name_is_asked_of_a_data_set_once(pictures: list[Image.Image]) -> None:
    fetched: list[int] = []

    class Set(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, number: int) -> Any:
            fetched.append(number)
            return pictures[number], 0

    source = ImageSource(image_processor(), Set())
    fetched.clear()
    list(source.batches())
    assert [source.name(number) for number in range(3)] == ["0", "1", "2"]
    assert fetched == [0, 1, 2]


@pytest.mark.parametrize("read", ["batches", "readable_batches"])
def test_no_thread_outlives_a_source_that_is_left_early(pictures: list[Image.Image], read: str) -> None:
    before = threading.active_count()
    batches: Callable[[], Iterator[Any]] = getattr(ImageSource(image_processor(), pictures, batch_size=1), read)
    for _ in batches():
        break
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before

"""Whatever a user has: what it is, what is refused because it may be two things, and streams."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from setar_peft.data.images import ImageSource
from setar_peft.data.inputs import Inputs
from setar_peft.data.sources import is_single, source_of, stream_of
from setar_peft.data.texts import NamedInputs
from tests.backbones import checks

TEXTS = ["a cat", "a dog on a sofa", "frog"]
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 9, 12, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(pixels) for pixels in PIXELS]


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, picture in zip(("cat", "dog", "frog"), PICTURES, strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        picture.save(tmp_path / "images" / name / "0.png")
    return tmp_path / "images"


def encoded(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def pixels_of(source: Inputs) -> Tensor:
    return torch.cat([inputs for inputs, _ in source.batches()])


def ids_of(source: Inputs) -> list[list[int]]:
    return [row for inputs, _ in source.batches() for row in inputs["input_ids"].tolist()]


class Items(torch.utils.data.Dataset[Any]):
    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return self.items[number]


class Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def test_many_images_are_the_same_however_they_come(processor: Any, folder: Path) -> None:
    paths = sorted(folder.rglob("*.png"))
    table = datasets.Dataset.from_dict({"image": list(map(str, paths)), "label": [0, 1, 2]})
    table = table.cast_column("image", datasets.Image())
    ways: list[Any] = [
        *(PICTURES, tuple(PICTURES), list(PIXELS), PIXELS, PIXELS.transpose(0, 3, 1, 2), PIXELS / np.float64(255)),
        *(torch.as_tensor(PIXELS), torch.as_tensor(PIXELS).permute(0, 3, 1, 2), list(torch.as_tensor(PIXELS))),
        *(folder, str(folder), paths, list(map(str, paths)), np.array(list(map(str, paths)))),
        *([encoded(picture) for picture in PICTURES], [{"bytes": encoded(picture)} for picture in PICTURES]),
        *([paths[0], PIXELS[1], encoded(PICTURES[2])], table, table["image"], table.to_iterable_dataset()),
        *(Items(PICTURES), Items([(picture, 0) for picture in PICTURES]), Items([{"image": p} for p in PICTURES])),
        *(Stream(PICTURES), datasets.Dataset.from_dict({"image": [{"path": str(p), "bytes": None} for p in paths]})),
    ]
    expected = pixels_of(ImageSource(processor, PICTURES))
    for way in ways:
        source = source_of(way, processor, "image", batch_size=2)
        assert torch.equal(pixels_of(source), expected)
        assert source.classes is None
        assert source.batch_size == 2
        assert not is_single(way, "image")
    names = ["frog", "dog", "cat"]
    assert source_of(folder, processor, "image", class_names=names).labels.tolist() == [2, 1, 0]
    assert source_of(PICTURES, processor, "image", class_names=names, labels=[0, 2, 1]).labels.tolist() == [0, 2, 1]
    renamed = table.rename_columns({"image": "photograph", "label": "kind"})
    source = source_of(renamed, processor, "image", class_names=names, input_column="photograph", label_column="kind")
    assert source.labels.tolist() == [0, 1, 2]


def test_one_image_is_a_set_of_one(processor: Any, folder: Path) -> None:
    path = folder / "dog" / "0.png"
    picture = PICTURES[1]
    expected = pixels_of(ImageSource(processor, [picture]))
    ways: list[Any] = [
        path,
        str(path),
        picture,
        PIXELS[1],
        PIXELS[1] / 255,
        encoded(picture),
        bytearray(encoded(picture)),
    ]
    ways += [memoryview(encoded(picture)), io.BytesIO(encoded(picture)), {"bytes": encoded(picture), "path": None}]
    ways += [{"path": str(path)}, torch.as_tensor(PIXELS[1]), torch.as_tensor(PIXELS[1]).permute(2, 0, 1)]
    for way in ways:
        assert is_single(way, "image")
        assert torch.equal(pixels_of(source_of(way, processor, "image")), expected)
        assert not is_single([way], "image")
        assert torch.equal(pixels_of(source_of([way], processor, "image")), expected)
    expected_of_floats = pixels_of(source_of(PIXELS[1] / 255, processor, "image"))
    for floats in (torch.as_tensor(PIXELS[1] / 255).requires_grad_(), torch.as_tensor(PIXELS[1] / 255).bfloat16()):
        found = pixels_of(source_of(floats.permute(2, 0, 1), processor, "image"))
        assert torch.allclose(found, expected_of_floats, atol=0.02)
    assert is_single("http://127.0.0.1/a.png", "image")
    assert is_single("nowhere.png", "image")
    assert is_single(PIXELS[0, ..., 0], "image")
    (batch,) = source_of("nowhere.png", processor, "image").readable_batches()
    assert batch.errors == {0: "nowhere.png cannot be read: No such file: 'nowhere.png'."}


def test_grey_images_in_one_array(processor: Any) -> None:
    stack = PIXELS.reshape(-1, 6, 9)
    assert not is_single(stack, "image")
    for way in (stack, torch.as_tensor(stack)):
        assert torch.equal(
            pixels_of(source_of(way, processor, "image")), pixels_of(ImageSource(processor, list(stack)))
        )
    with pytest.raises(
        ValueError, match=r"shape \(3, 6, 9\) may be one image, channels first, or 3 grey; give \[array\]"
    ):
        source_of(stack[:3], processor, "image")
    assert len(source_of([stack[:3]], processor, "image")) == 1
    assert len(source_of(list(stack[:3]), processor, "image")) == 3


def test_pixel_values_are_taken_as_they_are(processor: Any) -> None:
    pixels = torch.randn(3, 3, 8, 8)
    for way in (pixels, {"pixel_values": pixels}):
        source = source_of(way, processor, "image", batch_size=2)
        batches = [inputs if isinstance(inputs, Tensor) else inputs["pixel_values"] for inputs, _ in source.batches()]
        assert torch.equal(torch.cat(batches), pixels)
        assert not is_single(way, "image")
    for raw in (torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8) * 255):
        for way in (raw, {"pixel_values": raw}):
            with pytest.warns(
                UserWarning, match=r"has no negative one, so that it seems not to be normalised as the pr"
            ):
                source_of(way, processor, "image")
    for without in (None, CLIPImageProcessorPil(do_normalize=False), CLIPImageProcessorPil(image_mean=[0.0] * 3)):
        source_of(torch.rand(3, 3, 8, 8), without, "image")


def test_texts_are_the_same_however_they_come(tmp_path: Path) -> None:
    def of(data: Any, **settings: Any) -> Inputs:
        return source_of(data, checks.WordTokenizer(), "text", **settings)

    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    table = datasets.Dataset.from_dict({"text": TEXTS})
    ways: list[Any] = [TEXTS, tuple(TEXTS), np.array(TEXTS), np.array(TEXTS, dtype=object), file, table, table["text"]]
    ways += [table.to_iterable_dataset(), Items(TEXTS), Items([(text, 0) for text in TEXTS]), Stream(TEXTS)]
    for way in ways:
        assert ids_of(of(way)) == ids_of(NamedInputs(checks.WordTokenizer(), TEXTS))
        assert not is_single(way, "text")
    assert is_single("a cat", "text")
    assert len(of("a cat")) == 1
    assert ids_of(of("a cat")) == ids_of(of(["a cat"]))
    tokens = {"input_ids": torch.tensor([[1, 2], [3, 4]])}
    assert ids_of(of(tokens)) == [[1, 2], [3, 4]]
    renamed = table.rename_column("text", "query")
    assert ids_of(of(renamed, input_column="query")) == ids_of(of(TEXTS))
    assert of(TEXTS, class_names=["x", "y"], labels=["y", "x", "y"]).labels.tolist() == [1, 0, 1]


def test_a_real_tokenizer_takes_texts_of_an_array(golden: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden / "cases" / "clip_tiny")
    assert ids_of(source_of(np.array(TEXTS), tokenizer, "text")) == ids_of(source_of(TEXTS, tokenizer, "text"))
    # Of both, as tokenizers and processors give them.
    encoding = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert ids_of(source_of(encoding, tokenizer, "text")) == encoding["input_ids"].tolist()


@pytest.mark.parametrize(
    ("data", "piece"),
    [
        (None, "The images are a builtins.NoneType; give a list of them"),
        ("", "The image is an empty string; give a path"),
        (" \n", "The image is an empty string"),
        (3, "The images are a builtins.int"),
        (object(), "The images are a builtins.object"),
        ([], "no images in the data set; give at least one"),
        (np.zeros((0, 4, 4, 3)), "no images"),
        (torch.zeros(0, 3, 4, 4), "no images"),
        ({"a.png", "b.png"}, "The images are a set, which has no order; give a list"),
        ({"a": 1}.keys(), "The images are a dict_keys, which has no order"),
        (iter(PICTURES), "The images are a list_iterator, which can be read once and has no length; give a list of it"),
        (map(str, []), "The images are a map, which can be read once"),
        ({"image": PICTURES}, r"a mapping with the keys 'image'; give the images themselves, data\[\.\.\.\]"),
        ({"image": PICTURES[0], "path": "a.png"}, "a mapping with the keys 'image', 'path'"),
        ({}, "There are no inputs|one row each in every tensor: there are none"),
        ({"pixel_values": torch.zeros(3, 4)}, r"pixel_values has shape \(3, 4\); give one row an input"),
        ("images.txt", "images.txt is no image; give a folder of images, a path or URL of one, or a list of them"),
        (Path("images.csv"), "images.csv is no image"),
        (Path("images.parquet"), "images.parquet is no image"),
        (io.BufferedReader(io.BytesIO(b"")), "The images are an open file; give its path as a pathlib.Path"),
        (torch.zeros(3), r"shape \(3,\) and dtype torch.float32; give processed pixel values"),
        (torch.zeros(2, 3, 4, 4, 4), "shape \\(2, 3, 4, 4, 4\\)"),
        (datasets.DatasetDict(test=datasets.Dataset.from_dict({"image": []})), "has the splits 'test'"),
        (torch.utils.data.DataLoader(Items(PICTURES)), "DataLoader; give its data set"),
        (datasets.Dataset.from_dict({"url": ["a"]}), "has the columns url, but no image; say with image_column"),
        (NamedInputs(checks.WordTokenizer(), TEXTS), r"The data are texts \(NamedInputs\); the model takes images"),
    ],
)
def test_what_is_certain_to_be_no_image_is_refused(processor: Any, data: Any, piece: str) -> None:
    with pytest.raises(ValueError, match=piece):
        source_of(data, processor, "image")


@pytest.mark.parametrize(
    ("data", "piece"),
    [
        (None, "The texts are a builtins.NoneType"),
        ("", "The text is an empty string; give a text"),
        ([], "There are no inputs"),
        (b"a cat", "The text is bytes; decode it"),
        ({"a", "b"}, "The texts are a set, which has no order"),
        (iter(TEXTS), "a list_iterator, which can be read once"),
        ({"text": TEXTS}, "a mapping with the keys 'text'; give the texts themselves"),
        (
            {"input_ids": torch.tensor([1, 2, 3])},
            r"input_ids has shape \(3,\); give one row an input: input_ids\[None\]",
        ),
        ({"input_ids": [[1, 2]]}, "a mapping with the keys 'input_ids'; give .* or tensors by the names"),
        (
            {"input_ids": torch.zeros(2, 3), "attention_mask": torch.zeros(1, 3)},
            "input_ids has 2, attention_mask has 1",
        ),
        (Path("nowhere.txt"), "nowhere.txt is no such file"),
        (Path("nowhere"), "nowhere is no such file; give a .txt file with one text a line"),
        (PICTURES[0], "The texts are a PIL.Image.Image"),
        (ImageSource(None, torch.randn(1, 3, 4, 4)), r"The data are images \(ImageSource\); the model takes texts"),
    ],
)
def test_what_is_certain_to_be_no_text_is_refused(data: Any, piece: str) -> None:
    with pytest.raises(ValueError, match=piece):
        source_of(data, checks.WordTokenizer(), "text")


def test_a_string_that_names_a_file_of_texts_is_not_scored_as_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reviews.txt").write_text("one\ntwo\n", encoding="utf-8")
    Path("more").mkdir()
    for data in ("reviews.txt", ["one", "reviews.txt"], ("more/../reviews.txt",), "more/"):
        with pytest.raises(ValueError, match=r"is the path of a file or folder; give pathlib\.Path\('"):
            source_of(data, checks.WordTokenizer(), "text")
    for data in ("other.txt", "reviews", "and/or", "/" * 5000, "a\0/b", "see reviews.txt"):
        assert len(source_of(data, checks.WordTokenizer(), "text")) == 1


def test_a_processor_that_cannot_is_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="processor is a NoneType, which cannot process images"):
        source_of(PICTURES, None, "image")
    with pytest.raises(ValueError, match="Texts need the model's tokenizer; processor is CLIPImageProcessor"):
        source_of(TEXTS, processor, "text")
    with pytest.raises(ValueError, match="Texts need the model's tokenizer; processor is None"):
        source_of(TEXTS, None, "text")
    for data in (
        {"pixel_values": torch.randn(1, 3, 4, 4)},
        PICTURES,
        PICTURES[0],
        "a.png",
        torch.randn(1, 3, 4, 4),
        PIXELS,
    ):
        for column in ({"input_column": "image"}, {"label_column": "label"}):
            with pytest.raises(ValueError, match="input_column or label_column beside data without columns"):
                source_of(data, processor, "image", **column)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size is True"):
        source_of(PICTURES, processor, "image", batch_size=True)


def test_a_folder_that_is_not_there_is_said_where_classes_are_wanted(processor: Any) -> None:
    with pytest.raises(ValueError, match="nowhere is no folder; give the folder that has one subfolder"):
        source_of("nowhere", processor, "image", class_names=["a", "b"])


def test_inputs_stay_as_they_are() -> None:
    labelled = ImageSource(None, torch.randn(2, 3, 4, 4), [0, 1], class_names=["cat", "dog"])
    assert source_of(labelled, None, "image") is labelled
    assert source_of(labelled, None, "image", class_names=["Cat", "Dog"]) is labelled
    tokens = NamedInputs(None, {"input_ids": torch.ones(1, 2)})
    assert source_of(tokens, None, "text") is tokens
    assert list(stream_of(tokens, None, "text")) == [tokens]
    with pytest.raises(
        ValueError, match="class_names beside inputs that have others, or in another order; give them to ImageSource"
    ):
        source_of(labelled, None, "image", class_names=["dog", "cat"])
    with pytest.raises(ValueError, match="class_names beside inputs that have none; give them to NamedInputs"):
        source_of(tokens, None, "text", class_names=["dog", "cat"])
    for settings in ({"labels": [0, 1]}, {"input_column": "a"}, {"label_column": "a"}):
        with pytest.raises(
            ValueError, match="labels or columns beside inputs that have their own; give them to ImageSource"
        ):
            source_of(labelled, None, "image", **settings)  # type: ignore[arg-type]


def numbers_and_pixels(sources: Iterator[Inputs]) -> tuple[list[str], Tensor, list[int]]:
    names, pixels, sizes = [], [], []
    for source in sources:
        names += [source.name(number) for number in range(len(source))]
        pixels.append(pixels_of(source))
        sizes.append(len(source))
    return names, torch.cat(pixels), sizes


def test_a_stream_is_read_some_batches_at_a_time_and_goes_on_counting(processor: Any) -> None:
    many = [PICTURES[number % 3] for number in range(21)]
    table = datasets.Dataset.from_dict({"image": many}).cast_column("image", datasets.Image())
    expected = pixels_of(ImageSource(processor, many))
    ways: list[Any] = [
        *(iter(many), (picture for picture in many), map(encoded, many), Stream(many), iter(table)),
        *(Stream([(picture, 0) for picture in many]), Stream([{"image": picture} for picture in many])),
        *(table.to_iterable_dataset(), ({"img": encoded(picture)} for picture in many)),
        datasets.IterableDataset.from_generator(lambda: ({"image": picture} for picture in many)),
    ]
    for way in ways:
        names, pixels, sizes = numbers_and_pixels(stream_of(way, processor, "image", batch_size=2))
        assert torch.equal(pixels, expected)
        assert sizes == [8, 8, 5]
        assert names == list(map(str, range(21)))
    whole = list(stream_of(many, processor, "image", batch_size=2))
    assert [len(source) for source in whole] == [21]
    renamed = table.rename_column("image", "photograph").to_iterable_dataset()
    sources = stream_of(renamed, processor, "image", batch_size=9, input_column="photograph")
    assert torch.equal(pixels_of(next(sources)), expected)


def test_a_stream_of_texts() -> None:
    for way in (
        iter(TEXTS * 3),
        Stream(TEXTS * 3),
        datasets.Dataset.from_dict({"text": TEXTS * 3}).to_iterable_dataset(),
    ):
        tokenizer = checks.WordTokenizer()
        sources = list(stream_of(way, tokenizer, "text", batch_size=1))
        assert [source.shown(number) for source in sources for number in range(len(source))] == TEXTS * 3
        assert [source.name(0) for source in sources] == ["0", "4", "8"]


def test_no_more_is_taken_of_a_stream_than_is_used(processor: Any) -> None:
    endless = itertools.count()
    sources = stream_of((PICTURES[number % 3] for number in endless), processor, "image", batch_size=2)
    next(sources)
    assert next(endless) == 8
    assert next(sources).name(0) == "8"


def test_bad_items_of_a_stream_are_named_by_their_numbers(processor: Any) -> None:
    items = [PICTURES[0], b"", None, "nowhere.png", (PICTURES[0], 1), PICTURES[1]]
    errors: dict[str, str] = {}
    for source in stream_of(iter(items), processor, "image", batch_size=1):
        for batch in source.readable_batches():
            errors |= {source.name(number): error for number, error in batch.errors.items()}
    assert list(errors) == ["1", "2", "nowhere.png", "4"]
    assert errors["4"].startswith("Image 4 (from 0) cannot be read: it is of type tuple")
    rows: list[Any] = [{"image": PICTURES[0]}, {"picture": PICTURES[0]}, 3]
    (source,) = stream_of(iter(rows), processor, "image")
    (batch,) = source.readable_batches()
    assert batch.numbers == [0]
    assert "cannot be read: KeyError: 'image'" in batch.errors[1]
    assert "Image 2 (from 0) cannot be read: TypeError" in batch.errors[2]


def test_a_stream_that_breaks_gives_what_came_before_it(processor: Any) -> None:
    def broken() -> Iterator[Any]:
        yield from [*PICTURES, *PICTURES, *PICTURES]
        raise ConnectionError("the line is down")

    sources = stream_of(broken(), processor, "image", batch_size=1)
    assert [len(next(sources)) for _ in range(3)] == [4, 4, 1]
    with pytest.raises(ValueError, match=r"The stream ended with an error after 9 images: the line is down\."):
        next(sources)


@pytest.mark.parametrize(
    ("stream", "column", "piece"),
    [
        (iter([]), None, "The stream holds no images; give at least one"),
        (Stream([]), None, "The stream holds no images"),
        (iter(PICTURES), "image", "The stream's items are of type Image, which has no columns by name"),
        (iter([{"a": 1, "b": 2}]), None, "The stream has the columns a, b, but no image; say with image_column"),
        (iter([{"image": 1}]), "photograph", "but no photograph"),
        (torch.utils.data.DataLoader(Items(PICTURES)), None, "DataLoader; give its data set"),
    ],
)
def test_streams_that_do_not_fit_get_a_sentence(processor: Any, stream: Any, column: str | None, piece: str) -> None:
    with pytest.raises(ValueError, match=piece):
        list(stream_of(stream, processor, "image", input_column=column))


def test_a_text_that_looks_like_a_path_is_one_among_others(tmp_path: Path) -> None:
    """What somebody else wrote decides nothing of a batch."""
    texts = ["the cat", str(tmp_path), "/"]
    assert source_of(texts, checks.WordTokenizer(), "text").shown(1) == str(tmp_path)
    with pytest.raises(ValueError, match="is the path of a file or folder"):
        source_of(texts[1:], checks.WordTokenizer(), "text")

"""Images that are damaged, strange or none: each is read as it should be or is a sentence under its number."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from setar_peft.data.images import ImageSource
from setar_peft.data.sources import source_of

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def encoded(picture: Image.Image, kind: str, **settings: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **settings)
    return data.getvalue()


PNG, JPEG, TIFF = (encoded(RGB, kind) for kind in ("PNG", "JPEG", "TIFF"))


def claimed(width: int, height: int) -> bytes:
    """A small file that says it holds so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def with_a_damaged_byte(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def with_damaged_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(RGB, "JPEG", exif=exif.tobytes()[:20])


def closed() -> Image.Image:
    picture = Image.open(io.BytesIO(PNG))
    picture.close()
    return picture


BAD: dict[str, tuple[Any, str]] = {
    "zero bytes": (b"", "PIL cannot identify it as an image: it is empty"),
    "text": (b"hello, I am no image", "it begins with b'hello, I am no i'"),
    "a page": (b"<!DOCTYPE html><html>", "it begins with b'<!DOCTYPE html><'"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 'it begins with b"<svg xmlns='),
    "a PDF": (b"%PDF-1.4\n", "it begins with b'%PDF-1.4"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "it begins with b'version https"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "it begins with b'.*ftypheic"),
    "a header alone": (PNG[:20], "Truncated"),
    "a cut PNG": (PNG[:-300], "image file is truncated"),
    "a cut JPEG": (JPEG[:-200], "image file is truncated"),
    "a cut TIFF": (TIFF[:-300], "image file is truncated"),
    "a damaged PNG": (with_a_damaged_byte(PNG, 60), "broken data stream"),
    "a damaged header": (with_a_damaged_byte(PNG, 14), "it begins with b.*PNG"),
    "a bomb": (claimed(30_000, 30_000), "DecompressionBombError: .*900000000 pixels"),
    "a large image": (claimed(12_000, 10_000), "DecompressionBombWarning: .*120000000 pixels"),
    "a wide image": (claimed(2**31 - 1, 1), "DecompressionBombError"),
    "damaged EXIF": (with_damaged_exif(), "Corrupt EXIF"),
    "no file": ("nowhere/street.jpg", "^nowhere/street.jpg cannot be read: No such file"),
    "a folder": (Path("/"), "^/ cannot be read: it is a folder"),
    "None": (None, "there is no image"),
    "a number": (3, r"array of shape \(\)"),
    "NaN": (float("nan"), r"array of shape \(\)"),
    "a pair": ((RGB, 0), "it is of type tuple, which is no image; give a path, a URL, encoded bytes"),
    "paths": (["a.png", "b.png"], "it is of type list, which is no image"),
    "a row": ({"image": RGB, "label": 0}, "it is of type dict, which is no image"),
    "an object": (object(), "it is of type object"),
    "a type": (Image.Image, "it is of type type"),
    "no pixels": (np.zeros((0, 5, 3), np.uint8), r"array of shape \(0, 5, 3\), which holds no pixels"),
    "a picture of nothing": (Image.new("RGB", (0, 5)), "it has no pixels: 0 x 5"),
    "a closed picture": (closed(), "closed image"),
    "NaN pixels": (np.full((5, 5, 3), np.nan), "floating-point values from nan to nan"),
    "pixels to 255.0": (PIXELS * 1.0, "floating-point values from 0 to 255"),
    "pixel values": (
        torch.linspace(-2, 2, 75).reshape(3, 5, 5),
        "or all pixel values that a processor has made in one",
    ),
    "a batch": (torch.zeros(1, 3, 5, 5), r"array of shape \(1, 3, 5, 5\)"),
    "five channels": (np.zeros((5, 5, 5), np.uint8), r"array of shape \(5, 5, 5\)"),
    "complex": (np.zeros((5, 5), complex), "complex128"),
    "strings": (np.array(["a"]), "it is of type ndarray"),
    "ragged": ([[1, 2], [3]], "it is of type list"),
    "an undecoded null": ({"bytes": None, "path": None}, "None is no path"),
    "undecoded bytes": ({"bytes": b"no", "path": "a.png"}, "^a.png cannot be read: PIL cannot identify"),
    "32 bits": (Image.fromarray((PIXELS[..., 0]).astype(np.int32)), "integers of 32 bits"),
}
GOOD: dict[str, Any] = {
    "PNG": PNG,
    "CMYK": encoded(RGB.convert("CMYK"), "TIFF"),
    "CMYK JPEG": encoded(RGB.convert("CMYK"), "JPEG"),
    "one pixel": encoded(RGB.crop((0, 0, 1, 1)), "PNG"),
    "one row": encoded(RGB.crop((0, 0, 24, 1)), "PNG"),
    "three rows": encoded(RGB.crop((0, 0, 24, 3)), "PNG"),
    "one bit": encoded(RGB.convert("1"), "PNG"),
    "16 bits": encoded(Image.fromarray(RNG.integers(0, 65536, (20, 24)).astype(np.uint16)), "PNG"),
    "grey and alpha": encoded(RGB.convert("LA"), "PNG"),
    "a palette": encoded(RGB.convert("P"), "GIF"),
    "WebP": encoded(RGB, "WEBP"),
    "booleans": PIXELS[..., 0] > 128,
    "a memory view": memoryview(PNG),
    "a file under another name": {"bytes": JPEG, "path": "a.png"},
}


@pytest.fixture(scope="module")
def everything() -> list[Any]:
    """All of them, good ones between bad ones."""
    mixed = [image for image, _ in BAD.values()]
    for place, image in enumerate(GOOD.values()):
        mixed.insert(3 * place + 1, image)
    return mixed


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_a_sentence_and_the_others_of_its_batch_go_on(processor: Any, name: str) -> None:
    image, piece = BAD[name]
    source = source_of([PNG, image, JPEG], processor, "image")
    (batch,) = source.readable_batches()
    assert batch.numbers == [0, 2]
    assert list(batch.errors) == [1]
    assert batch.labels.tolist() == [-1, -1]
    assert isinstance(batch.inputs, torch.Tensor)
    alone = next(ImageSource(processor, [PNG, JPEG]).batches())[0]
    assert torch.equal(batch.inputs, alone)
    with pytest.raises(ValueError, match=piece):
        raise ValueError(batch.errors[1])
    assert batch.errors[1].startswith((source.name(1), "Image 1 (from 0)"))
    assert batch.errors[1].endswith(".")
    assert "0x" not in batch.errors[1], "an address is another in each run"
    with pytest.raises(ValueError, match=r"1 of 3 images come before it\. Replace it, or take it away\."):
        list(source.batches())
    if name != "a large image":
        with pytest.raises(ValueError, match=piece):
            source.shown(1)
    (alone_bad,) = source.select([1]).readable_batches()
    assert (alone_bad.numbers, alone_bad.inputs, len(alone_bad.labels)) == ([], None, 0)
    assert list(alone_bad.errors) == [0]
    assert len(source.digest()) == 64


@pytest.mark.parametrize("name", GOOD)
def test_a_strange_image_is_read_as_pil_shows_it(processor: Any, name: str) -> None:
    image = GOOD[name]
    source = source_of([image], processor, "image")
    ((pixels, _),) = source.batches()
    data = image["bytes"] if isinstance(image, dict) else image
    if isinstance(data, (bytes, memoryview)) and name != "16 bits":
        with Image.open(io.BytesIO(data)) as picture:
            expected = picture.convert("RGB")
        assert source.shown(0).tobytes() == expected.tobytes()  # type: ignore[union-attr]
        assert torch.equal(pixels, processor(expected, return_tensors="pt")["pixel_values"])
    assert pixels.shape == (1, 3, 8, 8)


def test_bad_images_among_good_ones_keep_their_numbers(processor: Any, everything: list[Any]) -> None:
    for batch_size in (1, 7, 100):
        source = source_of(everything, processor, "image", batch_size=batch_size)
        read: list[int] = []
        errors: dict[int, str] = {}
        for batch in source.readable_batches():
            assert (batch.inputs is None) == (not batch.numbers)
            assert len(batch.numbers) + len(batch.errors) <= batch_size
            read += batch.numbers
            errors |= batch.errors
        assert read == [3 * place + 1 for place in range(len(GOOD))]
        assert sorted([*read, *errors]) == list(range(len(everything)))


def test_of_an_animation_the_first_frame_counts(processor: Any) -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "TIFF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        shown: Any = source_of([data], processor, "image").shown(0)
        red, green, blue = shown.getpixel((4, 4))
        assert red > 250
        assert green < 5
        assert blue < 5


def test_where_warnings_are_none_an_image_that_warns_is_read(processor: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ((pixels, _),) = source_of([with_damaged_exif()], processor, "image").batches()
    assert pixels.isfinite().all()
    assert "Corrupt EXIF" in str(caught[0].message)


class Items(torch.utils.data.Dataset[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        item = self.items[number]
        if isinstance(item, Exception):
            raise item
        return item, 0


@pytest.mark.parametrize(
    ("error", "piece"),
    [
        (OSError("the disk is gone"), "cannot be read: the disk is gone"),
        (KeyError("jpg"), "cannot be read: KeyError: 'jpg'"),
        (RuntimeError(), "cannot be read: RuntimeError"),
        (MemoryError(), "cannot be read: MemoryError"),
        (ZeroDivisionError("division by zero"), "cannot be read: ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_of_a_data_set_is_that_of_its_item(processor: Any, error: Exception, piece: str) -> None:
    source = source_of(Items(RGB, error, RGB), processor, "image", batch_size=2)
    first, second = source.readable_batches()
    assert (first.numbers, second.numbers) == ([0], [2])
    with pytest.raises(ValueError, match=rf"^Image 1 \(from 0\) {piece}\.$"):
        raise ValueError(first.errors[1])
    assert source.name(1) == "1"


class Processor:
    """An image processor that does something wrong with some images."""

    image_mean = (0.0, 0.0, 0.0)
    model_input_names = ("pixel_values", "pixel_attention_mask")

    def __init__(self, make: Any) -> None:
        self.make = make

    def preprocess(self) -> None: ...

    def __call__(self, picture: Image.Image, **_: Any) -> dict[str, Any]:
        return self.make(picture)


@pytest.mark.parametrize(
    ("make", "piece"),
    [
        (lambda p: {"pixel_values": torch.zeros(2, 3, 4, 4)}, r"pixel_values \(2, 3, 4, 4\) for it, which is not one"),
        (lambda p: {"pixel_values": torch.full((1, 3, 4, 4), np.inf)}, "values for it that are not finite"),
        (lambda p: {"pixel_values": torch.zeros(1, 3, *p.size)}, r"\(3, 4, 4\) and \(3, 6, 4\); set its do_resize"),
        (
            lambda p: {"pixel_values": torch.zeros(1, 3, 4, 4), "pixel_attention_mask": torch.zeros(1, 3)},
            r"\(3, 4, 4\) and \(3, 4, 4\), \(3,\); set its do_resize",
        ),
        (lambda p: {}, "gives nothing for it, which is not one image's pixel_values"),
        (lambda p: p.missing, "AttributeError: .*missing"),
    ],
)
def test_what_a_processor_does_to_one_image_is_an_error_of_that_image(make: Any, piece: str) -> None:
    def some(picture: Image.Image) -> Any:
        return make(picture) if picture.width == 6 else {"pixel_values": torch.zeros(1, 3, 4, 4)}

    small, wide = Image.new("RGB", (4, 4)), Image.new("RGB", (6, 4))
    # The odd one may come first: what most of a batch have is the usual shape.
    (batch,) = source_of([wide, small, small], Processor(some), "image").readable_batches()
    assert batch.numbers == [1, 2]
    with pytest.raises(ValueError, match=piece):
        raise ValueError(batch.errors[0])


def test_what_a_processor_gives_beside_pixel_values_is_given_on() -> None:
    """SigLIP 2's says by a mask which patches are padding; what its model does not take is left out."""

    def patches(picture: Image.Image) -> Any:
        mask = torch.arange(4)[None] < picture.width
        sizes = torch.tensor([picture.size])
        return {"pixel_values": torch.ones(1, 4, 12), "pixel_attention_mask": mask.int(), "original_sizes": sizes}

    images = [Image.new("RGB", (side, 4)) for side in (2, 4)]
    (inputs, labels), *_ = source_of(images, Processor(patches), "image").batches()
    assert set(inputs) == {"pixel_values", "pixel_attention_mask"}
    assert inputs["pixel_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert len(labels) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixel_values_that_are_not_finite_are_named(value: float) -> None:
    pixels = torch.randn(5, 3, 4, 4)
    pixels[3, 1, 2, 2] = value
    for data in (pixels, {"pixel_values": pixels, "ids": torch.zeros(5, 2, dtype=torch.long), "weight": torch.ones(5)}):
        source = source_of(data, None, "image", batch_size=4)
        first, second = source.readable_batches()
        assert (first.numbers, second.numbers) == ([0, 1, 2], [4])
        assert "3 (from 0) holds values that are not finite." in first.errors[3]
        with pytest.raises(ValueError, match=r"3 of 5 (image|input)s come before it"):
            list(source.batches())


def rows(*images: Any) -> list[dict[str, Any]]:
    return [{"image": None if image is None else {"bytes": image, "path": None}} for image in images]


@pytest.mark.parametrize("streamed", [False, True])
def test_bad_rows_of_a_data_set_are_named(processor: Any, streamed: bool) -> None:
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_list(rows(PNG, b"no", None, JPEG), features=features)
    data = table.to_iterable_dataset() if streamed else table
    (batch,) = source_of(data, processor, "image").readable_batches()
    assert batch.numbers == [0, 3]
    assert "begins with b'no'" in batch.errors[1]
    assert "there is no image" in batch.errors[2]

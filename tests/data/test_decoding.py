"""Decoding: every mode and depth to 8 bits, upright; batches ahead of their use, in order."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from setar_peft.data.decoding import ahead, decoded, processor_channels

RAMP = np.linspace(0, 1, 48).reshape(6, 8)
EIGHT = (RAMP * 255).round().astype(np.uint8)


def saved(picture: Image.Image, kind: str, **settings: Any) -> dict[str, Any]:
    data = io.BytesIO()
    picture.save(data, kind, **settings)
    return {"bytes": data.getvalue(), "path": None}


def near(image: Image.Image, expected: Any, mode: str, tolerance: int = 1) -> bool:
    assert image.mode == mode
    difference = np.asarray(image).astype(int) - np.asarray(expected).astype(int)
    return bool(np.abs(difference).max() <= tolerance)


def deep() -> np.ndarray:
    return (RAMP * 65535).round().astype(np.uint16)


@pytest.mark.parametrize(
    "image",
    [
        saved(Image.fromarray(deep()), "PNG"),
        saved(Image.fromarray(deep()), "TIFF"),
        saved(Image.fromarray(deep().astype(np.int32)), "TIFF"),
        saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        saved(Image.fromarray(EIGHT), "PNG"),
        Image.fromarray(deep()),
        Image.fromarray(deep().astype(np.int32)),
        Image.fromarray(RAMP.astype(np.float32)),
        deep(),
        deep().astype(">u2"),
        RAMP,
        RAMP.astype(np.float16),
        torch.as_tensor(RAMP)[None],
        EIGHT,
        EIGHT.astype(np.int64),
        EIGHT.tolist(),
        EIGHT[..., None],
        EIGHT[None],
        np.stack([EIGHT] * 3),
        np.stack([EIGHT] * 3, -1),
        np.stack([EIGHT] * 4, -1),
    ],
    ids=lambda image: type(image).__name__,
)
def test_every_depth_becomes_eight_bits(image: Any) -> None:
    assert near(decoded(image, 1), EIGHT, "L")
    assert near(decoded(image, 3), np.stack([EIGHT] * 3, -1), "RGB")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_converted_as_stock_processors_do(mode: str, channels: int) -> None:
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    picture = colours.convert(mode)
    assert near(
        decoded(picture, channels), picture.convert("RGB" if channels == 3 else "L"), ["", "L", "", "RGB"][channels]
    )


def test_a_palette_with_transparency_keeps_its_colours() -> None:
    picture = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "L").convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    image = saved(picture, "PNG", transparency=bytes([0, 255, 128, 255]))
    assert np.asarray(decoded(image, 3)).tolist() == [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [100, 110, 120]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_kind_of_image_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(EIGHT).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
    lying = EIGHT
    turned = {
        1: lying,
        2: lying[:, ::-1],
        3: lying[::-1, ::-1],
        4: lying[::-1],
        5: lying.T,
        6: lying[::-1].T,
        7: lying[::-1, ::-1].T,
        8: lying[:, ::-1].T,
    }[orientation]
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), picture, {"bytes": (tmp_path / "a.png").read_bytes()}):
        assert np.array_equal(np.asarray(decoded(image, 1)), turned)


@pytest.mark.parametrize(
    ("image", "piece"),
    [
        (RAMP * 255, r"floating-point values from 0 to 255; bring them into 0 \.\.\. 1"),
        (RAMP - 0.5, "from -0.5 to 0.5"),
        (RAMP * np.nan, "from nan to nan"),
        (Image.fromarray((RAMP * 200).astype(np.int32)), "integers of 32 bits from 0 to 200, and their white is not"),
        (Image.fromarray((RAMP * 70000).astype(np.int32)), "from 0 to 70000"),
        (deep().astype(np.int64), r"array of int64 beyond 0 \.\.\. 255; give uint8 or uint16"),
        (np.zeros((2, 5, 5)), r"array of shape \(2, 5, 5\)"),
        (np.zeros((3, 5, 3)), r"array of shape \(3, 5, 3\)"),
        (np.zeros(5), r"array of shape \(5,\)"),
        (RAMP * 1j, "array of complex128"),
        (None, "there is no image"),
        (3, r"array of shape \(\)"),
    ],
)
def test_what_is_not_known_is_refused(image: Any, piece: str) -> None:
    with pytest.raises(ValueError, match=piece):
        decoded(image, 3)


def test_a_processor_says_how_many_channels_it_takes() -> None:
    class Processor:
        image_mean: Any = (0.5,)

    assert processor_channels(Processor()) == 1
    for mean in ([0.1, 0.2, 0.3], np.zeros(3)):
        Processor.image_mean = mean
        assert processor_channels(Processor()) == 3
    for mean in (None, 0.5, [0.1, 0.2]):
        Processor.image_mean = mean
        with pytest.raises(ValueError, match=r"image_mean is .*three numbers, or one"):
            processor_channels(Processor())


def test_one_part_is_ahead_and_all_are_in_order() -> None:
    fetched: list[int] = []
    second_is_ready = threading.Event()

    def fetch(number: int) -> int:
        fetched.append(number)
        return number * number

    def process(number: int, value: int) -> tuple[int, int]:
        time.sleep(0.002 * (7 - number))
        if number == 5:
            second_is_ready.set()
        return number, value

    parts = [range(3), range(3, 6), range(6, 7)]
    outputs = ahead(parts, fetch, process)
    assert next(outputs) == [(0, 0), (1, 1), (2, 4)]
    assert second_is_ready.wait(5), "the second part is made while the first is used"
    assert list(outputs) == [[(3, 9), (4, 16), (5, 25)], [(6, 36)]]
    assert fetched == list(range(7))
    assert list(ahead([], fetch, process)) == []


@pytest.mark.parametrize("how", ["stopped early", "an error", "Ctrl-C"])
def test_no_thread_outlives_its_use(how: str) -> None:
    def process(number: int, _: Any) -> int:
        if how == "an error" and number >= 4:
            raise ValueError(f"number {number}")
        return number

    before = threading.active_count()
    outputs = ahead([range(start, start + 2) for start in range(0, 20, 2)], lambda number: number, process)
    assert next(outputs) == [0, 1]
    if how == "stopped early":
        outputs.close()
    elif how == "Ctrl-C":
        with pytest.raises(KeyboardInterrupt):
            outputs.throw(KeyboardInterrupt)
    else:
        assert next(outputs) == [2, 3]
        with pytest.raises(ValueError, match="number 4"):
            next(outputs)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before  # others may have ended meanwhile

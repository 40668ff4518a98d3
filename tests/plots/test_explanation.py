"""The maps of patches and tokens: what stands where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from setar_peft.plots.explanation import patch_figure, token_figure

NAMES = [f"class {number}" for number in range(12)]


def map_of(rows: int, columns: int, seed: int = 0) -> tuple[Any, Any, tuple[int, int]]:
    generator = np.random.default_rng(seed)
    classes = generator.integers(0, len(NAMES), (rows, columns))
    strengths = generator.uniform(0.1, 0.2, (rows, columns)).astype(np.float32)
    row, column = divmod(int(strengths.argmax()), columns)
    return classes, strengths, (row, column)


def texts_of_legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (24, 24), (1, 1), (3, 9)])
def test_the_maps_lie_over_the_picture(rows: int, columns: int) -> None:
    classes, strengths, strongest = map_of(rows, columns)
    picture = Image.new("RGB", (columns * 8 - 3, rows * 4 - 1), "red")
    drawn = {"patch": (4, 8), "strongest": strongest, "title": "cat"}
    figure = patch_figure(picture, classes, strengths, NAMES, **drawn)
    seen, strength, names = figure.axes[:3]
    (ground,), (_, map_) = seen.images, strength.images
    assert ground.get_extent() == [0, picture.width, picture.height, 0]
    # The map may be larger than the picture, which it is cut to.
    assert map_.get_extent() == [0, 8 * columns, 4 * rows, 0]
    assert np.array_equal(map_.get_array(), strengths)
    for axes in (seen, strength, names):
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, picture.width), (picture.height, 0))
        assert axes.patches[0].get_xy() == (8 * strongest[1], 4 * strongest[0])
    figure.canvas.draw()


def test_the_strongest_classes_are_named_and_the_rest_is_counted() -> None:
    classes, strengths, _ = map_of(24, 24)
    classes[0, 0], strengths[0, 0] = 5, 0.9
    picture = Image.new("L", (24, 24))
    figure = patch_figure(picture, classes, strengths, NAMES, patch=(1, 1), strongest=(0, 0), title="")
    texts = texts_of_legend(figure)
    assert len(texts) == 8
    assert texts[0] == f"class 5: {(classes == 5).sum()} patches, up to 0.9"
    assert texts[-1].startswith("5 more: ")
    counts = [int(text.split(": ")[1].split(" ")[0]) for text in texts]
    assert sum(counts) == 24 * 24
    colours = figure.axes[2].images[1].get_array()
    assert np.array_equal(colours[0, 0], colours[classes == 5][-1])
    assert not np.array_equal(colours[0, 0], colours[classes != 5][0])


def test_tokens_stand_in_lines_and_names_are_no_formulas() -> None:
    tokens = ["$x", "y$", *["word"] * 40, "w" * 200]
    classes, strengths, (_, strongest) = map_of(1, len(tokens))
    names = ["a $ and $ b", *NAMES[1:]]
    classes[0, 0] = 0
    figure = token_figure(tokens, classes[0], strengths[0], names, strongest=strongest, title="5 of $ 10")
    (axes,) = figure.axes
    shown = [text.get_text() for text in axes.texts]
    assert shown[:42] == tokens[:42]
    assert shown[-1].endswith("w…")
    places = [text.get_position() for text in axes.texts]
    assert places == sorted(places, key=lambda place: (place[1], place[0]))
    assert all(0 < x < 77 for x, _ in places)
    figure.canvas.draw()

"""Figures of what each patch of an image, or each token of a text, speaks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from setar_peft.plots.figure import ID_COLOUR, OOD_COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

_COLOURS = (ID_COLOUR, *OOD_COLOURS)
_OTHER = "#9A9A9A"
_LINE = 76  # characters of tokens in one line
_CHARACTER = 0.084  # inches, of the monospaced font in 10 points


def patch_figure(
    picture: Image,
    classes: NDArray[Any],
    strengths: NDArray[Any],
    class_names: Sequence[str],
    *,
    patch: tuple[int, int],
    strongest: tuple[int, int],
    title: str,
) -> Figure:
    """An image beside two maps over it: how strongly each patch speaks for its class, and for which.

    Args:
        picture: The image as the model saw it.
        classes: Index of each patch's strongest class, (rows, columns).
        strengths: That class's probability within the patch, (rows, columns), in [0, 1].
        class_names: Names of the classes.
        patch: Height and width of a patch in pixels of the picture. Patches beyond the picture are cut off.
        strongest: Row and column of the patch with the largest strength, which is framed.
        title: Stands above.

    Raises:
        ValueError: If matplotlib is missing.
    """
    rows, columns = strengths.shape
    side = 3.3
    height = min(max(side * picture.height / picture.width, 0.8), 3 * side)
    colours, legend = _class_colours(classes, strengths, class_names, "patch")
    figure = _figure_with_legend(3 * side + 1.2, height + 0.9, legend)
    figure.suptitle(title, fontsize=11)
    seen, strength, names = figure.subplots(1, 3)
    grey = np.asarray(picture.convert("L"))
    edges = (0.0, float(picture.width), float(picture.height), 0.0)
    extent = (0.0, float(columns * patch[1]), float(rows * patch[0]), 0.0)
    seen.imshow(picture.convert("RGB"), extent=edges, interpolation="nearest")
    seen.set_title("as the model saw it", fontsize=10)
    for axes in (strength, names):
        axes.imshow(grey, cmap="gray", extent=edges, interpolation="nearest")
    # An opaque map would hide the picture, a faint one its own values.
    shown = strength.imshow(strengths, cmap="viridis", alpha=0.6, extent=extent, interpolation="nearest")
    strength.set_title("strength of the patch's class", fontsize=10)
    figure.colorbar(shown, ax=strength, shrink=0.75, format="%.4g")
    names.imshow(colours[classes], alpha=0.6, extent=extent, interpolation="nearest")
    names.set_title("the patch's class", fontsize=10)
    for axes in (seen, strength, names):
        _frame(axes, strongest[1] * patch[1], strongest[0] * patch[0], patch[1], patch[0])
        axes.set_xlim(0, picture.width)
        axes.set_ylim(picture.height, 0)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def token_figure(
    tokens: Sequence[str],
    classes: NDArray[Any],
    strengths: NDArray[Any],
    class_names: Sequence[str],
    *,
    strongest: int,
    title: str,
) -> Figure:
    """A text's tokens in the colours of the classes that they speak for, the fuller the stronger.

    Args:
        tokens: The tokens as words.
        classes: Index of each token's strongest class, (tokens,).
        strengths: That class's probability within the token, (tokens,), in [0, 1].
        class_names: Names of the classes.
        strongest: The token with the largest strength, which is framed.
        title: Stands above.

    Raises:
        ValueError: If matplotlib is missing.
    """
    places, lines = _laid_out([len(token) for token in tokens])
    colours, legend = _class_colours(classes, strengths, class_names, "token")
    figure = _figure_with_legend(_LINE * _CHARACTER + 0.4, 0.34 * lines + 0.6, legend)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    axes.set_xlim(0, _LINE)
    axes.set_ylim(lines, 0)
    axes.set_axis_off()
    low, high = float(strengths.min()), float(strengths.max())
    for number, (token, (left, line)) in enumerate(zip(tokens, places, strict=True)):
        share = (float(strengths[number]) - low) / (high - low) if high > low else 1.0
        width = min(len(token) + 1, _LINE - left)
        box = (left + 0.1, line + 0.08, width - 0.2, 0.84)
        _fill(axes, *box, colour=colours[classes[number]], alpha=0.1 + 0.6 * share)
        if number == strongest:
            _frame(axes, *box)
        axes.text(
            left + width / 2,
            line + 0.52,
            token if len(token) < _LINE else f"{token[: _LINE - 2]}…",
            ha="center",
            va="center",
            fontfamily="monospace",
            fontsize=10,
            parse_math=False,
        )
    return figure


def _laid_out(lengths: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """Where each of some words begins, (character, line), and the number of lines."""
    places, left, line = [], 0, 0
    for length in lengths:
        if left and left + length + 1 > _LINE:
            left, line = 0, line + 1
        places.append((left, line))
        left += length + 1
    return places, line + 1


def _class_colours(
    classes: NDArray[Any], strengths: NDArray[Any], class_names: Sequence[str], part: Literal["patch", "token"]
) -> tuple[NDArray[Any], list[tuple[str, str]]]:
    """A colour for each class, (classes, 3), and the legend: colour and text of the classes that speak strongest."""
    from matplotlib.colors import to_rgb

    strongest = {int(index): float(strengths[classes == index].max()) for index in np.unique(classes)}
    ranked = sorted(strongest, key=lambda index: -strongest[index])
    named, rest = ranked[: len(_COLOURS)], ranked[len(_COLOURS) :]
    colours = np.tile(to_rgb(_OTHER), (len(class_names), 1))
    groups = [(colour, _short(class_names[index]), [index]) for index, colour in zip(named, _COLOURS, strict=False)]
    groups += [(_OTHER, f"{len(rest)} more", rest)] if rest else []
    legend: list[tuple[str, str]] = []
    for colour, name, indices in groups:
        colours[indices] = to_rgb(colour)
        count = int(np.isin(classes, indices).sum())
        parts = {"patch": "patches", "token": "tokens"}[part] if count > 1 else part
        legend.append((colour, f"{name}: {count} {parts}, up to {strongest[indices[0]]:.4g}"))
    return colours, legend


def _short(name: str, limit: int = 28) -> str:
    name = name.replace("$", r"\$")
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _fill(axes: Axes, left: float, top: float, width: float, height: float, *, colour: Any, alpha: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top), width, height, facecolor=(*colour, alpha)))


def _frame(axes: Axes, left: float, top: float, width: float, height: float) -> None:
    """A black frame in a white one, which is seen on any ground."""
    from matplotlib.patches import Rectangle

    for colour, line in (("white", 3.5), ("black", 1.5)):
        axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=colour, linewidth=line))


def _figure_with_legend(width: float, height: float, entries: Sequence[tuple[str, str]]) -> Figure:
    """An empty figure of that many inches, with a legend of colours and texts below."""
    entry_width = 0.6 + 0.075 * max(len(text) for _, text in entries)  # inches
    columns = max(1, min(3, len(entries), int(width / entry_width)))
    figure = new_figure(width, height + 0.25 + 0.19 * -(-len(entries) // columns))
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, alpha=0.7, label=text) for colour, text in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure

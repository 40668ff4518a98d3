"""One self-contained HTML page of tables, figures and pictures: no script, and nothing that is fetched.

The page is written from plain content, escapes all of it, and forbids the browser every outside resource itself.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from setar_peft.writing import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Longest side of a picture in pixels, up to where its pixels are shown as squares, and how much of a text is shown.
_PICTURE_SIZE = 224
_SMALL_SIZE = 64
_TEXT_LENGTH = 600
_FIGURE_DPI = 130

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --faint: #5b6168; --page: #fff; --card: #f4f5f7; --line: #d5d8dc;
  --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8ea; --faint: #a8aeb5; --page: #16181b; --card: #22262b;
  --line: #3a4047; --link: #7db7f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; padding: 0; }
.scroll { overflow-x: auto; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { vertical-align: bottom; }
.settings { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; }
figcaption { color: var(--faint); font-size: .85rem; }
.figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1rem; padding: 0;
  list-style: none; }
.pictures figure { margin: 0; padding: .5rem; background: var(--card); border-radius: 4px; height: 100%; }
.pictures img { display: block; width: 100%; height: 9rem; object-fit: contain; }
.pictures img.small { image-rendering: pixelated; }
.pictures blockquote { margin: 0; height: 9rem; overflow: auto; white-space: pre-wrap; font-size: .85rem; }
@media print { :root { color-scheme: light; --text: #000; --faint: #444; --page: #fff; --card: #fff; --line: #999;
  --link: #000; } nav { display: none; } body { max-width: none; padding: 0; } .scroll { overflow: visible; }
  table { font-size: .8rem; } figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .pictures { grid-template-columns: repeat(4, 1fr); } .pictures blockquote { height: auto; overflow: visible; } }
"""


class Table(NamedTuple):
    """A table.

    Attributes:
        caption: What is in it.
        headings: One a column.
        rows: Cells as text, as many a row as there are headings. A column of nothing but numbers is set to the right.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


class Drawing(NamedTuple):
    """A figure.

    Attributes:
        figure: As the functions of `setar_peft.plots` make it.
        description: What it shows, for those who cannot see it.
        caption: What stands below it.
    """

    figure: Figure
    description: str
    caption: str


class Picture(NamedTuple):
    """An input of a model as a person sees it.

    Attributes:
        shown: A `PIL.Image.Image`, or a text.
        caption: What stands below it; for those who cannot see it, too.
    """

    shown: Any
    caption: str


class Pictures(NamedTuple):
    """Pictures or texts side by side.

    Attributes:
        caption: What they have in common.
        pictures: In order; there may be none, which the page says.
    """

    caption: str
    pictures: Sequence[Picture]


class Settings(NamedTuple):
    """Names and what they are set to.

    Attributes:
        settings: (name, value) pairs.
    """

    settings: Sequence[tuple[str, str]]


# A string is a paragraph.
Content: TypeAlias = "str | Table | Drawing | Pictures | Settings"


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        title: Its heading.
        content: What is in it, in order.
    """

    title: str
    content: Sequence[Content]


def write_page(path: str | os.PathLike[str], title: str, sections: Sequence[Section]) -> Path:
    """Write a page, whole or not at all.

    Args:
        path: The file, which is replaced if it is there.
        title: Its title.
        sections: What is on it.

    Returns:
        The path.

    Raises:
        ValueError: If the folder does not exist.
    """
    page = page_of(title, sections)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def page_of(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML."""
    links = "".join(f'<li><a href="#part{n}">{escape(section.title)}</a></li>' for n, section in enumerate(sections))
    parts = "\n".join(
        f'<section id="part{n}" aria-labelledby="title{n}"><h2 id="title{n}">{escape(section.title)}</h2>\n'
        + "\n".join(map(_html, section.content))
        + "</section>"
        for n, section in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<header><h1>{escape(title)}</h1>"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav></header>\n<main>\n{parts}\n</main>\n</body>\n</html>\n'
    )


def _html(content: Content) -> str:
    if isinstance(content, str):
        return f"<p>{escape(content)}</p>"
    if isinstance(content, Table):
        return _table(content)
    if isinstance(content, Drawing):
        file = io.BytesIO()
        content.figure.savefig(file, format="png", dpi=_FIGURE_DPI)
        return (
            f'<figure class="figure"><img src="{_data("png", file)}" alt="{escape(content.description)}">'
            f"<figcaption>{escape(content.caption)}</figcaption></figure>"
        )
    if isinstance(content, Pictures):
        shown = "".join(f"<li>{_picture(picture)}</li>" for picture in content.pictures)
        return f"<h3>{escape(content.caption)}</h3>" + (
            f'<ul class="pictures">{shown}</ul>' if shown else "<p>None.</p>"
        )
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in content.settings
    )
    return f'<table class="settings"><tbody>{rows}</tbody></table>'


def _table(table: Table) -> str:
    numeric = [
        all(_is_number(row[column]) for row in table.rows) and bool(table.rows) for column in range(len(table.headings))
    ]
    kinds = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(
        f'<th scope="col"{kind}>{escape(heading)}</th>' for kind, heading in zip(kinds, table.headings, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    # Reachable by the keyboard, so that a table wider than the window can be scrolled without a mouse.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}"><table>'
        f"<caption>{escape(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _is_number(cell: str) -> bool:
    """Whether a cell is a number, one with its interval in brackets, or a dash for one that is not known."""
    try:
        float(cell.partition(" [")[0])
    except ValueError:
        return cell == "-"
    return True


def _picture(picture: Picture) -> str:
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    if isinstance(picture.shown, str):
        text = picture.shown
        cut = text if len(text) <= _TEXT_LENGTH else text[:_TEXT_LENGTH] + " …"
        return f'<figure><blockquote tabindex="0">{escape(cut)}</blockquote>{caption}</figure>'
    image = picture.shown.convert("RGB")
    image.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
    file = io.BytesIO()
    is_small = max(image.size) <= _SMALL_SIZE
    kind = "png" if is_small else "jpeg"
    image.save(file, kind, quality=85)
    small = ' class="small"' if is_small else ""
    return f'<figure><img{small} src="{_data(kind, file)}" alt="{escape(picture.caption)}">{caption}</figure>'


def _data(kind: str, file: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"

"""The page as HTML, and in a real browser."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from setar_peft import plots
from setar_peft.plots.report import Drawing, Picture, Pictures, Section, Settings, Table, page_of, write_page
from tests.plots.browser import browser

HOSTILE = """<script>alert("1")</script> & 'x' <img src="https://example.org/x.png">"""


def figure() -> Any:
    generator = np.random.default_rng(0)
    scores = {"ID": generator.normal(1, 1, 50), "noise": generator.normal(0, 1, 40)}
    return plots.roc_figure({"base": scores}, "mcm")


def sections() -> list[Section]:
    pictures = [
        Picture(Image.new("L", (28, 28), 128), "a small one"),
        Picture(Image.new("RGBA", (900, 300), "red"), HOSTILE),
        Picture(HOSTILE, "a text"),
        Picture("long " * 1000, "a long text"),
    ]
    return [
        Section("Tables", ["A paragraph.", Table("All", ["set", "FPR95"], [["noise", "1.00 [0.5, 1.5]"], ["b", "-"]])]),
        Section(HOSTILE, [Drawing(figure(), "ROC curve of <mcm>", "Below it")]),
        Section("Mistakes", [Pictures("Taken for ID", pictures), Pictures("Rejected", [])]),
        Section("Settings", [Settings([("prompt", HOSTILE), ("long", "x" * 300)])]),
    ]


class Tags(HTMLParser):
    """Every tag with its attributes, and whether all are closed."""

    VOID = frozenset({"meta", "link", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_everything_is_escaped_and_every_tag_is_closed() -> None:
    page = page_of(HOSTILE, sections())
    tags = Tags(page)
    assert tags.open == []
    names = {tag for tag, _ in tags.seen}
    assert names.isdisjoint({"script", "iframe", "object", "embed"})
    assert page.count("&lt;script&gt;") >= 5
    assert "<script" not in page
    assert "x.png" in unescape(page)


def test_nothing_is_fetched_and_every_picture_says_what_it_shows() -> None:
    tags = Tags(page_of("Title", sections()))
    for tag, attributes in tags.seen:
        for name in ("src", "href"):
            address = attributes.get(name) or "data:"
            assert address.startswith(("data:", "#")), (tag, address)
        if tag == "img":
            assert attributes["alt"]
    ids = {attributes["id"] for _, attributes in tags.seen if "id" in attributes}
    links = {str(attributes["href"])[1:] for tag, attributes in tags.seen if tag == "a"}
    assert links <= ids
    assert len(links) == 4


def test_numbers_are_set_to_the_right_and_long_texts_are_cut() -> None:
    page = page_of("Title", sections())
    assert '<td class="number">1.00 [0.5, 1.5]</td>' in page
    assert '<td class="number">-</td>' in page
    assert "<td>noise</td>" in page
    assert 0 < page.count("long ") < 200
    assert "<p>None.</p>" in page


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")
    broken = [Section("Mistakes", [Pictures("Taken for ID", [Picture(None, "no picture")])])]
    with pytest.raises(AttributeError):
        write_page(path, "Title", broken)
    assert path.read_text() == "before"
    assert write_page(path, "Title", sections()) == path
    assert path.read_text(encoding="utf-8") == page_of("Title", sections())
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere to write report.html to; make it"):
        write_page(tmp_path / "nowhere" / "report.html", "Title", sections())


def test_a_real_browser_shows_it(tmp_path: Path) -> None:
    path = write_page(tmp_path / "report.html", HOSTILE, sections())
    with browser(tmp_path) as page:
        page.open(path)
        assert page.messages == []
        assert [address for address in page.requests if not address.startswith("data:")] == [path.as_uri()]
        assert page.evaluate("document.title") == HOSTILE
        sizes = page.evaluate("[...document.images].map(image => [image.naturalWidth, image.naturalHeight])")
        assert sizes[0][0] > 300
        # A large picture is shown smaller, its sides in proportion.
        assert sizes[1:] == [[28, 28], [224, 75]]
        assert page.evaluate("document.querySelectorAll('blockquote').length") == 2
        assert page.evaluate("document.querySelectorAll('nav a').length") == 4
        # What is wider than the window can be scrolled to by the keyboard.
        assert page.evaluate("document.querySelector('.scroll').tabIndex") == 0
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.open(path, dark=True)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        # On a telephone the page itself does not go beyond the window.
        page.width(420)
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        page.print(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_a_real_browser_would_tell_of_what_is_fetched(tmp_path: Path) -> None:
    """The test above can fail: the page itself forbids what it does not hold, and the browser says so."""
    path = write_page(tmp_path / "report.html", "Title", sections())
    page_text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"</main>", '<img src="http://127.0.0.1:9/x.png"></main>', page_text), encoding="utf-8")
    with browser(tmp_path) as page:
        page.open(path)
        assert "Content Security Policy" in " ".join(page.messages)

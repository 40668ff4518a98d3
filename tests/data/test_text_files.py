"""Files of texts: lines and tables as they are written, and what is wrong in which line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from setar_peft.data.sources import source_of
from setar_peft.data.text_files import read_texts
from tests.backbones import checks


def written(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return file


def texts_of(file: Path, **settings: Any) -> list[str]:
    source: Any = source_of(file, checks.WordTokenizer(), "text", **settings)
    return [source.shown(number) for number in range(len(source))]


@pytest.mark.parametrize(
    "content",
    [
        "one\ntwo, three\nvier ü\u2028x\n",
        "one\r\ntwo, three\r\nvier ü\u2028x\r\n",
        "\ufeffone\ntwo, three\nvier ü\u2028x",
    ],
)
def test_a_line_is_a_text(tmp_path: Path, content: str) -> None:
    """However lines end; a line ends nowhere else."""
    assert texts_of(written(tmp_path, "a.TXT", content)) == ["one", "two, three", "vier ü\u2028x"]


def test_empty_lines_are_left_out_and_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"3 empty lines of .*a\.txt are left out"):
        assert texts_of(written(tmp_path, "a.txt", "\none\n \n  two \n\n")) == ["one", "  two "]
    with pytest.warns(UserWarning, match=r"1 empty lines of .*a\.csv are left out"):
        assert texts_of(written(tmp_path, "a.csv", "text\none\n\ntwo\n")) == ["one", "two"]


def test_a_column_of_a_table(tmp_path: Path) -> None:
    table = 'id,text,label,query\n1,"one, and ""more""",cat,a\n2,"two\nlines",dog,b\n'
    for content in (table, table.replace("\n", "\r\n"), "\ufeff" + table):
        file = written(tmp_path, "a.csv", content)
        assert texts_of(file) == ['one, and "more"', "two\nlines"]
        assert texts_of(file, input_column="query") == ["a", "b"]
    source = source_of(file, checks.WordTokenizer(), "text", class_names=["Dog", "Cat"])
    assert source.labels.tolist() == [1, 0]
    assert source.matched == {"cat": "Cat", "dog": "Dog"}
    by_query = source_of(
        file, checks.WordTokenizer(), "text", class_names=["b", "a"], label_column="query", input_column="text"
    )
    assert by_query.labels.tolist() == [1, 0]
    given = source_of(file, checks.WordTokenizer(), "text", class_names=["x", "y"], labels=[0, 1])
    assert given.labels.tolist() == [0, 1]


def test_an_empty_field_is_an_input_that_cannot_be_read(tmp_path: Path) -> None:
    """The rows of a table count."""
    source = source_of(written(tmp_path, "a.csv", "id,text\n1,one\n2,\n3,three\n"), checks.WordTokenizer(), "text")
    (batch,) = source.readable_batches()
    assert batch.numbers == [0, 2]
    assert batch.errors == {1: "Text 1 (from 0) is empty."}


@pytest.mark.parametrize(
    ("name", "content", "piece"),
    [
        ("a.txt", b"one\ntwo\ncaf\xe9\n", r"a\.txt, line 3: byte 0xe9 is not UTF-8; save the file in UTF-8"),
        ("a.txt", "one".encode("utf-16"), r"a\.txt, line 1: byte 0xff is not UTF-8"),
        ("a.txt", b"", "holds no texts; give at least one"),
        ("a.txt", b"\n \n", "holds no texts"),
        ("a.txt", b"one\rtwo\r", "line 1: it holds a carriage return; end each line with a line feed"),
        ("a.csv", b"text\none\ncaf\xe9\n", r"a\.csv, line 3: byte 0xe9"),
        (
            "a.csv",
            b"text,label\nI like it, really,0\n",
            "line 2: 3 fields for the 2 columns text, label; put texts with",
        ),
        ("a.csv", b"text\nhello, world\n", "line 2: 2 fields for the 1 columns text"),
        ("a.csv", b"text,label\none\n", "line 2: 1 fields for the 2 columns"),
        ("a.csv", b"text;label\none;0\n", "a.csv has the columns text;label, but no text; say with text_column"),
        ("a.csv", b"I like it\nI do not\n", "has the columns I like it, but no text"),
        ("a.csv", b"text\n", "holds no texts"),
        ("a.csv", b"", "holds no texts"),
        ("a.csv", b'text\n"one\n', "line 2: it is no table of comma-separated values"),
        ("a.csv", b'text\n"one" two\n', "line 2: it is no table of comma-separated values"),
        ("a.json", b"[]", "a.json is no file of texts; give a .txt file with one text a line, a .csv file"),
        ("a", b"one", "a is no file of texts"),
    ],
)
def test_a_file_that_does_not_fit_gets_a_sentence(tmp_path: Path, name: str, content: bytes, piece: str) -> None:
    with pytest.raises(ValueError, match=piece):
        read_texts(written(tmp_path, name, content), None, None, labelled=False)


def test_what_is_no_file_of_texts_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.txt is no such file"):
        read_texts(tmp_path / "nowhere.txt", None, None, labelled=False)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"folder\.txt is no file of texts"):
        read_texts(tmp_path / "folder.txt", None, None, labelled=False)
    file = written(tmp_path, "a.txt", "one\n")
    with pytest.raises(ValueError, match="has no columns; take the names of columns away"):
        read_texts(file, "text", None, labelled=False)
    with pytest.raises(ValueError, match="no labels; give labels"):
        source_of(file, checks.WordTokenizer(), "text", class_names=["a", "b"])
    table = written(tmp_path, "a.csv", "text\none\n")
    with pytest.raises(ValueError, match="has the columns text, but no label; say with text_column and label_column"):
        source_of(table, checks.WordTokenizer(), "text", class_names=["a", "b"])
    with pytest.raises(ValueError, match="has the columns text, but no query"):
        source_of(table, checks.WordTokenizer(), "text", input_column="query")

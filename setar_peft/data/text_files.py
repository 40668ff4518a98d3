"""Files of texts: one a line, or a column of a table."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import NamedTuple

from setar_peft.data.rows import usual_columns

TEXT_SUFFIXES = (".txt", ".csv")


class FileTexts(NamedTuple):
    """The texts of a file.

    Attributes:
        texts: In the order of the file.
        labels: What it says of each; None where labels are not asked for, or the file has none.
    """

    texts: list[str]
    labels: list[str] | None


def read_texts(file: Path, text_column: str | None, label_column: str | None, *, labelled: bool) -> FileTexts:
    """The texts of a UTF-8 file: the lines of a .txt file, or a column of a .csv file whose first row names columns.

    Empty lines are left out, with a warning.

    Args:
        file: The file.
        text_column: Name of the table's column of texts, by default "text".
        label_column: Name of that of labels, by default "label".
        labelled: Whether labels are asked for.

    Raises:
        ValueError: If it is no such file, holds no texts, is not in UTF-8, a line holds a carriage return, or a row has
            not as many fields as there are columns.
    """
    suffix = file.suffix.lower()
    if suffix not in TEXT_SUFFIXES or not file.is_file():
        what = "no such file" if not file.exists() else "no file of texts"
        raise ValueError(
            f"{file} is {what}; give a .txt file with one text a line, a .csv file with a column of texts, or a list "
            "of texts."
        )
    lines = _lines(file)
    if suffix == ".csv":
        texts, labels, empty = _of_table(file, lines, text_column, label_column, labelled)
    else:
        if text_column or label_column:
            raise ValueError(f"{file} has no columns; take the names of columns away, or give a .csv file.")
        within = next((number for number, line in enumerate(lines, 1) if "\r" in line), None)
        if within is not None:
            raise ValueError(f"{file}, line {within}: it holds a carriage return; end each line with a line feed.")
        texts, labels = [line for line in lines if line.strip()], None
        empty = len(lines) - len(texts)
    if not texts:
        raise ValueError(f"{file} holds no texts; give at least one.")
    if empty:
        warnings.warn(f"{empty} empty lines of {file} are left out.", UserWarning, stacklevel=3)
    return FileTexts(texts, labels)


def _lines(file: Path) -> list[str]:
    """Its lines without their ends; a line ends with a line feed alone, whatever else ends one elsewhere."""
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        lines = [line.removesuffix("\r") for line in content.decode("utf-8").split("\n")]
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}, line {number}: byte {content[error.start]:#04x} is not UTF-8; save the file in UTF-8."
        ) from None
    return lines[:-1] if not lines[-1] else lines


def _of_table(
    file: Path, lines: list[str], text_column: str | None, label_column: str | None, labelled: bool
) -> tuple[list[str], list[str] | None, int]:
    rows = csv.reader((f"{line}\n" for line in lines), strict=True)
    texts: list[str] = []
    labels: list[str] = []
    empty = 0
    header: list[str] | None = None
    chosen: dict[str, str] = {}
    try:
        for row in rows:
            if not row:
                empty += 1
            elif header is None:
                header = row
                given = {"text": text_column, **({"label": label_column} if labelled else {})}
                chosen = usual_columns(header, given, {}, str(file))
            elif len(row) != len(header):
                raise ValueError(
                    f"{file}, line {rows.line_num}: {len(row)} fields for the {len(header)} columns "
                    f"{', '.join(header)}; put texts with commas or quotes into quotes."
                )
            else:
                texts.append(row[header.index(chosen["text"])])
                labels += [row[header.index(chosen["label"])]] if labelled else []
    except csv.Error as error:
        raise ValueError(f"{file}, line {rows.line_num}: it is no table of comma-separated values ({error}).") from None
    return texts, labels if labelled else None, empty

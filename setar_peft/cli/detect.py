"""Decide of images whether they are in-distribution: one record an image, with label, score and threshold."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from setar_peft.backbones.loading import torch_device
from setar_peft.cli.options import Device
from setar_peft.cli.progress import shown
from setar_peft.data.files import is_url
from setar_peft.data.folders import read_folder
from setar_peft.data.text_files import TEXT_SUFFIXES, read_texts
from setar_peft.detection.detector import OODDetector
from setar_peft.detection.record import Detection, Detections

OOD_FOUND = 3
NOT_DECIDED = 1


def detect(
    detector: Annotated[str, typer.Argument(help="Folder or Hub name of the detector, as `setar fit` saves it.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Images: paths, folders, URLs. For a detector of texts: texts, or .txt (one a line) and .csv files."
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json/--table", help="One JSON record a line, as they come; or a table at the end.")
    ] = False,
    threshold: Annotated[
        float | None, typer.Option(help="Another threshold on the score.", show_default="the detector's")
    ] = None,
    tpr: Annotated[
        float | None,
        typer.Option(help="Another share of in-distribution images to be kept.", show_default="the detector's"),
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many of the likeliest classes a JSON record names.")] = 1,
    fail_on_ood: Annotated[
        bool, typer.Option("--fail-on-ood", help=f"Exit with code {OOD_FOUND} if an image is out-of-distribution.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(help="Images a batch.", show_default="the detector's")] = None,
    device: Device = None,
) -> None:
    """Decide of images whether they are in-distribution: one record an image, with label, score and threshold.

    An image that cannot be read is a record with the reason, and ends nothing. Records go to standard output, all else
    to standard error.

    **Exit codes**: 0, all is decided; 1, an image could not be, or the command was refused; 2, wrong usage; with
    `--fail-on-ood` 3, an image is out-of-distribution, whatever became of the others.

    **Examples**

    ```
    setar detect my-detector street.jpg https://example.org/cat.jpg holiday-pictures
    setar detect my-detector inbox --json --top-k 5 > records.jsonl
    setar detect my-detector upload.png --fail-on-ood --tpr 0.99 && echo "one of ours"
    setar detect my-text-detector questions.txt
    ```
    """
    found = OODDetector.from_pretrained(detector, device=torch_device(device))
    if batch_size is not None:
        found.batch_size = batch_size
    if threshold is not None or tpr is not None:
        found.at(threshold=threshold, tpr=tpr)
    data = _images(inputs) if found.kind == "image" else _texts(inputs)
    records = shown(found.stream(data, top_k=top_k), len(data), "detecting")
    if as_json:
        decided = Detections(list(_printed(records)))
        typer.echo(decided.summary(), err=True)
    else:
        decided = Detections(list(records))
        typer.echo(_printable(decided.table()))
    if fail_on_ood and any(record.is_id is False for record in decided):
        raise typer.Exit(OOD_FOUND)
    if any(record.error is not None for record in decided):
        raise typer.Exit(NOT_DECIDED)


def _images(inputs: Iterable[str]) -> list[Any]:
    """Paths and URLs, with the images of each folder in its place."""
    images: list[Any] = []
    for name in inputs:
        if not is_url(name) and Path(name).is_dir():
            images += read_folder(name, labelled=False).paths
        else:
            images.append(name)
    return images


def _texts(inputs: Iterable[str]) -> list[str]:
    """Texts, with those of each file in its place."""
    texts: list[str] = []
    for text in inputs:
        if text.endswith(TEXT_SUFFIXES):
            texts += read_texts(Path(text), None, None, labelled=False).texts
        else:
            texts.append(text)
    return texts


def _printable(text: str) -> str:
    """Text as standard output takes it: a file's name may hold bytes that are no characters, and become escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _printed(records: Iterable[Detection]) -> Iterator[Detection]:
    """The records, printed as lines of JSON as soon as they are there; what is kept is what a summary needs."""
    for record in records:
        line = json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False)
        typer.echo(line if _printable(line) == line else json.dumps(record.to_dict(), allow_nan=False))
        yield replace(record, id="", label=None, top=())

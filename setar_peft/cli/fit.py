"""Find a threshold on in-distribution images, and save the detector: model, classes, score and threshold."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated

import typer

from setar_peft.cli.adapters import BaseName
from setar_peft.cli.models import ModelName, classes_of, load_named
from setar_peft.cli.options import (
    SCORE_HELP,
    BatchSize,
    Classes,
    Device,
    Dtype,
    NegativeLabels,
    Prompt,
    Temperature,
    computing,
)
from setar_peft.cli.progress import watched
from setar_peft.data.sources import source_of
from setar_peft.detection.detector import OODDetector
from setar_peft.writing import whole_folder

_DETECTOR = inspect.signature(OODDetector).parameters
_FIT = inspect.signature(OODDetector.fit).parameters


def fit(
    model: ModelName,
    images: Annotated[
        Path,
        typer.Option(
            "--images",
            "--texts",
            help="Folder of held-out in-distribution images, or for a text model a .txt or .csv file of texts. Labels "
            "are not needed.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="New folder for the detector.")] = Path("setar-detector"),
    classes: Classes = None,
    score: Annotated[str, typer.Option(help=SCORE_HELP)] = _DETECTOR["score"].default,
    tpr: Annotated[float, typer.Option(help="Share of in-distribution images to be kept.")] = _FIT["tpr"].default,
    prompt: Prompt = _DETECTOR["prompt"].default,
    temperature: Temperature = _DETECTOR["temperature"].default,
    negative_labels: NegativeLabels = None,
    base: BaseName = None,
    batch_size: BatchSize = _DETECTOR["batch_size"].default,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Find a threshold on in-distribution images, and save the detector: model, classes, score and threshold.

    The images are held-out ones, on which nothing else was chosen: neither a search nor a training. What is printed
    says how sure the threshold is.

    **Examples**

    ```
    setar fit openai/clip-vit-base-patch16 --images held-out --classes classes.json
    setar fit setar-search --images held-out --score mcm --tpr 0.99 --output strict
    setar fit my-classifier --images held-out --score energy
    setar fit my-text-classifier --texts held-out.txt --score energy
    ```
    """
    with whole_folder(output) as folder, computing(device, dtype) as (where, weights_dtype):
        loaded, processor = load_named(model, base, where, weights_dtype)
        names = classes_of(loaded, images, classes)
        detector = OODDetector(
            loaded,
            processor,
            names,
            score,
            prompt,
            temperature,
            negative_labels=negative_labels,
            batch_size=batch_size,
        )
        held_out = source_of(images, processor, detector.kind, batch_size=batch_size)
        detector.fit(watched(held_out, "scoring"), tpr).save_pretrained(folder)
    typer.echo(f"{detector}\nWrote {output}. Decide with: setar detect {output} <images>")

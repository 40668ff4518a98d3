"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeAlias

import torch
import typer

from setar_peft.backbones.loading import PRECISIONS, precision, torch_device
from setar_peft.detection.scores import SCORES
from setar_peft.processes import own_device

Prompt: TypeAlias = Annotated[str, typer.Option(help='Prompt with "{class}" in it.')]
BatchSize: TypeAlias = Annotated[int, typer.Option(help="Images a batch.")]
Device: TypeAlias = Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="a GPU if there is one")]
Dtype: TypeAlias = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(PRECISIONS)}. float32 is exact and slow on GPUs: bfloat16 is recommended there; tf32 is "
        "float32 whose products a GPU rounds."
    ),
]
Classes: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help='JSON list of class names, or {"subfolder": "class name", ...}.',
        show_default="the classifier's own, or the subfolders' names",
    ),
]
Temperature: TypeAlias = Annotated[
    float | None, typer.Option(help="Divides the logits of a score.", show_default="the paper's, of each score")
]
NegativeLabels: TypeAlias = Annotated[
    Path | None, typer.Option(help="File with a word a line that names none of the classes, for the score neglabel.")
]
SCORE_HELP = f"{', '.join(SCORES)}, or layer_fusion:mcm and the like."


@contextmanager
def computing(device: str | None, dtype: str) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Where a model is to compute, and the dtype of its weights, with torch's settings for the precision.

    Args:
        device: As the option `--device` has it.
        dtype: As the option `--dtype` has it.

    Raises:
        ValueError: If there is no such device or precision here.
    """
    where = torch_device(own_device(device))
    if dtype == "tf32" and where.type != "cuda":
        raise ValueError(f"--dtype tf32 is how CUDA GPUs multiply, and the device is {where}; give float32.")
    with precision(dtype) as weights_dtype:
        yield where, weights_dtype

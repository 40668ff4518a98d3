"""Models by name, with what a command needs beside them: a stock model, one with an adapter, or a saved detector's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import typer
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft.utils import CONFIG_NAME

from setar_peft.backbones import backbone_of
from setar_peft.backbones.loading import load_model, load_processor
from setar_peft.cli.adapters import adapter_config, load_adapter
from setar_peft.data.folders import class_names_of
from setar_peft.data.labels import ClassNames
from setar_peft.hub.detector_files import DETECTOR_NAME

ModelName: TypeAlias = Annotated[str, typer.Argument(help="Folder or Hub name of the model or adapter.")]


def is_detector(name: str) -> bool:
    """Whether a folder or Hub name is a saved detector's."""
    return _holds(name, DETECTOR_NAME)


def is_adapter(name: str) -> bool:
    """Whether a folder or Hub name is an adapter's."""
    return _holds(name, CONFIG_NAME)


def load_named(name: str, base: str | None, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model, with its adapter where the name is an adapter's, and its processor.

    Args:
        name: Folder or Hub name of a model or adapter.
        base: The adapter's base; by default the one that its config names.
        device: Where the model is to be.
        dtype: Of its weights.

    Raises:
        ValueError: If there is no such model or adapter, or they do not belong together.
    """
    if is_adapter(name):
        model: Any = load_adapter(name, base, dtype=dtype)
        stock, processor_name = model.get_base_model(), base or adapter_config(name).base_model_name_or_path
    else:
        if base is not None:
            raise ValueError(f"{name} is no adapter, so that it has no base; leave --base out.")
        model = stock = load_model(name, dtype=dtype)
        processor_name = name
    return model.to(device).eval(), load_processor(str(processor_name), stock)


def classes_of(model: Any, data: Path, classes: Path | None, *, said: bool = True) -> ClassNames:
    """The in-distribution classes: by a file, the model, or the subfolders of the data.

    Args:
        model: A stock model or a PEFT model.
        data: Folder of in-distribution images, or a file of texts.
        classes: As the option `--classes` has it.
        said: Whether to say on standard error which they are.

    Raises:
        ValueError: If there are none, or they are not the model's.
    """
    backbone = backbone_of(model)
    own = None if backbone.needs_prompts else backbone.model.config.id2label
    if classes is None and own is None and not any(path.is_dir() for path in _entries(data)):
        raise ValueError(
            f"{data} has no subfolders to be classes, and the model classifies by prompts; give --classes, a JSON list "
            'of class names such as ["cat", "dog"].'
        )
    names = class_names_of(data, classes, own)
    whence = f"from {classes}" if classes else "the model's own" if own is not None else f"the subfolders of {data}"
    shown = ", ".join(names.names[:4]) + (", ..." if len(names.names) > 4 else "")
    if said:
        typer.echo(f"{len(names.names)} classes, {whence}: {shown}", err=True)
    return names


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _holds(name: str, file: str) -> bool:
    if Path(name).is_dir():
        return (Path(name) / file).is_file()
    try:
        hf_hub_download(name, file)
    except (OSError, EntryNotFoundError, HFValidationError):
        return False
    return True

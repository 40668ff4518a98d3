"""Merge an adapter into its base: a stock checkpoint that transformers loads alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from setar_peft.backbones.loading import torch_device
from setar_peft.cli.adapters import AdapterName, BaseName, load_adapter
from setar_peft.writing import whole_folder


def merge(
    adapter: AdapterName,
    output: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    base: BaseName = None,
    device: Annotated[str | None, typer.Option(help="Where to merge: cpu, cuda, ...", show_default="cpu")] = None,
) -> None:
    """Merge an adapter into its base: a stock checkpoint that transformers loads alone.

    **Examples**

    ```
    setar merge my-adapter merged-model
    setar merge my-adapter merged-model --base copies/clip-vit-base-patch16
    ```
    """
    with whole_folder(output) as folder:
        model = load_adapter(adapter, base)
        if device is not None:
            model.to(torch_device(device))
        model.merge_and_unload(safe_merge=True).save_pretrained(folder)
    typer.echo(f"Wrote {output}")

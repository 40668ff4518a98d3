"""Write an adapter as the LoRA that computes the same, for PEFT without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from setar_peft.cli.adapters import AdapterName, BaseName, load_adapter
from setar_peft.tuner import export


def export_lora(
    adapter: AdapterName,
    output: Annotated[Path, typer.Argument(help="New folder for the LoRA.")],
    base: BaseName = None,
) -> None:
    """Write an adapter as the LoRA that computes the same, for PEFT without this package.

    **Examples**

    ```
    setar export-lora my-adapter my-lora
    ```
    """
    typer.echo(f"Wrote {export.export_lora(load_adapter(adapter, base), output)}")

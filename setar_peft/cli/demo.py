"""Search, adapt, save, reload, merge, and compare detection before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from setar_peft.cli.options import BatchSize, Device, Prompt
from setar_peft.cli.search import OodWeight, TopK
from setar_peft.demo.command import run_demo
from setar_peft.demo.experiment import Settings


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for adapter, trace, results and figure; those of an earlier run are replaced.")
    ] = Path("setar-demo"),
    cache: Annotated[
        Path | None, typer.Option(help="Folder for the demo's model.", show_default="setar_peft in the user's cache")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A CLIP of your own instead: a folder or a Hub name. Needs --images.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder with one subfolder of images a class. Needs --model.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help='JSON list of class names, or {"subfolder": "class name", ...}.', show_default="the subfolders' names"
        ),
    ] = None,
    ood: Annotated[list[Path] | None, typer.Option(help="Folder of OOD images; may be given several times.")] = None,
    search_images_per_class: Annotated[
        int | None,
        typer.Option(help="Images a class for the search.", show_default="about 100 in all, at most half of a class"),
    ] = None,
    ood_weight: OodWeight = Settings.ood_weight,
    top_k: TopK = Settings.top_k,
    prompt: Prompt = Settings.prompt,
    batch_size: BatchSize = Settings.batch_size,
    device: Device = Settings.device,
) -> None:
    """Search, adapt, save, reload, merge, and compare detection before and after.

    Without --model and --images it runs offline on scikit-learn's handwritten digits, with a small CLIP that it trains
    once. What comes out is printed, better or worse.

    **Examples**

    ```
    setar demo
    setar demo --model openai/clip-vit-base-patch16 --images pictures --ood textures --output compared
    ```
    """
    run_demo(
        Settings(ood_weight, top_k, prompt, batch_size, device),
        output=output,
        cache=cache,
        model=model,
        images=images,
        classes=classes,
        ood=ood or [],
        search_images_per_class=search_images_per_class,
    )

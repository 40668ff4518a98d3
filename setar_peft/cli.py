"""The command `setar`: each subcommand is one function here that calls the module it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core


class _SentencesForErrors(typer.core.TyperGroup):
    """Ends with one sentence on standard error and exit code 1 where the package or the system refuses something."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_SentencesForErrors,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="SeTAR: out-of-distribution detection by selective low-rank approximation, as a PEFT tuner.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from setar_peft import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """SeTAR: out-of-distribution detection by selective low-rank approximation, as a PEFT tuner."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for adapter, trace, results and figure.")] = Path("setar-demo"),
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
        typer.Option(help="JSON list of class names, in the subfolders' order.", show_default="the subfolders' names"),
    ] = None,
    ood: Annotated[list[Path] | None, typer.Option(help="Folder of OOD images; may be given several times.")] = None,
    search_images_per_class: Annotated[
        int | None,
        typer.Option(help="Images a class for the search.", show_default="about 100 in all, at most half of a class"),
    ] = None,
    ood_weight: Annotated[float, typer.Option(help="Weight of the OOD loss (lambda).")] = 0.1,
    top_k: Annotated[
        int | None, typer.Option(help="K of the OOD loss.", show_default="30 % of the classes, rounded, at least 1")
    ] = None,
    prompt: Annotated[str, typer.Option(help='Prompt with "{class}" in it.')] = "a photo of a {class}",
    batch_size: Annotated[int, typer.Option(help="Images a batch.")] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="a GPU if there is one")] = None,
) -> None:
    """Search, adapt, save, reload, merge, and compare detection before and after.

    Without --model and --images it runs offline on scikit-learn's handwritten digits, with a small CLIP that it trains
    once. What comes out is printed, better or worse.
    """
    from setar_peft.demo.command import run_demo
    from setar_peft.demo.experiment import Settings

    settings = Settings(ood_weight, top_k, prompt, batch_size, device)
    run_demo(
        settings,
        output=output,
        cache=cache,
        model=model,
        images=images,
        classes=classes,
        ood=ood or [],
        search_images_per_class=search_images_per_class,
    )


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of the model.")],
    images: Annotated[Path, typer.Option(help="Folder with one subfolder of images a class.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter, trace.json and trace.csv.")] = Path(
        "setar-search"
    ),
    classes: Annotated[
        Path | None,
        typer.Option(help="JSON list of class names, in the subfolders' order.", show_default="the subfolders' names"),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Weight types, separated by commas: W_q, W_k, W_v, W_o, W_up, W_down, W_p.")
    ] = "W_up",
    order: Annotated[
        str,
        typer.Option(
            help="vision_text, text_vision, vision, text, interleaved or exhaustive; or modules' full names, "
            "separated by commas."
        ),
    ] = "vision_text",
    candidates: Annotated[
        str | None, typer.Option(help="Ratios to try, separated by commas.", show_default="0.05,0.1,...,0.4")
    ] = None,
    passes: Annotated[int, typer.Option(help="Times to go through all layers at most.")] = 1,
    prune: Annotated[str, typer.Option(help="Which components are removed: minor, principal or random.")] = "minor",
    criterion: Annotated[
        str,
        typer.Option(help="What a candidate must lower: total, id or ood; or improve on OOD patches: auroc or fpr95."),
    ] = "total",
    ood_weight: Annotated[float, typer.Option(help="Weight of the OOD loss (lambda).")] = 0.1,
    top_k: Annotated[
        int | None, typer.Option(help="K of the OOD loss.", show_default="30 % of the classes, rounded, at least 1")
    ] = None,
    prompt: Annotated[str, typer.Option(help='Prompt with "{class}" in it.')] = "a photo of a {class}",
    batch_size: Annotated[int, typer.Option(help="Images a batch.")] = 64,
    recording_memory: Annotated[
        float | None, typer.Option(help="GiB that recordings may take.", show_default="half of what is free")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="a GPU if there is one")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the trace in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the search would cost.")] = False,
) -> None:
    """Find the rank ratios of a model on a folder of images, and save the adapter and the trace."""
    from setar_peft.search.command import SearchRequest, numbers, order_of, run_search

    request = SearchRequest(
        model,
        images,
        output,
        classes=classes,
        weights=tuple(weights.split(",")),
        order=order_of(order),
        candidates=None if candidates is None else numbers(candidates),
        passes=passes,
        prune=prune,
        criterion=criterion,
        ood_weight=ood_weight,
        top_k=top_k,
        prompt=prompt,
        batch_size=batch_size,
        recording_memory=recording_memory,
        device=device,
        dtype=dtype,
        resume=resume,
        dry_run=dry_run,
    )
    run_search(request, typer.echo)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub name of the adapter.")],
    output: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    base: Annotated[str | None, typer.Option(help="Base model.", show_default="the one the adapter names")] = None,
    device: Annotated[str | None, typer.Option(help="Where to merge: cpu, cuda, ...")] = None,
) -> None:
    """Merge an adapter into its base: a stock checkpoint that transformers loads alone."""
    from setar_peft.tuner.commands import merge_adapter

    typer.echo(f"Wrote {merge_adapter(adapter, output, base=base, device=device)}")


@app.command("export-lora")
def export_lora(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub name of the adapter.")],
    output: Annotated[Path, typer.Argument(help="New folder for the LoRA.")],
    base: Annotated[str | None, typer.Option(help="Base model.", show_default="the one the adapter names")] = None,
) -> None:
    """Write an adapter as the LoRA that computes the same, for PEFT without this package."""
    from setar_peft.tuner.commands import export_adapter

    typer.echo(f"Wrote {export_adapter(adapter, output, base=base)}")


@app.command()
def info(adapter: Annotated[str, typer.Argument(help="Folder or Hub name of the adapter.")]) -> None:
    """Say what an adapter is: its base, its ratios, its size."""
    from setar_peft.tuner.commands import describe_adapter

    typer.echo(describe_adapter(adapter))

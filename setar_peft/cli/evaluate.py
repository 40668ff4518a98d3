"""Measure how well models tell in-distribution images from others: figures, intervals, plots, a report."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from peft import PeftModel

from setar_peft.cli.adapters import BaseName
from setar_peft.cli.models import classes_of, is_adapter, is_detector, load_named
from setar_peft.cli.options import (
    SCORE_HELP,
    BatchSize,
    Classes,
    Device,
    Dtype,
    NegativeLabels,
    Temperature,
    computing,
)
from setar_peft.data.folders import class_names_of
from setar_peft.detection import evaluation
from setar_peft.detection.detector import OODDetector
from setar_peft.detection.metrics import Positive, ThresholdRule
from setar_peft.detection.result import Evaluation
from setar_peft.objectives.class_prompts import PROMPT
from setar_peft.plots import check_matplotlib
from setar_peft.processes import Processes

_EVALUATE = inspect.signature(evaluation.evaluate).parameters
_FORMATS = {"--json": Evaluation.to_json, "--markdown": Evaluation.to_markdown, "--csv": Evaluation.to_csv}


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of the model, adapter or detector.")],
    images: Annotated[
        Path,
        typer.Option(
            "--images", "--texts", help="Folder of in-distribution test images, or a file of texts; see --labelled."
        ),
    ],
    ood: Annotated[
        list[str],
        typer.Option(help="Folder of out-of-distribution images, or name=folder; may be given several times."),
    ],
    labelled: Annotated[
        bool | None,
        typer.Option(
            "--labelled/--unlabelled",
            help="Whether the in-distribution images lie in a subfolder a class, for the accuracy.",
            show_default="whether there are subfolders",
        ),
    ] = None,
    classes: Classes = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            help=f"May be given several times: {SCORE_HELP}",
            show_default=f"{', '.join(evaluation.DEFAULT_SCORES)}; a detector's own",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter of the model, or name=adapter, to be compared with it; may be given several times."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help='Prompt with "{class}" in it.', show_default=f"{PROMPT}; a detector's own")
    ] = None,
    temperature: Temperature = None,
    negative_labels: NegativeLabels = None,
    fit_images: Annotated[
        Path | None, typer.Option(help="In-distribution images for scores that have to be fitted; none of the test.")
    ] = None,
    positive: Annotated[
        str, typer.Option(help=f"Positive class of the false-positive rate: {', '.join(get_args(Positive))}.")
    ] = _EVALUATE["positive"].default,
    threshold: Annotated[
        str, typer.Option(help=f"How its threshold is chosen: {', '.join(get_args(ThresholdRule))}.")
    ] = _EVALUATE["threshold"].default,
    tpr: Annotated[float, typer.Option(help="Its true-positive rate.")] = _EVALUATE["tpr"].default,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples; 0 for no intervals.")] = _EVALUATE[
        "resamples"
    ].default,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = _EVALUATE["seed"].default,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Leave out images that cannot be read, and count them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all settings.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    parquet: Annotated[Path | None, typer.Option(help="File for the scores of each image.")] = None,
    report: Annotated[Path | None, typer.Option(help="File for an HTML page with figures and mistakes.")] = None,
    plots_folder: Annotated[
        Path | None, typer.Option("--plots", help="Folder for ROC curves and histograms as PNG files.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for features and scores: a second run computes nothing.")
    ] = None,
    base: BaseName = None,
    batch_size: BatchSize = _EVALUATE["batch_size"].default,
    device: Device = None,
    dtype: Annotated[str | None, Dtype.__metadata__[0]] = None,
) -> None:
    """Measure how well models tell in-distribution images from others: figures, intervals, plots, a report.

    Figures go to standard output, all else to standard error. Under `accelerate launch` the processes share the images,
    and the first speaks and writes.

    **Examples**

    ```
    setar evaluate openai/clip-vit-base-patch16 --images test --ood textures --ood places=other/places
    setar evaluate openai/clip-vit-base-patch16 --adapter setar-search --images test --ood textures --cache cache
    setar evaluate my-detector --images test --ood textures --report report.html
    setar evaluate my-classifier --images test --ood textures --score energy --score msp --json > figures.json
    setar evaluate my-text-classifier --texts test.csv --ood other.txt --score energy
    ```
    """
    chosen = [name for name, given in zip(_FORMATS, (as_json, as_markdown, as_csv), strict=True) if given]
    if len(chosen) > 1:
        raise ValueError(f"Give one of {' and '.join(chosen)}.")
    sets = _named(ood, "OOD set")
    _check_outputs({"--parquet": parquet, "--report": report}, drawn=report is not None or plots_folder is not None)
    settings: dict[str, Any] = {
        "temperature": temperature,
        "batch_size": batch_size,
        "positive": positive,
        "threshold": threshold,
        "tpr": tpr,
        "resamples": resamples,
        "seed": seed,
        "cache": cache,
        "fit_data": fit_images,
        "errors": "leave_out" if leave_out else "raise",
    }
    labels = _has_folders(images) if labelled is None else labelled
    with ExitStack() as stack:
        if is_detector(model):
            alone = {"--adapter": adapter, "--prompt": prompt, "--negative-labels": negative_labels, "--base": base}
            _refuse_beside_detector(model, {**alone, "--dtype": dtype})
            where, _ = stack.enter_context(computing(device, "float32"))
            measured: Any = OODDetector.from_pretrained(model, device=where)
            settings["class_names"] = None if classes is None else class_names_of(images, classes)
        else:
            where, weights_dtype = stack.enter_context(computing(device, dtype or "float32"))
            measured, settings["processor"] = load_named(model, base, where, weights_dtype)
            settings["class_names"] = classes_of(measured, images, classes, said=Processes(where).is_first)
            settings["negative_labels"] = negative_labels
            settings["prompt"] = PROMPT if prompt is None else prompt
            if adapter:
                measured, settings["adapters"] = _with_adapters(model, measured, _named(adapter, "adapter"))
        is_first = Processes(where).is_first
        result = evaluation.evaluate(
            measured, images, sets, score or None, labelled=labels, progress=is_first, **settings
        )
    if not is_first:
        return
    if parquet is not None:
        result.to_parquet(parquet)
    if report is not None:
        result.report(report)
    if plots_folder is not None:
        _plot(result, plots_folder)
    typer.echo(_FORMATS[chosen[0]](result).rstrip("\n") if chosen else result.table())


def _check_outputs(files: dict[str, Path | None], *, drawn: bool) -> None:
    """See at once whether the results can be written."""
    for option, file in files.items():
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{option} is {file}, and there is no folder {file.parent}; make it first.")
    if drawn:
        check_matplotlib()


def _has_folders(path: Path) -> bool:
    return path.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir())


def _named(given: Sequence[str], what: str) -> dict[str, Path]:
    """Folders by name: of name=folder, or by the folder's own."""
    named: dict[str, Path] = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not equals or Path(one).exists():
            name, folder = Path(one).resolve().name, one
        if not name or not folder:
            raise ValueError(f"The {what} {one!r} has no name or no folder; write name=folder.")
        if name in named:
            raise ValueError(f"There are two {what}s {name!r}; give one another name, as in other={folder}.")
        named[name] = Path(folder)
    return named


def _refuse_beside_detector(model: str, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value:
            raise ValueError(f"{model} is a detector, which has its own; leave {option} out, or name its model.")


def _with_adapters(name: str, model: Any, adapters: dict[str, Path]) -> tuple[PeftModel, dict[str, str | None]]:
    """A model with adapters, and the variants of it that are compared: without any, and with each."""
    if is_adapter(name):
        raise ValueError(f"{name} is an adapter; to compare it, give its base, and both as --adapter.")
    if "base" in adapters:
        raise ValueError("An adapter is called 'base', as the model itself is; give it another name, as in a=folder.")
    peft_model = None
    for adapter, folder in adapters.items():
        if peft_model is None:
            peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=adapter, strict_base=True)
        else:
            peft_model.load_adapter(str(folder), adapter, strict_base=True)
    assert peft_model is not None
    return peft_model.eval(), {"base": None, **{adapter: adapter for adapter in adapters}}


def _plot(result: Evaluation, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for score in result.scores:
        safe = score.replace(":", "_").replace("/", "_")
        for name, figure in result.curves(score)._asdict().items():
            figure.savefig(folder / f"{safe}-{name}.png", dpi=150)

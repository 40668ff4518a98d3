"""Find the rank ratios of a model on a folder of images, and save the adapter and the trace."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from peft import get_peft_model

from setar_peft import plots
from setar_peft.backbones import backbone_of
from setar_peft.backbones.loading import load_model, load_processor, torch_device
from setar_peft.data.folders import class_names_of
from setar_peft.objectives import LoCoOpObjective, PatchMetricObjective
from setar_peft.objectives.patch_metric import PatchMetric
from setar_peft.search.estimate import estimate_cost
from setar_peft.search.processes import Processes, own_device
from setar_peft.search.run import search_rank_ratios
from setar_peft.tuner.config import DEFAULT_CANDIDATES, SeTARConfig
from setar_peft.tuner.config_checks import CRITERIA, ORDERS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_METRICS = get_args(PatchMetric)
_CANDIDATES = ",".join(f"{ratio:g}" for ratio in DEFAULT_CANDIDATES)
_OBJECTIVE = inspect.signature(LoCoOpObjective).parameters


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
        str, typer.Option(help=f"{', '.join(ORDERS)}; or modules' full names, separated by commas.")
    ] = str(SeTARConfig.order),
    candidates: Annotated[str, typer.Option(help="Ratios to try, separated by commas.")] = _CANDIDATES,
    passes: Annotated[int, typer.Option(help="Times to go through all layers at most.")] = SeTARConfig.passes,
    prune: Annotated[
        str, typer.Option(help="Which components are removed: minor, principal or random.")
    ] = SeTARConfig.prune,
    criterion: Annotated[
        str,
        typer.Option(
            help=f"What a candidate must lower: {', '.join(CRITERIA)}; or improve on OOD patches: "
            f"{', '.join(_METRICS)}."
        ),
    ] = SeTARConfig.criterion,
    ood_weight: Annotated[float, typer.Option(help="Weight of the OOD loss (lambda).")] = _OBJECTIVE[
        "ood_weight"
    ].default,
    top_k: Annotated[
        int | None, typer.Option(help="K of the OOD loss.", show_default="30 % of the classes, rounded, at least 1")
    ] = None,
    prompt: Annotated[str, typer.Option(help='Prompt with "{class}" in it.')] = _OBJECTIVE["prompt"].default,
    batch_size: Annotated[int, typer.Option(help="Images a batch.")] = _OBJECTIVE["batch_size"].default,
    recording_memory: Annotated[
        float | None, typer.Option(help="GiB that recordings may take.", show_default="half of what is free")
    ] = SeTARConfig.recording_memory,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="a GPU if there is one")] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(_DTYPES)}.")] = "float32",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the trace in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the search would cost.")] = False,
) -> None:
    """Find the rank ratios of a model on a folder of images, and save the adapter and the trace.

    Under `accelerate launch` or torchrun the first process speaks and writes.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; give one of {', '.join(_DTYPES)}.")
    if criterion not in (*CRITERIA, *_METRICS):
        raise ValueError(f"--criterion is {criterion!r}; give one of {', '.join((*CRITERIA, *_METRICS))}.")
    names = class_names_of(images, classes)
    where = (own_device() if device is None else None) or torch_device(device)
    base = load_model(model, dtype=_DTYPES[dtype]).to(where)
    is_metric = criterion in _METRICS
    settings: dict[str, Any] = {"metric": criterion} if is_metric else {}
    objective = (PatchMetricObjective if is_metric else LoCoOpObjective)(
        load_processor(model, base),
        names,
        images,
        ood_weight=ood_weight,
        top_k=max(1, round(0.3 * len(names))) if top_k is None else top_k,
        prompt=prompt,
        batch_size=batch_size,
        **settings,
    )
    backbone = backbone_of(base)
    config = SeTARConfig(
        target_modules=[name for kind in _parts(weights) for name in backbone.modules_of_type(kind)],
        candidate_ratios=_numbers(candidates),
        order=_parts(order) if "." in order or "," in order else order,
        passes=passes,
        prune=prune,
        criterion="total" if is_metric else criterion,
        recording_memory=recording_memory,
    )
    is_first = Processes(where).is_first
    if is_first:
        typer.echo(estimate_cost(base, objective, config).table())
    if dry_run:
        return
    result = search_rank_ratios(base, objective, config, trace_path=output / "trace.json", resume=resume)
    if not is_first:
        return
    typer.echo(result.trace.table())
    if find_spec("matplotlib"):
        plots.search_figure(result.trace).savefig(output / "trace.png", dpi=150)
    (output / "trace.csv").write_text(result.trace.to_csv(), encoding="utf-8")
    get_peft_model(base, result.config).save_pretrained(str(output))
    first, last = result.trace.initial.total, result.trace.rows[-1].total_loss
    typer.echo(f"Loss {first:.6f} -> {last:.6f}. The adapter and the trace (JSON, CSV, PNG) are in {output}.")


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in _parts(text)]
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers; separate them by commas, as in 0.1,0.2.") from None

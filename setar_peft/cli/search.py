"""Find the rank ratios of a model on a folder of images, and save the adapter and the trace."""

from __future__ import annotations

import inspect
import signal
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError

from setar_peft import plots
from setar_peft.backbones import Backbone, backbone_of
from setar_peft.backbones.loading import load_model, load_processor
from setar_peft.cli.options import BatchSize, Classes, Device, Dtype, Prompt, computing
from setar_peft.data.folders import class_names_of
from setar_peft.data.labels import matching_sentence
from setar_peft.decomposition import PRUNE_STRATEGIES
from setar_peft.objectives import LoCoOpObjective, PatchMetricObjective
from setar_peft.objectives.locoop import TOP_K_SHARE
from setar_peft.objectives.patch_metric import PatchMetric
from setar_peft.processes import Processes
from setar_peft.search.estimate import estimate_cost
from setar_peft.search.run import search_rank_ratios
from setar_peft.search.trace import SearchTrace, trace_to_continue
from setar_peft.tuner.config import DEFAULT_CANDIDATES, SeTARConfig
from setar_peft.tuner.config_checks import CRITERIA, ORDERS

_METRICS = get_args(PatchMetric)
_CANDIDATES = ",".join(f"{ratio:g}" for ratio in DEFAULT_CANDIDATES)
# Of each criterion the base's loss and the column of the trace.
_COLUMNS = {"total": ("total", "total_loss"), "id": ("id_loss", "id_loss"), "ood": ("ood_loss", "ood_loss")}
_OBJECTIVE = inspect.signature(LoCoOpObjective).parameters

# The options that the demo has, too.
OodWeight = Annotated[float, typer.Option(help="Weight of the OOD loss (lambda).")]
TopK = Annotated[
    int | None,
    typer.Option(
        help="K of the OOD loss.", show_default=f"{100 * TOP_K_SHARE:g} % of the classes, rounded, at least 1"
    ),
]


def search(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of the model.")],
    images: Annotated[Path, typer.Option(help="Folder with one subfolder of images a class.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter, trace.json and trace.csv.")] = Path(
        "setar-search"
    ),
    classes: Classes = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Weight types, separated by commas: W_q, W_k, W_v, W_o, W_up, W_down, W_p.", show_default="W_up"
        ),
    ] = None,
    order: Annotated[
        str, typer.Option(help=f"{', '.join(ORDERS)}; or modules' full names, separated by commas.")
    ] = str(SeTARConfig.order),
    candidates: Annotated[str, typer.Option(help="Ratios to try, separated by commas.")] = _CANDIDATES,
    passes: Annotated[int, typer.Option(help="Times to go through all layers at most.")] = SeTARConfig.passes,
    prune: Annotated[
        str, typer.Option(help=f"Which components are removed: {', '.join(PRUNE_STRATEGIES)}.")
    ] = SeTARConfig.prune,
    criterion: Annotated[
        str,
        typer.Option(
            help=f"What a candidate must lower: {', '.join(CRITERIA)}; or improve on OOD patches: "
            f"{', '.join(_METRICS)}."
        ),
    ] = SeTARConfig.criterion,
    ood_weight: OodWeight = _OBJECTIVE["ood_weight"].default,
    top_k: TopK = _OBJECTIVE["top_k"].default,
    prompt: Prompt = _OBJECTIVE["prompt"].default,
    batch_size: BatchSize = _OBJECTIVE["batch_size"].default,
    recording_memory: Annotated[
        float | None, typer.Option(help="GiB that recordings may take.", show_default="half of what is free")
    ] = SeTARConfig.recording_memory,
    device: Device = None,
    dtype: Dtype = "float32",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the trace in the output folder.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew and replace the trace and adapter in the output folder.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the search would cost.")] = False,
) -> None:
    """Find the rank ratios of a model on a folder of images, and save the adapter and the trace.

    Under `accelerate launch` or torchrun the first process speaks and writes.

    **Examples**

    ```
    setar search openai/clip-vit-base-patch16 --images train --dry-run
    setar search openai/clip-vit-base-patch16 --images train --classes classes.json --output adapter
    setar search openai/clip-vit-base-patch16 --images train --classes classes.json --output adapter --resume
    setar search my-classifier --images train --weights W_up,W_q --device cuda --dtype bfloat16
    ```
    """
    if criterion not in (*CRITERIA, *_METRICS):
        raise ValueError(f"--criterion is {criterion!r}; give one of {', '.join((*CRITERIA, *_METRICS))}.")
    trace_path = output / "trace.json"
    if not dry_run:
        _check_output(trace_path, resume=resume, overwrite=overwrite)
    replaced = trace_path.stat().st_mtime_ns if overwrite and trace_path.exists() else None
    with computing(device, dtype) as (where, weights_dtype):
        base = load_model(model, dtype=weights_dtype).to(where)
        backbone = backbone_of(base)
        names = class_names_of(images, classes, None if backbone.needs_prompts else base.config.id2label)
        is_metric = criterion in _METRICS
        settings: dict[str, Any] = {"metric": criterion} if is_metric else {}
        objective = (PatchMetricObjective if is_metric else LoCoOpObjective)(
            load_processor(model, base),
            names,
            images,
            ood_weight=ood_weight,
            top_k=top_k,
            prompt=prompt,
            batch_size=batch_size,
            **settings,
        )
        config = SeTARConfig(
            target_modules=None if weights is None else _modules(backbone, _parts(weights)),
            candidate_ratios=_numbers(candidates),
            order=_parts(order) if "." in order or "," in order else order,
            passes=passes,
            prune=prune,
            criterion="total" if is_metric else criterion,
            recording_memory=recording_memory,
        )
        is_first = Processes(where).is_first
        if is_first:
            matching = matching_sentence(objective.images.matched)
            if matching is not None:
                typer.echo(matching)
            typer.echo(_estimate(base, objective, config))
        if dry_run:
            return
        try:
            result = search_rank_ratios(
                base, objective, config, trace_path=trace_path, resume=resume, overwrite=overwrite
            )
        except KeyboardInterrupt:
            if is_first:
                typer.echo(_how_to_go_on(trace_path, replaced), err=True)
            raise typer.Exit(128 + signal.SIGINT) from None
    if not is_first:
        return
    _save(get_peft_model(base, result.config), output)
    (output / "trace.csv").write_text(result.trace.to_csv(), encoding="utf-8")
    has_figure = find_spec("matplotlib") is not None
    if has_figure:
        plots.search_figure(result.trace).savefig(output / "trace.png", dpi=150)
    typer.echo(result.trace.table())
    before, after = _COLUMNS[config.criterion]
    first, last = getattr(result.trace.initial, before), getattr(result.trace.rows[-1], after)
    typer.echo(
        f"{criterion} {first:.6f} -> {last:.6f}. The adapter, trace.json and trace.csv are in {output}, "
        + ("and trace.png." if has_figure else "no figure, for which matplotlib is missing (the extra demo).")
    )


def _estimate(model: Any, objective: LoCoOpObjective, config: SeTARConfig) -> str:
    try:
        return estimate_cost(model, objective, config).table()
    except torch.OutOfMemoryError:
        return (
            "What the search will cost cannot be said: a batch of this size does not fit in memory. The search halves "
            "its batches until they do; a smaller --batch-size says what it costs."
        )


def _how_to_go_on(trace_path: Path, replaced: int | None) -> str:
    """What is said of a search that was stopped; `replaced` is the age of the trace that it was to replace."""
    if not trace_path.exists() or trace_path.stat().st_mtime_ns == replaced:
        return f"Stopped before the first layer; nothing was written to {trace_path.parent}."
    adapter = (
        " Until then the adapter there is an earlier search's." if (trace_path.parent / CONFIG_NAME).exists() else ""
    )
    return (
        f"Stopped after {len(SearchTrace.load(trace_path).rows)} layers, which are in {trace_path}. To go on with the "
        f"next, give the same command with --resume (and without --overwrite).{adapter}"
    )


def _check_output(trace_path: Path, *, resume: bool, overwrite: bool) -> None:
    """See at once whether the search may write to its folder."""
    trace_to_continue(trace_path, resume=resume, overwrite=overwrite)
    folder = trace_path.parent
    if (folder / CONFIG_NAME).exists() and not trace_path.exists() and not overwrite:
        raise ValueError(
            f"{folder} holds an adapter, and no trace to continue. Give another --output, or --overwrite to replace it."
        )


def _save(peft_model: PeftModel, output: Path) -> None:
    """Save the adapter, whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(prefix=".adapter-", dir=output) as folder:
            peft_model.save_pretrained(folder)
            # The config comes last: without it there is no adapter, and it knows the digest of the weights.
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == CONFIG_NAME):
                file.replace(output / file.name)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The adapter could not be written to {output} ({error}). Nothing that was found is lost, it is in the "
            "trace: make room, and give the same command with --resume (and without --overwrite)."
        ) from error


def _modules(backbone: Backbone, weight_types: Sequence[str]) -> list[str]:
    twice = sorted({kind for kind in weight_types if weight_types.count(kind) > 1})
    if twice or not all(weight_types):
        what = f"{', '.join(twice)} twice" if twice else "nothing between two commas"
        raise ValueError(f"--weights names {what}; name each weight type once, as in W_up,W_q.")
    return [name for kind in weight_types for name in backbone.modules_of_type(kind)]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in _parts(text)]
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers; separate them by commas, as in 0.1,0.2.") from None

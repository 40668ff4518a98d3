"""Find the rank ratios of a model on a folder of images, and save the adapter and the trace."""

from __future__ import annotations

import inspect
import math
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
from setar_peft.search.plan import USUAL_ROUNDS
from setar_peft.search.run import search_rank_ratios
from setar_peft.search.trace import SearchTrace, trace_to_continue
from setar_peft.tuner.config import DEFAULT_CANDIDATES, SeTARConfig
from setar_peft.tuner.config_checks import CRITERIA, ORDERS, SCREENED_ORDERS, SEARCHES

_METRICS = get_args(PatchMetric)
_CANDIDATES = ",".join(f"{ratio:g}" for ratio in DEFAULT_CANDIDATES)
# Of a longer table only what changed is shown: by default CLIP-L has 36 layers.
_LONGEST_TABLE = 40
_ALL = "all"
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
            help="Weight types, separated by commas: W_q, W_k, W_v, W_o, W_up, W_down, W_p; "
            f"{_ALL} stands for those of the blocks, so for all but W_p.",
            show_default="W_up",
        ),
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            help=f"{' or '.join(SEARCHES)}: evaluate every candidate of a layer, or those that a gradient predicts "
            "best."
        ),
    ] = SeTARConfig.search,
    verify: Annotated[
        int | None,
        typer.Option(
            help="Candidates of a layer that --search screened evaluates.", show_default="2, with best_first 1"
        ),
    ] = SeTARConfig.verify,
    evaluations: Annotated[
        int | None,
        typer.Option(
            help=f"Candidates to evaluate in all at most, in the orders {' and '.join(SCREENED_ORDERS)}.",
            show_default="as many as they take",
        ),
    ] = SeTARConfig.evaluations,
    order: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(ORDERS)}; or modules' full names, separated by commas. "
            f"{' and '.join(SCREENED_ORDERS)} need --search screened."
        ),
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
    setar search openai/clip-vit-base-patch16 --images train --search screened --order best_first --weights all
    setar search my-classifier --images train --weights W_up,W_q --device cuda --dtype bfloat16
    ```
    """
    if criterion not in (*CRITERIA, *_METRICS):
        raise ValueError(f"--criterion is {criterion!r}; give one of {', '.join((*CRITERIA, *_METRICS))}.")
    is_metric = criterion in _METRICS
    # Before the model: what is wrong here is said at once.
    config = SeTARConfig(
        candidate_ratios=_numbers(candidates),
        search=search,
        verify=verify,
        evaluations=evaluations,
        order=_parts(order) if "." in order or "," in order else order,
        passes=passes,
        prune=prune,
        criterion="total" if is_metric else criterion,
        recording_memory=recording_memory,
    )
    trace_path = output / "trace.json"
    if not dry_run:
        _check_output(trace_path, resume=resume, overwrite=overwrite)
    replaced = trace_path.stat().st_mtime_ns if overwrite and trace_path.exists() else None
    with computing(device, dtype) as (where, weights_dtype):
        base = load_model(model, dtype=weights_dtype).to(where)
        backbone = backbone_of(base)
        names = class_names_of(images, classes, None if backbone.needs_prompts else base.config.id2label)
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
        if weights is not None:
            config.target_modules = set(_modules(backbone, _parts(weights)))
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
    trace = result.trace
    typer.echo(_table(trace))
    figure = "and trace.png." if has_figure else "no figure, for which matplotlib is missing (the extra demo)."
    typer.echo(
        f"{criterion} {trace.initial.part(trace.criterion):.6f} -> {trace.minimised(trace.rows[-1]):.6f}"
        f"{_effort(trace)}. The adapter, trace.json and trace.csv are in {output}, {figure}"
    )


def _table(trace: SearchTrace) -> str:
    """The trace's table; where it is long, or tells of the same rounds again and again, only what changed."""
    lines, changed = trace.table().splitlines(), trace.changed()
    if len(trace.rows) <= _LONGEST_TABLE and not trace.is_joint:
        return "\n".join(lines)
    rounds = f" in {_count(_rounds(trace), 'round')}" if trace.is_joint else ""
    if not changed:
        return f"None of {len(trace.rows)} rows{rounds} changed a ratio; trace.csv has all."
    said = f"{len(changed)} of {len(trace.rows)} rows{rounds} changed a ratio and are shown; trace.csv has all."
    return "\n".join([lines[0], *(lines[1 + row.step] for row in changed), said])


def _effort(trace: SearchTrace) -> str:
    """What a screened search took; nothing for others."""
    if not trace.predictions:
        return ""
    gradients = len({prediction.step for prediction in trace.predictions})
    return f" by {_count(len(trace.compared()), 'evaluation')} and {_count(gradients, 'gradient')}"


def _rounds(trace: SearchTrace) -> int:
    """Rounds of the order "joint", each of which decides every layer."""
    return len(trace.rows) // max(1, len({row.module for row in trace.rows}))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _estimate(model: Any, objective: LoCoOpObjective, config: SeTARConfig) -> str:
    try:
        table = estimate_cost(model, objective, config).table()
    except torch.OutOfMemoryError:
        return (
            "What the search will cost cannot be said: a batch of this size does not fit in memory. The search halves "
            "its batches until they do; a smaller --batch-size says what it costs."
        )
    if config.order != "joint" or (config.evaluations or math.inf) <= USUAL_ROUNDS:
        return table
    return (
        f"{table}\nThis is for {USUAL_ROUNDS} rounds of one evaluation each. The order joint goes on as "
        "long as a round lowers the loss, and evaluates half of a round's changes again where all of them do not; "
        "--evaluations bounds it."
    )


def _how_to_go_on(trace_path: Path, replaced: int | None) -> str:
    """What is said of a search that was stopped; `replaced` is the age of the trace that it was to replace."""
    if not trace_path.exists() or trace_path.stat().st_mtime_ns == replaced:
        return f"Stopped before the first layer; nothing was written to {trace_path.parent}."
    adapter = (
        " Until then the adapter there is an earlier search's." if (trace_path.parent / CONFIG_NAME).exists() else ""
    )
    trace = SearchTrace.load(trace_path)
    again = f"To go on, give the same command with --resume (and without --overwrite).{adapter}"
    if not trace.rows:
        return f"Stopped before anything was decided; {trace_path} holds the settings. {again}"
    done = _count(_rounds(trace), "round") if trace.is_joint else _count(len(trace.rows), "layer")
    return f"Stopped after {done}; what was decided is in {trace_path}. {again}"


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
    kinds = [kind for name in weight_types for kind in (backbone.weight_names if name == _ALL else [name])]
    twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    if twice or not all(kinds):
        what = f"{', '.join(twice)} twice" if twice else "nothing between two commas"
        if _ALL in weight_types and not set(twice).isdisjoint(backbone.weight_names):
            what += f" ({_ALL} stands for {', '.join(backbone.weight_names)})"
        raise ValueError(f"--weights names {what}; name each weight type once, as in W_up,W_q.")
    return [name for kind in kinds for name in backbone.modules_of_type(kind)]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in _parts(text)]
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers; separate them by commas, as in 0.1,0.2.") from None

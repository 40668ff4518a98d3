"""What `setar search` does: load a model and images, say what the search costs, search, and write what it found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from peft import get_peft_model

from setar_peft.backbones import backbone_of
from setar_peft.images import class_names_of
from setar_peft.loading import load_model, load_processor, torch_device
from setar_peft.objective import LoCoOpObjective
from setar_peft.patch_metric import PatchMetric, PatchMetricObjective
from setar_peft.search.estimate import estimate_cost
from setar_peft.search.processes import Processes, own_device
from setar_peft.search.run import search_rank_ratios
from setar_peft.tuner.config import CRITERIA, SeTARConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SearchRequest:
    """What the user asked for on the command line.

    Attributes:
        model: Folder or Hub name of the model.
        images: Folder with one subfolder of images a class.
        output: Folder for the adapter, trace.json and trace.csv.
        classes: JSON list of class names in the subfolders' order; the subfolders' names by default.
        weights: Weight types to search.
        order: Order of the layers, or their full names in the order wanted.
        candidates: Ratios to try; the paper's by default.
        passes: Times to go through all layers at most.
        prune: Which components are removed.
        criterion: What a candidate must lower: "total", "id" or "ood" loss; or what is measured on OOD patches instead,
            1 - "auroc" or "fpr95".
        ood_weight: Weight of the OOD loss.
        top_k: K of the OOD loss; 30 % of the classes by default.
        prompt: Prompt with "{class}" in it.
        batch_size: Images a batch.
        recording_memory: GiB that recordings may take.
        device: Where to compute; a GPU if there is one by default.
        dtype: The model's dtype.
        resume: Continue the trace in `output`.
        dry_run: Only say what it would cost.
    """

    model: str
    images: Path
    output: Path
    classes: Path | None = None
    weights: tuple[str, ...] = ("W_up",)
    order: str | tuple[str, ...] = "vision_text"
    candidates: tuple[float, ...] | None = None
    passes: int = 1
    prune: str = "minor"
    criterion: str = "total"
    ood_weight: float = 0.1
    top_k: int | None = None
    prompt: str = "a photo of a {class}"
    batch_size: int = 64
    recording_memory: float | None = None
    device: str | None = None
    dtype: str = "float32"
    resume: bool = False
    dry_run: bool = False


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas.

    Raises:
        ValueError: If one is no number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers; separate them by commas, as in 0.1,0.2.") from None


def order_of(text: str) -> str | tuple[str, ...]:
    """An order by its name, or full names of modules separated by commas."""
    return tuple(part.strip() for part in text.split(",")) if "." in text or "," in text else text


def run_search(request: SearchRequest, say: Callable[[str], Any]) -> None:
    """Search as asked; the adapter, trace.json and trace.csv are in the output folder at the end.

    Under `accelerate launch` or torchrun the first process speaks and writes.

    Args:
        request: What to do.
        say: Where lines of text go.

    Raises:
        ValueError: If the model, the images or a setting is wrong; the message says what to give instead.
    """
    if request.dtype not in _DTYPES:
        raise ValueError(f"--dtype is {request.dtype!r}; give one of {', '.join(_DTYPES)}.")
    metrics = get_args(PatchMetric)
    if request.criterion not in (*CRITERIA, *metrics):
        raise ValueError(f"--criterion is {request.criterion!r}; give one of {', '.join((*CRITERIA, *metrics))}.")
    names = class_names_of(request.images, request.classes)
    device = (own_device() if request.device is None else None) or torch_device(request.device)
    model = load_model(request.model, dtype=_DTYPES[request.dtype]).to(device)
    is_metric = request.criterion in metrics
    settings: dict[str, Any] = {"metric": request.criterion} if is_metric else {}
    objective = (PatchMetricObjective if is_metric else LoCoOpObjective)(
        load_processor(request.model, model),
        names,
        request.images,
        ood_weight=request.ood_weight,
        top_k=max(1, round(0.3 * len(names))) if request.top_k is None else request.top_k,
        prompt=request.prompt,
        batch_size=request.batch_size,
        **settings,
    )
    backbone = backbone_of(model)
    targets = [name for weight_type in request.weights for name in backbone.modules_of_type(weight_type)]
    candidates: dict[str, Any] = {} if request.candidates is None else {"candidate_ratios": list(request.candidates)}
    config = SeTARConfig(
        target_modules=targets,
        order=request.order if isinstance(request.order, str) else list(request.order),
        passes=request.passes,
        prune=request.prune,
        criterion="total" if is_metric else request.criterion,
        recording_memory=request.recording_memory,
        **candidates,
    )
    is_first = Processes(device).is_first
    if is_first:
        say(estimate_cost(model, objective, config).table())
    if request.dry_run:
        return
    trace_path = request.output / "trace.json"
    result = search_rank_ratios(model, objective, config, trace_path=trace_path, resume=request.resume)
    if not is_first:
        return
    say(result.trace.table())
    if find_spec("matplotlib"):
        result.trace.plot().savefig(request.output / "trace.png", dpi=150)
    (request.output / "trace.csv").write_text(result.trace.to_csv(), encoding="utf-8")
    get_peft_model(model, result.config).save_pretrained(str(request.output))
    first, last = result.trace.initial.total, result.trace.rows[-1].total_loss
    say(f"Loss {first:.6f} -> {last:.6f}. The adapter and the trace (JSON, CSV, PNG) are in {request.output}.")

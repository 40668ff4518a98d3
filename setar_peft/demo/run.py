"""The demo's course: search, adapter, save, reload in a fresh process, merge; with figures before and after."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from rich.console import Console
from torch import Tensor

from setar_peft.backbones import backbone_of
from setar_peft.demo import report
from setar_peft.demo.experiment import Experiment
from setar_peft.demo.reload import fixed_logits, logits_in_a_fresh_process
from setar_peft.detection.evaluation import evaluate
from setar_peft.detection.result import Evaluation
from setar_peft.objectives.class_prompts import PROMPT
from setar_peft.plots import summary_figure
from setar_peft.search.run import search_rank_ratios
from setar_peft.search.trace import SearchTrace
from setar_peft.tuner.config import SeTARConfig

FIGURE_SCORE = "gl_mcm"
_COMPARED_IMAGES = 64


@dataclass(frozen=True)
class DemoResult:
    """What came out of a run.

    Attributes:
        evaluation: Figures of the base model, "base", and of the model with the adapter, "SeTAR".
        trace: The search.
        rank_ratios: Module name -> ratio chosen.
        reload_is_exact: Whether the adapter gave the same logits to the bit in a fresh process.
        merge_difference: Largest absolute difference of the merged model's logits from the adapter's.
        output: The folder with everything.
    """

    evaluation: Evaluation
    trace: SearchTrace
    rank_ratios: dict[str, float]
    reload_is_exact: bool
    merge_difference: float
    output: Path


def run(
    experiment: Experiment, output: str | Path, *, console: Console | None = None, progress: bool = True
) -> DemoResult:
    """Run the demo and print what it finds, better or worse.

    The base model is changed: it ends up merged with the adapter.

    Args:
        experiment: What to run on.
        output: Folder for adapter/, trace.json, results.json and figure.png; those of an earlier run are replaced.
        console: Where to print; by default standard output.
        progress: Show a progress bar of the search on standard error.

    Raises:
        ValueError: If the adapter's logits differ in a fresh process, or the search or the evaluation refuses the
            model or the images.
    """
    console = Console() if console is None else console
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    report.print_inputs(console, experiment)
    model, objective = experiment.model, experiment.objective

    started = time.perf_counter()
    found = search_rank_ratios(
        model, objective, SeTARConfig(), progress=progress, trace_path=folder / "trace.json", overwrite=True
    )
    seconds = time.perf_counter() - started
    report.print_trace(console, found.trace, seconds)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in found.rank_ratios}
    report.print_ranks(console, found.rank_ratios, shapes)

    peft_model = get_peft_model(model, found.config)
    evaluation = evaluate(
        peft_model,
        experiment.test,
        experiment.ood,
        processor=experiment.processor,
        prompt=objective.prompt or PROMPT,
        adapters={"base": None, "SeTAR": "default"},
    )
    report.print_comparison(console, evaluation)

    adapter = folder / "adapter"
    peft_model.save_pretrained(adapter)
    inputs = _fixed_inputs(experiment)
    with_adapter = fixed_logits(peft_model, inputs)
    device = next(model.parameters()).device
    reloaded = logits_in_a_fresh_process(experiment.base, adapter, inputs, device)
    is_exact = all(torch.equal(with_adapter[name], reloaded[name]) for name in with_adapter)
    merged = fixed_logits(peft_model.merge_and_unload(), inputs)
    difference = _largest_difference(with_adapter, merged)
    report.print_checks(console, len(inputs["pixel_values"]), is_exact, difference)

    result = DemoResult(evaluation, found.trace, found.rank_ratios, is_exact, difference, folder)
    _write_results(result, experiment, seconds)
    scores = {
        title: evaluation.models[model].by_set(FIGURE_SCORE)
        for title, model in (("before", "base"), ("after", "SeTAR"))
    }
    label = evaluation.score_label(FIGURE_SCORE)
    summary_figure(found.trace, scores, label).savefig(folder / "figure.png", dpi=150)
    report.print_files(console, folder)
    if not is_exact:
        gap = _largest_difference(with_adapter, reloaded)
        raise ValueError(
            f"The adapter in {adapter} gives other logits in a fresh process, by up to {gap:.2e}. That is a fault of "
            "setar-peft or of nondeterministic kernels on this device; please report it with results.json."
        )
    return result


def _fixed_inputs(experiment: Experiment) -> dict[str, Tensor]:
    """The first test images and the class prompts, as tensors."""
    pixel_values, _ = next(experiment.test.batches())
    tokens = experiment.objective.class_tokens(backbone_of(experiment.model))
    return {"pixel_values": pixel_values[:_COMPARED_IMAGES], **tokens}


def _largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _write_results(result: DemoResult, experiment: Experiment, search_seconds: float) -> None:
    values = {
        "title": experiment.title,
        "base": experiment.base,
        "class_names": experiment.objective.class_names,
        "ood_weight": experiment.objective.ood_weight,
        "top_k": experiment.objective.top_k,
        "search_images": len(experiment.objective),
        "search_seconds": search_seconds,
        "rank_ratios": result.rank_ratios,
        "evaluation": result.evaluation.to_dict(),
        "reload_is_exact": result.reload_is_exact,
        "merge_difference": result.merge_difference,
    }
    (result.output / "results.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

"""What the demo prints: tables for a terminal that stay readable in a log file of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from setar_peft.data.labels import matching_sentence
from setar_peft.decomposition import kept_rank, residual_rank
from setar_peft.demo.experiment import Experiment
from setar_peft.detection.figures import MEAN
from setar_peft.detection.result import Evaluation
from setar_peft.detection.tables import difference_cells
from setar_peft.search.trace import SearchTrace

# Figure of `OODMetrics` -> its heading.
_FIGURES = {"fpr": "FPR95", "auroc": "AUROC", "aupr_in": "AUPR-in", "aupr_out": "AUPR-out"}


def print_inputs(console: Console, experiment: Experiment) -> None:
    """Say what the demo runs on."""
    objective = experiment.objective
    sets = ", ".join(f"{name} ({len(images)})" for name, images in experiment.ood.items())
    console.print(f"[bold]SeTAR on {escape(experiment.title)}[/]")
    console.print(
        f"{len(objective)} images for the search, {len(experiment.test)} for testing; OOD: {escape(sets)}. "
        f"OOD weight {objective.ood_weight:g}, top K {objective.top_k} of {len(objective.class_names)} classes.",
        highlight=False,
    )
    matching = matching_sentence(objective.images.matched)
    if matching is not None:
        console.print(escape(matching), highlight=False)
    console.print()


def print_trace(console: Console, trace: SearchTrace, seconds: float) -> None:
    """The search step by step, with the columns of the paper's Listing 1."""
    table = _table(f"Search: {len(trace.candidates)} candidates in {seconds:.1f} s")
    for heading in ("step", "tower", "weight", "layer", "ratio", "loss", "ID loss", "OOD loss", "acc. %", "OOD %"):
        table.add_column(heading, justify="left" if heading in ("tower", "weight") else "right", no_wrap=True)
    initial = trace.initial
    table.add_row(
        "-",
        "base",
        "",
        "",
        "",
        *(f"{value:.4f}" for value in (initial.total, initial.id_loss, initial.ood_loss)),
        *(f"{100 * share:.1f}" for share in (initial.accuracy, initial.ood_patch_share)),
    )
    for row in trace.rows:
        table.add_row(
            str(row.step),
            row.tower_type,
            row.weight_type,
            "-" if row.layer_num is None else str(row.layer_num),
            f"{row.best_ratio:.2f}",
            *(f"{value:.4f}" for value in (row.total_loss, row.id_loss, row.ood_loss)),
            *(f"{percent:.1f}" for percent in (row.val_acc, row.ood_patch_percent)),
        )
    console.print(table)


def print_ranks(console: Console, rank_ratios: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> None:
    """The chosen ratios and what they leave of each weight's rank."""
    table = _table("Ranks")
    table.add_column("module", overflow="fold")
    for heading in ("shape", "ratio", "kept", "removed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, ratio in rank_ratios.items():
        shape = shapes[name]
        kept, removed = kept_rank(shape, ratio), residual_rank(shape, ratio)
        table.add_row(escape(name), f"{shape[0]} x {shape[1]}", f"{ratio:.2f}", str(kept), str(removed))
    console.print(table)


def print_comparison(console: Console, evaluation: Evaluation) -> None:
    """Every figure of the base and of the adapter, and whether the difference over all OOD sets is more than chance."""
    table = _table("Test images, base and with SeTAR")
    table.add_column("OOD set", overflow="fold")
    table.add_column("score", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for heading in ("acc.", *_FIGURES.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    base, *others = evaluation.models
    for row in evaluation.rows:
        shares = (evaluation.accuracy(row.model), *(getattr(row.metrics, figure) for figure in _FIGURES))
        first = row.model == base
        table.add_row(
            escape(row.ood_set) if first else "",
            row.score if first else "",
            row.model,
            *("-" if math.isnan(share) else f"{100 * share:.2f}" for share in shares),
            end_section=row.model == others[-1],
        )
    console.print(table)
    console.print(evaluation.convention(), highlight=False, markup=False)
    wholes = [row for row in evaluation.differences if row.ood_set == MEAN] or evaluation.differences
    headings, cells = difference_cells(wholes, evaluation.conventions)
    for ood_set, score, difference, fpr, fpr_verdict, auroc, auroc_verdict in cells:
        console.print(
            f"{difference}, {ood_set}, {score}: {headings[3]} {fpr}, {fpr_verdict}; AUROC {auroc}, {auroc_verdict}.",
            highlight=False,
            markup=False,
        )
    console.print()


def print_checks(console: Console, images: int, reload_is_exact: bool, merge_difference: float) -> None:
    """Whether saving and merging keep the logits."""
    reload_result = "the same logits to the bit" if reload_is_exact else "OTHER LOGITS"
    merged = "none, to the bit" if merge_difference == 0 else f"at most {merge_difference:.1e}"
    console.print(f"Saved, and reloaded in a fresh process: {reload_result}, on {images} images.", highlight=False)
    console.print(f"Merged into a stock model: difference in logits {merged}.\n", highlight=False)


def print_files(console: Console, folder: Path) -> None:
    """Where everything is."""
    console.print(
        f"In {folder}: adapter, trace.json, results.json, figure.png.", highlight=False, markup=False, soft_wrap=True
    )


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False
    )

"""What a gradient predicts of truncations, and what the screened searches make of it, beside the greedy search.

Of each setting: how well the predicted changes of the loss rank the exact ones, over all truncations of a single layer
of the base; then the loss after each search. All are counts and losses: they depend on no clock. The settings are the
golden tiny models, the same with every weight type ("kin"), small trained models, and a real encoder of texts; those
whose data or encoder are not there are left out with a sentence.

    SETAR_DATA=<folder> python -m benchmarks.screening                             # all
    SETAR_DATA=<folder> python -m benchmarks.screening --settings golden,mini_clip/fashion
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import spearmanr
from transformers.utils import logging

from benchmarks.screening_settings import Case, Missing, Setting, all_settings
from benchmarks.search_cost import WAYS, evaluations_of, share_of_fall
from setar_peft import SearchTrace, SeTARConfig, search_rank_ratios
from setar_peft.backbones.untouched import left_as_it_was
from setar_peft.search.plan import SearchPlan, plan_search
from setar_peft.search.replay import ReplayEvaluator

SEARCHES: dict[str, dict[str, Any]] = {
    "verify=2": WAYS["verify"],
    "verify=1": WAYS["verify"] | {"verify": 1},
    "best first": WAYS["best_first"],
    "joint": WAYS["joint"],
}
# The share of greedy's fall of the loss that two candidates a layer are held to.
WANTED_SHARE = 0.97


class Truncation(NamedTuple):
    """One layer of the base truncated by one ratio: predicted and exact change of the loss."""

    layer: str
    rank_ratio: float
    predicted: float
    exact: float


def single_truncations(case: Case, plan: SearchPlan) -> Iterator[Truncation]:
    """Every candidate of the plan, alone on the base."""
    config = SeTARConfig(**case.config)
    assert plan.backbone is not None
    with left_as_it_was(case.model):
        evaluator = ReplayEvaluator(
            case.objective,
            plan.backbone,
            list(plan.locations),
            config.prune,
            config.seed,
            keep_decompositions=True,
            by_gram=True,
        )
        base = evaluator.present().total
        predictions = evaluator.predictions("total", plan.candidates)
        for layer, ratios in plan.candidates.items():
            for ratio, losses in zip(ratios, evaluator.losses(layer, ratios, lambda *_: None), strict=True):
                yield Truncation(layer, ratio, predictions[layer][ratio].change, losses.total - base)


def measure(case: Case) -> tuple[dict[str, Any], dict[str, SearchTrace]]:
    """A setting's figures, and the traces of its searches."""
    plan = plan_search(case.model, case.objective, SeTARConfig(**case.config))
    # In the orders that go by predictions, too, the layers are those that the greedy search visits.
    settings = {**case.config, "target_modules": list(plan.locations)}
    truncations = list(single_truncations(case, plan))
    predicted, exact = ([getattr(one, name) for one in truncations] for name in ("predicted", "exact"))
    traces = {
        name: search_rank_ratios(case.model, case.objective, SeTARConfig(**settings | search), progress=False).trace
        for name, search in {"greedy": {}, **SEARCHES}.items()
    }
    falls = {name: trace.initial.total - trace.rows[-1].total_loss for name, trace in traces.items()}
    figures = {
        "layers": len(plan.locations),
        "truncations": len(truncations),
        "rank_correlation": float(spearmanr(predicted, exact).statistic),
        "signs_right": sum((one.predicted < 0) == (one.exact < 0) for one in truncations),
        "initial_loss": traces["greedy"].initial.total,
        "searches": {
            name: {
                "evaluations": evaluations_of(trace),
                "final_loss": trace.rows[-1].total_loss,
                "share_of_greedys_fall": share_of_fall(falls[name], falls["greedy"]),
            }
            for name, trace in traces.items()
        },
    }
    return figures, traces


def table_row(name: str, figures: Mapping[str, Any]) -> str:
    """A setting as a line of the Markdown table."""
    greedy = figures["searches"]["greedy"]
    cells = [
        name,
        f"{figures['layers']}",
        f"{figures['rank_correlation']:.2f}",
        f"{figures['signs_right']} of {figures['truncations']}",
        f"{figures['initial_loss']:.4f} → {greedy['final_loss']:.4f} ({greedy['evaluations']})",
    ]
    for search in SEARCHES:
        found = figures["searches"][search]
        cells.append(f"{_percent(found['share_of_greedys_fall'])} ({found['evaluations']})")
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def where_it_fell_short(greedy: SearchTrace, screened: SearchTrace) -> Iterator[str]:
    """Of the first step in which a screened search parted from the greedy one: predicted and exact changes."""
    for theirs, ours in zip(greedy.rows, screened.rows, strict=True):
        if (ours.module, ours.best_ratio) == (theirs.module, theirs.best_ratio):
            continue
        by_greed, by_screening = (f"{row.module} at {row.best_ratio:g}" for row in (theirs, ours))
        yield f"  step {ours.step}: {by_greed} by greed, {by_screening} by screening"
        for name, trace, row in (("greedy", greedy, theirs), ("screened", screened, ours)):
            before = trace.rows[row.step - 1].total_loss if row.step else trace.initial.total
            tried = [one for one in trace.candidates if (one.step, one.module) == (row.step, row.module)]
            yield f"    exact, {name}: {_changes({one.rank_ratio: one.total_loss - before for one in tried})}"
        for module in dict.fromkeys((theirs.module, ours.module)):
            predicted = {one.rank_ratio: one.change for one in screened.predictions if one.module == module}
            yield f"    predicted of {module}: {_changes(predicted)}"
        return


def _changes(changes: Mapping[float, float]) -> str:
    return ", ".join(f"{ratio:g} {change:+.2e}" for ratio, change in sorted(changes.items()) if ratio) or "none tried"


def chosen(settings: Sequence[Setting], names: Sequence[str]) -> list[Setting]:
    """The settings whose names begin with one of these, up to a stroke.

    Raises:
        ValueError: If one of them is the beginning of none.
    """
    found = {name: [one for one in settings if f"{one.name}/".startswith(f"{name}/")] for name in names}
    unknown = [name for name, ones in found.items() if not ones]
    if unknown:
        raise ValueError(f"{unknown[0]!r} begins none of {', '.join(one.name for one in settings)}")
    return [one for one in settings if any(one in ones for ones in found.values())]


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", help="names, or beginnings of names, separated by commas; by default all")
    parser.add_argument("--images", type=int, default=100, help="of each set of real images")
    parser.add_argument("--texts", type=int, default=200, help="of the real texts")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    settings = list(all_settings())
    try:
        settings = chosen(settings, options.settings.split(",")) if options.settings else settings
    except ValueError as error:
        parser.error(str(error))
    logging.disable_progress_bar()
    # The tiny models are random, and of few components some ratios remove the same.
    warnings.filterwarnings("ignore", message=".*near chance|Candidates that are not evaluated")
    results: dict[str, dict[str, Any]] = {}
    left_out: dict[str, list[str]] = {}
    short: list[str] = []
    heads = ["setting", "layers", "rank correlation", "signs right", "greedy: loss (evaluations)", *SEARCHES]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    for setting in settings:
        try:
            case = setting.make(options.images, options.texts)
        except Missing as missing:
            left_out.setdefault(str(missing), []).append(setting.name)
            continue
        figures, traces = measure(case)
        results[setting.name] = figures
        print(table_row(setting.name, figures), flush=True)
        share = figures["searches"]["verify=2"]["share_of_greedys_fall"]
        if share is not None and share < WANTED_SHARE:
            short.append(f"{setting.name}: verify=2 has {_percent(share)} of greedy's fall of the loss.")
            short.extend(where_it_fell_short(traces["greedy"], traces["verify=2"]))
        if options.json:  # after each, so that a run which is cut off leaves what it has
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    remarks = (f"Left out, {missing}: {', '.join(names)}." for missing, names in left_out.items())
    print(*["", *summary(results), *remarks, *short], sep="\n")


def summary(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One sentence a search over all settings in which the greedy one lowers the loss."""
    for search in SEARCHES:
        shares = {name: of_one["searches"][search]["share_of_greedys_fall"] for name, of_one in results.items()}
        known = {name: share for name, share in shares.items() if share is not None}
        if known:
            worst = min(known, key=known.__getitem__)
            below = sum(share < WANTED_SHARE for share in known.values())
            yield (
                f"{search}: median {_percent(statistics.median(known.values()))} of greedy's fall of the loss, least "
                f"{_percent(known[worst])} ({worst}), below {_percent(WANTED_SHARE)} in {below} of {len(known)}."
            )


if __name__ == "__main__":
    main()

"""What a search costs: greedy and screened, against the greedy one with every candidate evaluated in full.

All search the same random CLIP with the same data and decompose each weight once; `full`, through both towers by the
stock forward, takes the decisions of `greedy`. Each runs in a process of its own, so that the peak of one is not the
other's. In all, glibc keeps freed memory (docs/search.md), so that work is timed and not the page faults of one heap or
another; --default-malloc leaves that out. The weights are random, so that hardly any truncation may lower the loss:
what a search finds on models that were trained, `python -m benchmarks.screening` says.

    python -m benchmarks.search_cost                    # ViT-B/32 shapes, 32 images, 50 classes, 8 candidates
    python -m benchmarks.search_cost --candidates 2     # full / greedy as above, four times sooner
    python -m benchmarks.search_cost --ways greedy,best_first,verify
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CLIPConfig, CLIPModel

from benchmarks.machine import synchronize
from setar_peft import Objective, SeTARConfig, search_rank_ratios
from setar_peft.backbones import ImageFeatures, backbone_of
from setar_peft.objectives.loss import LossValues, locoop_sums, locoop_values
from setar_peft.search.trace import SearchTrace

# Read by glibc when a process starts.
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_TOP_PAD_": str(2**29)}
# What can be measured, in the order in which it is: what takes longest comes last.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "best_first": {"search": "screened", "order": "best_first"},
    "verify": {"search": "screened", "verify": 2},
    "joint": {"search": "screened", "order": "joint"},
    "full": {},
}
# A fall of the loss below this is rounding, of which no share is told.
SMALLEST_FALL = 1e-6
RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "tiny": {
        "vision_config": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
                          "image_size": 64, "patch_size": 16},
        "text_config": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    },
    "base32": {"vision_config": {"patch_size": 32}, "text_config": {}},
    "base16": {"vision_config": {"patch_size": 16}, "text_config": {}},
    "large14": {
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                          "num_attention_heads": 16, "patch_size": 14},
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    },
}  # fmt: skip
# CLIP's ids of the start of a text and "a photo of a"; a name of six tokens and the end follow.
PROMPT_BEGINNING = (49_406, 320, 1125, 539, 320)
PROMPT_TOKENS = 12


class RandomImages(Objective):
    """The LoCoOp loss on random images and prompts: the work is that of real ones."""

    def __init__(self, images: int, classes: int, image_size: int, batch_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(images, 3, image_size, image_size, generator=generator)
        self.labels = torch.randint(classes, (images,), generator=generator)
        ids = torch.randint(1, 49_000, (classes, PROMPT_TOKENS), generator=generator)
        ids[:, : len(PROMPT_BEGINNING)] = torch.tensor(PROMPT_BEGINNING)
        ids[:, -1] = 49_407
        self.tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.top_k = max(1, classes // 3)
        self.batch_size = batch_size

    def batches(self) -> Any:
        return zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size), strict=True)

    def class_tokens(self, _: Any) -> dict[str, torch.Tensor]:
        return self.tokens

    def sums(self, features: Any, classes: Any, labels: torch.Tensor) -> torch.Tensor:
        return torch.stack(locoop_sums(*features[:2], classes, labels, top_k=self.top_k))

    def values(self, sums: torch.Tensor) -> LossValues:
        return locoop_values(sums, 0.1)


def random_clip(shape: str) -> CLIPModel:
    """A CLIP of the given shape with seeded random weights."""
    torch.manual_seed(0)
    config = CLIPConfig(**SHAPES[shape])
    # OpenAI's checkpoints carry the end token that the tokenizer gives.
    config.text_config.eos_token_id = 49_407
    return CLIPModel(config).eval()


def full_evaluation(model: CLIPModel, objective: RandomImages) -> float:
    """The loss as one would write it: every block of both towers by the stock forward, and the value path beside it."""
    last = model.vision_model.encoder.layers[-1]
    entered: list[torch.Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    backbone = backbone_of(model)
    sums: torch.Tensor | float = 0.0
    with torch.no_grad():
        tokens = {name: value.to(model.device) for name, value in objective.tokens.items()}
        classes = backbone.class_weights(model.get_text_features(**tokens).pooler_output)
        for pixel_values, labels in objective.batches():
            pooled = model.get_image_features(pixel_values=pixel_values.to(model.device)).pooler_output
            patches = entered.pop()[:, 1:]
            patches = patches + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(patches)))
            patches = patches + last.mlp(last.layer_norm2(patches))
            local = model.visual_projection(model.vision_model.post_layernorm(patches))
            features = ImageFeatures(backbone.embed(pooled), backbone.embed(local))
            sums = sums + objective.sums(features, classes, labels.to(model.device))
    handle.remove()
    assert isinstance(sums, torch.Tensor)
    return objective.values(sums).total


class Passes(NamedTuple):
    """Inputs that a search takes through each tower's blocks, the last one included.

    Attributes:
        there: On the way to the features.
        back: On the way back to the weights' gradients.
    """

    there: Counter[str]
    back: Counter[str]


def count_passes(model: CLIPModel) -> Passes:
    """Count passes from here on."""
    passes = Passes(Counter(), Counter())

    def count(name: str, rows: int, result: torch.Tensor) -> None:
        passes.there[name] += rows
        passes.back[name] += rows * result.requires_grad

    for kind in {type(tower) for tower in backbone_of(model).towers.values()}:

        def step(self: Any, entry: Any, level: int, hidden: torch.Tensor, call: Any = kind.step) -> Any:
            result = call(self, entry, level, hidden)
            count(self.name, entry.rows * (level < len(self.blocks) - 1), result)
            return result

        def finish(self: Any, entry: Any, hidden: torch.Tensor, call: Any = kind.finish) -> Any:
            result = call(self, entry, hidden)
            count(self.name, entry.rows, result[0])
            return result

        kind.step, kind.finish = step, finish  # type: ignore[method-assign]
    return passes


def time_of_passes(model: CLIPModel, objective: RandomImages, rows: Counter[str], device: str) -> float:
    """Seconds of a plain loop that takes as many inputs through whole blocks, in batches of the same size."""
    seconds, rows = 0.0, Counter(rows)
    pixel_values, _ = next(iter(objective.batches()))
    prompts = {name: values[: objective.prompt_batch_size or len(values)] for name, values in objective.tokens.items()}
    inputs = {"vision": {"pixel_values": pixel_values}, "text": prompts}
    with torch.no_grad():
        for name, tower in backbone_of(model).towers.items():
            entry = tower.enter({key: value.to(device) for key, value in inputs[name].items()})
            for _ in range(3):
                tower.step(entry, 0, entry.hidden)
            synchronize(device)
            start = time.perf_counter()
            for index in range(24):
                tower.step(entry, index % len(tower.blocks), entry.hidden)
            synchronize(device)
            seconds += (time.perf_counter() - start) / 24 * rows[name] / entry.rows
    return seconds


def measure(way: str, options: dict[str, Any]) -> dict[str, Any]:
    """One search, one of `WAYS`: seconds, passes, evaluations, peak memory in MiB above the model's, what it found."""
    torch.set_num_threads(options["threads"])
    model = random_clip(options["shape"]).to(options["device"])
    size = model.config.vision_config.image_size
    objective = RandomImages(options["images"], options["classes"], size, options["batch_size"])
    config = SeTARConfig(candidate_ratios=list(RATIOS[: options["candidates"]]), **WAYS[way])
    target: Any = (lambda candidate: full_evaluation(candidate, objective)) if way == "full" else objective
    full_evaluation(model, objective)  # warm-up; the first pass also pays for what is set up once
    before = _peak_mebibytes(options["device"])
    rows = count_passes(model)
    start = time.perf_counter()
    result = search_rank_ratios(model, target, config, progress=options["progress"])
    synchronize(options["device"])
    seconds = time.perf_counter() - start
    peak = _peak_mebibytes(options["device"]) - before
    evaluations = evaluations_of(result.trace)
    inputs = {"vision": options["images"], "text": options["classes"]}
    passes, back = ({tower: count[tower] / inputs[tower] for tower in inputs} for count in rows)
    if way == "full":
        passes = {name: (1 + evaluations) * len(tower.blocks) for name, tower in backbone_of(model).towers.items()}
    figures = {
        "seconds": seconds,
        "block_passes": passes,
        "block_passes_back": back,
        "evaluations": evaluations,
        "peak_mebibytes": peak,
        "initial_loss": result.trace.initial.total,
        "final_loss": result.trace.rows[-1].total_loss,
        "rank_ratios": result.rank_ratios,
    }
    if way == "greedy":
        figures["floor_seconds"] = time_of_passes(model, objective, rows.there, options["device"])
    return figures


def evaluations_of(trace: SearchTrace) -> int:
    """Losses that a search computed after that of the base; changes that were evaluated together are one."""
    return len({one[:3] if one.trial is None else one.trial for one in trace.candidates})


def share_of_fall(fall: float, of_greedy: float) -> float | None:
    """How much of greedy's fall of the loss another search reaches; None where greedy's is rounding."""
    return fall / of_greedy if of_greedy >= SMALLEST_FALL else None


def comparisons(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Each search but the greedy one beside it, if that was measured.

    Returns:
        Way -> "share_of_greedys_fall" (of the loss) and "times_as_fast_as_greedy".
    """
    if "greedy" not in results:
        return {}
    falls = {way: figures["initial_loss"] - figures["final_loss"] for way, figures in results.items()}
    return {
        way: {
            "share_of_greedys_fall": share_of_fall(falls[way], falls["greedy"]),
            "times_as_fast_as_greedy": results["greedy"]["seconds"] / figures["seconds"],
        }
        for way, figures in results.items()
        if way != "greedy"
    }


def _peak_mebibytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def add_size_options(
    parser: argparse.ArgumentParser, *, shape: str, images: int, classes: int, batch_size: int, device: str
) -> None:
    """Let the command line say how large a search is and where it runs; the arguments are the defaults."""
    parser.add_argument("--shape", choices=SHAPES, default=shape)
    parser.add_argument("--images", type=int, default=images)
    parser.add_argument("--classes", type=int, default=classes)
    parser.add_argument("--candidates", type=int, default=8, choices=range(1, 9))
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])


def _ways(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in WAYS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(WAYS)}")
    return [way for way in WAYS if way in names]


def main() -> None:
    """Measure all ways and print how they compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, shape="base32", images=32, classes=50, batch_size=32, device="cpu")
    parser.add_argument("--ways", type=_ways, default=list(WAYS), help=f"by default all: {','.join(WAYS)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--default-malloc", action="store_true", help="let glibc give freed memory back")
    parser.add_argument("--progress", action="store_true", help="show the searches' progress bars")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = vars(parser.parse_args())
    target = options.pop("json")
    if not options["default_malloc"]:
        os.environ.update(KEEP_FREED_MEMORY)
    versions = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    results: dict[str, dict[str, Any]] = {}
    for way in options["ways"]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[way] = pool.apply(measure, (way, options))
        print(_line(way, results[way]), flush=True)
        if target:  # after each, so that a run which is cut off leaves what it has
            figures = {"options": options, "versions": versions, "comparisons": comparisons(results), **results}
            target.write_text(json.dumps(figures, indent=1) + "\n")
    for way, beside in comparisons(results).items():
        share = beside["share_of_greedys_fall"]
        fall = f"{math.nan if share is None else 100 * share:.1f} % of its fall of the loss"
        print(f"{way:>10}: {beside['times_as_fast_as_greedy']:.2f} times as fast as greedy, {fall}")
    if "greedy" in results:
        floor = results["greedy"]["seconds"] / results["greedy"]["floor_seconds"]
        print(f"greedy / a plain loop over the same block passes: {floor:.2f}")
    if {"greedy", "full"} <= results.keys():
        greedy, full = results["greedy"], results["full"]
        equal = "equal" if full["rank_ratios"] == greedy["rank_ratios"] else "DIFFER"
        gap = abs(full["final_loss"] - greedy["final_loss"])
        ratio = full["seconds"] / greedy["seconds"]
        print(f"full / greedy: {ratio:.2f} times the time; decisions {equal}, losses within {gap:.1e}")


def _line(way: str, figures: Mapping[str, Any]) -> str:
    there, back = (sum(figures[name].values()) for name in ("block_passes", "block_passes_back"))
    return (
        f"{way:>10}: {figures['seconds']:8.1f} s, {there:.0f} block passes there and {back:.0f} back, "
        f"{figures['evaluations']} evaluations, peak {figures['peak_mebibytes']:.0f} MiB above the model's, "
        f"loss {figures['initial_loss']:.6f} -> {figures['final_loss']:.6f}"
    )


if __name__ == "__main__":
    main()

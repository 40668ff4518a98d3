"""How a search grows: with images, classes, blocks and candidates; and its memory under a fixed budget.

    python -m benchmarks.search_growth --figure growth.png

Each point is one search in a process of its own on a random CLIP of width 128; time should be linear in images, classes
and candidates, and quadratic in blocks (a layer's candidates pass the blocks above it). In the last panel the images
grow while the recordings may hold 64 MiB: the peak levels off, and what does not fit is computed again or on disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from benchmarks.search_cost import RATIOS, RandomImages
from setar_peft import SeTARConfig, search_rank_ratios

BASE = {"images": 64, "classes": 20, "blocks": 4, "candidates": 4, "recording_memory": None}
GROWTH: dict[str, list[int]] = {
    "images": [32, 64, 128, 256],
    "classes": [20, 100, 400, 1000],
    "blocks": [2, 4, 8, 12],
    "candidates": [1, 2, 4, 8],
}
MEMORY = {"images": [64, 128, 320, 640], "recording_memory": 64 / 1024, "blocks": 8, "candidates": 1}


def measure(point: dict[str, Any]) -> tuple[float, float]:
    """Seconds, and peak MiB above the model's, of one search."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": point["blocks"],
        "num_attention_heads": 4,
    }
    model = CLIPModel(CLIPConfig(vision_config={**width, "image_size": 64, "patch_size": 8}, text_config=width)).eval()
    model.config.text_config.eos_token_id = 49_407
    config = SeTARConfig(
        candidate_ratios=list(RATIOS[: point["candidates"]]), recording_memory=point["recording_memory"]
    )
    small = RandomImages(8, 4, 64, 8)
    search_rank_ratios(model, small, SeTARConfig(candidate_ratios=[0.1]), progress=False)
    objective = RandomImages(point["images"], point["classes"], 64, 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    search_rank_ratios(model, objective, config, progress=False)
    seconds = time.perf_counter() - start
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / scale


def in_a_process(point: dict[str, Any]) -> tuple[float, float]:
    """`measure` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (point,))


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, help="draw the growth here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    results: dict[str, list[tuple[int, float, float]]] = {}
    for name, values in GROWTH.items():
        results[name] = [(value, *in_a_process({**BASE, name: value})) for value in values]
    fixed = {**BASE, **{name: value for name, value in MEMORY.items() if name != "images"}}
    results["images, 64 MiB"] = [(value, *in_a_process({**fixed, "images": value})) for value in MEMORY["images"]]  # type: ignore[union-attr]
    for name, points in results.items():
        for value, seconds, peak in points:
            print(f"{name:>15} {value:5d}: {seconds:7.2f} s, peak {peak:6.0f} MiB above the model's")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3 * len(results), 3), layout="constrained")
        for axis, (name, points) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
            column, unit = (2, "peak MiB") if "MiB" in name else (1, "seconds")
            axis.plot([point[0] for point in points], [point[column] for point in points], "o-", color="#0072B2")
            axis.set(xlabel=name, ylabel=unit, xlim=(0, None), ylim=(0, None))
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(arguments.figure, dpi=150)


if __name__ == "__main__":
    main()

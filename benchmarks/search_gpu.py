"""The whole search on a GPU in one precision, and the share it reaches of the bound that its operations set.

The greedy search, and then two screened ones: best first, and two candidates a layer. The bound is the time of a
search's matrix products, there and back, as counted while it runs once more, at the GPU's peak rate: that of its data
sheet, with the rate of one large product measured beside it. A screened search's gradients are float32 also where the
model is not, so that in half precision its bound is lower than it could be.

    python -m benchmarks.search_gpu             # CLIP-B/16, 1,000 images, 1,000 classes, 8 candidates, 24 layers
    python -m benchmarks.search_gpu --device cpu --shape tiny --images 16 --classes 10 --precision float32

The authors' search of this size took 24 min 41 s on an RTX 4090, as their log says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import described, device_name, measured_peak, synchronize
from benchmarks.search_cost import (
    RATIOS,
    WAYS,
    RandomImages,
    add_size_options,
    comparisons,
    evaluations_of,
    random_clip,
)
from setar_peft import SeTARConfig, search_rank_ratios
from setar_peft.backbones.loading import PRECISIONS, precision

# Dense peak rates in TFLOP/s, from NVIDIA's data sheets: bfloat16 and float16 with float32 sums, TF32.
PEAKS = {
    "H200": {"bfloat16": 989.0, "float16": 989.0, "tf32": 494.0, "float32": 67.0},
    "H100 PCIe": {"bfloat16": 756.0, "float16": 756.0, "tf32": 378.0, "float32": 51.0},
    "H100": {"bfloat16": 989.0, "float16": 989.0, "tf32": 494.0, "float32": 67.0},
    "A100": {"bfloat16": 312.0, "float16": 312.0, "tf32": 156.0, "float32": 19.5},
    "L40S": {"bfloat16": 362.0, "float16": 362.0, "tf32": 183.0, "float32": 91.6},
    "RTX 4090": {"bfloat16": 165.2, "float16": 165.2, "tf32": 82.6, "float32": 82.6},
}
KERNELS_SHOWN = 20
SCREENED = ("best_first", "verify")


def sheet_peak(device: str, name: str) -> float | None:
    """TFLOP/s of the device's data sheet in a precision, where it is known."""
    return next((rates.get(name) for model, rates in PEAKS.items() if model in device_name(device)), None)


def timed(device: str, search: Callable[[], Any]) -> tuple[float, float | None, Any]:
    """Seconds of one search, its peak memory in MiB above what was there, on a GPU, and what it found."""
    memory = 0.0
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        memory = torch.cuda.memory_allocated()
    synchronize(device)
    start = time.perf_counter()
    result = search()
    synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, (torch.cuda.max_memory_allocated() - memory) / 2**20 if device == "cuda" else None, result


def profiled(device: str, search: Callable[[], Any]) -> dict[str, Any]:
    """Where the time of a search goes: the longest kernels (operators on a CPU), and the share the device idles."""
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        seconds, _, _ = timed(device, search)
    events = profiler.key_averages()
    if on_gpu:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    taken = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in events
    }
    busy = sum(microseconds for microseconds, _ in taken.values()) / 1e6
    longest = sorted(taken.items(), key=lambda item: -item[1][0])[:KERNELS_SHOWN]
    return {
        "seconds_while_profiled": seconds,
        "busy_seconds": busy,
        "idle_share": max(0.0, 1 - busy / seconds),
        "kernels": sum(count for _, count in taken.values()),
        "longest": [{"name": key, "seconds": time / 1e6, "count": count} for key, (time, count) in longest],
    }


def filled_but_for(gibibytes: float) -> torch.Tensor:
    """A tensor that leaves so much of the GPU's memory free, so that recordings go to pinned host memory."""
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(max(0, int(free - gibibytes * 2**30)), dtype=torch.uint8, device="cuda")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figures of whole searches, part by part.

    Yields:
        Of the greedy search seconds and what it found, then a profile, then the bound; then of the screened ones the
        same but for the profile, under "screened".
    """
    with precision(options.precision) as dtype:
        model = random_clip(options.shape).to(options.device, dtype)
        size = model.config.vision_config.image_size
        filled = filled_but_for(options.leave_free) if options.leave_free is not None else None
        measured = None if options.no_bound else measured_peak(options.device, dtype)

        def search(way: str, images: int, candidates: int) -> Any:
            objective = RandomImages(images, options.classes, size, options.batch_size)
            objective.prompt_batch_size = options.prompt_batch_size
            settings = {**WAYS[way], "recording_memory": options.recording_memory}
            config = SeTARConfig(candidate_ratios=list(RATIOS[:candidates]), **settings)
            return lambda: search_rank_ratios(model, objective, config, progress=False)

        def whole(way: str) -> dict[str, Any]:
            search(way, min(options.images, options.batch_size), 1)()  # what is set up once
            return found(options, search(way, options.images, options.candidates))

        def bound(way: str, seconds: float) -> dict[str, Any]:
            return bound_of(options, search(way, options.images, options.candidates), seconds, measured)

        greedy = whole("greedy")
        yield greedy
        if options.profile:
            yield {"profile": profiled(options.device, search("greedy", options.images, 1))}
        yield bound("greedy", greedy["seconds"])
        screened: dict[str, Any] = {}
        for way in () if options.no_screened else SCREENED:
            screened[way] = whole(way)
            beside = comparisons({"greedy": greedy, way: screened[way]})[way]
            screened[way] |= beside | bound(way, screened[way]["seconds"])
            yield {"screened": screened}
        del filled


def found(options: argparse.Namespace, search: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of a search, the median of some runs, and what it found."""
    runs = [timed(options.device, search) for _ in range(options.runs)]
    result = runs[0][2]
    return {
        "seconds": statistics.median(run[0] for run in runs),
        "seconds_of_each_run": [run[0] for run in runs],
        "peak_mebibytes_above_model": runs[0][1],
        "same_decisions_in_each_run": all(run[2].rank_ratios == result.rank_ratios for run in runs),
        "rank_ratios": result.rank_ratios,
        "evaluations": evaluations_of(result.trace),
        "initial_loss": result.trace.initial.total,
        "final_loss": result.trace.rows[-1].total_loss,
    }


def bound_of(
    options: argparse.Namespace, search: Callable[[], Any], seconds: float, measured: float | None
) -> dict[str, Any]:
    """The bound of a search that took so many seconds, at the rate that was measured; nothing without one."""
    if measured is None:
        return {}
    with FlopCounterMode(display=False) as counter:
        search()
    sheet, operations = sheet_peak(options.device, options.precision), counter.get_total_flops()
    bound = operations / ((sheet or measured) * 1e12)
    return {
        "operations": operations,
        "data_sheet_tflops": sheet,
        "measured_tflops": measured,
        "bound_seconds": bound,
        "share_of_bound": bound / seconds,
        "share_of_measured_rate": operations / (measured * 1e12) / seconds,
    }


def main() -> None:
    """Search, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, shape="base16", images=1000, classes=1000, batch_size=250, device="cuda")
    parser.add_argument("--prompt-batch-size", type=int, help="prompts encoded at once; by default as suits the device")
    parser.add_argument("--precision", default="bfloat16", choices=PRECISIONS)
    parser.add_argument("--recording-memory", type=float, help="GiB for recordings; by default half of what is free")
    parser.add_argument("--leave-free", type=float, help="fill the GPU's memory but for so many GiB")
    parser.add_argument("--runs", type=int, default=3, help="searches that the median is taken over")
    parser.add_argument("--profile", action="store_true", help="profile one more search, with one candidate")
    parser.add_argument("--no-bound", action="store_true", help="leave out the searches that count operations")
    parser.add_argument("--no-screened", action="store_true", help="leave out the screened searches")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; install a CUDA build of torch, or give --device cpu.")
    if options.device == "cpu" and options.leave_free is not None:
        parser.error("--leave-free fills a GPU's memory; leave it out with --device cpu.")
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    figures: dict[str, Any] = {"settings": settings, "machine": described(options.device)}
    for part in measure(options):
        figures |= part
        if options.json:  # after each part, so that a run which is cut off leaves what it has
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
    name, median = device_name(options.device), f"median of {options.runs}"
    searches = {"greedy": figures, **figures.get("screened", {})}
    taken = "; ".join(f"{way} {_summary(of_search)}" for way, of_search in searches.items())
    print(f"{options.precision:>8} on {name}, {median}: {taken}", flush=True)


def _summary(figures: dict[str, Any]) -> str:
    share = f", {figures['share_of_bound']:.0%} of the bound" if "share_of_bound" in figures else ""
    return f"{figures['seconds']:.2f} s{share}"


if __name__ == "__main__":
    main()

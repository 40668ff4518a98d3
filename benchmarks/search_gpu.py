"""The whole search on a GPU, in bfloat16 and in TF32, and the share it reaches of the bound that its operations set.

The bound is the time of the search's matrix products, as counted while it runs once more, at the GPU's peak rate.

    python benchmarks/search_gpu.py             # CLIP-B/16, 1,000 images, 1,000 classes, 8 candidates, 24 layers
    python benchmarks/search_gpu.py --device cpu --shape tiny --images 16 --classes 10 --precision float32

One file for each precision goes to benchmarks/results/. The authors' search of this size took 24 min 41 s on an
RTX 4090, as their log says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from search_cost import RATIOS, RandomImages, add_size_options, random_clip, synchronize
from torch.utils.flop_counter import FlopCounterMode

from setar_peft import SeTARConfig, search_rank_ratios
from setar_peft.objectives.loss import COMPILE_VARIABLE

# Dense peak rates in TFLOP/s, from NVIDIA's data sheets: bfloat16 with float32 sums, TF32.
PEAKS = {
    "H200": {"bfloat16": 989.0, "tf32": 494.0},
    "H100 PCIe": {"bfloat16": 756.0, "tf32": 378.0},
    "H100": {"bfloat16": 989.0, "tf32": 494.0},
    "A100": {"bfloat16": 312.0, "tf32": 156.0},
    "L40S": {"bfloat16": 362.0, "tf32": 183.0},
    "RTX 4090": {"bfloat16": 165.2, "tf32": 82.6},
}
RESULTS = Path(__file__).parent / "results"


def measured_peak(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of one large matrix product on this device: what is reached where no data sheet is known."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def peak_rate(device: str, precision: str, dtype: torch.dtype) -> tuple[float, str]:
    """TFLOP/s that the device can reach in a precision, and where that figure is from."""
    name = device_name(device)
    for model, rates in PEAKS.items():
        if model in name and precision in rates:
            return rates[precision], f"data sheet of {model}"
    return measured_peak(device, dtype), "one large matrix product, measured"


def device_name(device: str) -> str:
    """The GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


@contextlib.contextmanager
def precision_of(precision: str) -> Iterator[torch.dtype]:
    """The dtype of a precision; for "tf32", float32 whose products may be rounded."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield torch.bfloat16 if precision == "bfloat16" else torch.float32
    finally:
        torch.set_float32_matmul_precision(before)


def measure(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """One whole search: seconds, operations, share of the bound, peak memory, what was found."""
    with precision_of(precision) as dtype:
        model = random_clip(options.shape).to(options.device, dtype)
        size = model.config.vision_config.image_size
        objective = RandomImages(options.images, options.classes, size, options.batch_size)
        objective.prompt_batch_size = options.prompt_batch_size
        config = SeTARConfig(candidate_ratios=list(RATIOS[: options.candidates]))
        warm_up = RandomImages(min(options.images, options.batch_size), options.classes, size, options.batch_size)
        warm_up.prompt_batch_size = options.prompt_batch_size
        search_rank_ratios(model, warm_up, SeTARConfig(candidate_ratios=[0.2]), progress=False)
        memory = 0.0
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            memory = torch.cuda.memory_allocated()
        synchronize(options.device)
        start = time.perf_counter()
        result = search_rank_ratios(model, objective, config, progress=False)
        synchronize(options.device)
        seconds = time.perf_counter() - start
        peak = (torch.cuda.max_memory_allocated() - memory) / 2**20 if options.device == "cuda" else None
        os.environ[COMPILE_VARIABLE] = "0"  # the counter sees operations, not fused kernels
        try:
            with FlopCounterMode(display=False) as counter:
                search_rank_ratios(model, objective, config, progress=False)
        finally:
            del os.environ[COMPILE_VARIABLE]
        rate, source = peak_rate(options.device, precision, dtype)
    operations = counter.get_total_flops()
    bound = operations / (rate * 1e12)
    return {
        "seconds": seconds,
        "operations": operations,
        "peak_tflops": rate,
        "peak_source": source,
        "bound_seconds": bound,
        "share_of_bound": bound / seconds,
        "peak_mebibytes_above_model": peak,
        "rank_ratios": result.rank_ratios,
        "initial_loss": result.trace.initial.total,
        "final_loss": result.trace.rows[-1].total_loss,
    }


def setup(options: argparse.Namespace) -> dict[str, Any]:
    """Hardware and versions."""
    driver = None
    if options.device == "cuda":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return {
        "device": device_name(options.device),
        "driver": driver,
        "cuda": torch.version.cuda if options.device == "cuda" else None,
        "processor_cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def main() -> None:
    """Search in each precision, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, shape="base16", images=1000, classes=1000, batch_size=250, device="cuda")
    parser.add_argument("--prompt-batch-size", type=int, default=1000)
    parser.add_argument("--precision", nargs="+", default=["bfloat16", "tf32"], choices=["bfloat16", "tf32", "float32"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; install a CUDA build of torch, or give --device cpu.")
    machine = setup(options)
    for precision in options.precision:
        figures = measure(options, precision)
        print(
            f"{precision:>8} on {machine['device']}: {figures['seconds']:.1f} s, "
            f"{figures['operations'] / 1e12:.3g} TFLOP, "
            f"{figures['share_of_bound']:.0%} of the bound at {figures['peak_tflops']:.3g} TFLOP/s "
            f"({figures['peak_source']})",
            flush=True,
        )
        options.results.mkdir(parents=True, exist_ok=True)
        file = options.results / f"search_gpu-{machine['device'].replace(' ', '_')}-{precision}.json"
        settings = {name: value for name, value in vars(options).items() if name not in ("results", "precision")}
        file.write_text(json.dumps({"settings": settings, "machine": machine, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()

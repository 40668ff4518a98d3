"""The machine that a benchmark runs on: what it is, and what it reaches."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers


def synchronize(device: str) -> None:
    """Wait for a GPU to finish."""
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """The GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def described(device: str) -> dict[str, Any]:
    """Hardware and versions."""
    driver = memory = None
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return {
        "device": device_name(device),
        "device_gibibytes": memory,
        "driver": driver,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "processor_cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def median_seconds(device: str, work: Callable[[], object], runs: int = 5) -> float:
    """Median time of a piece of work, after one run that warms up."""
    work()
    taken = []
    for _ in range(runs):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measured_peak(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of one large matrix product."""
    size = 8192 if device == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(device, lambda: left @ right) / 1e12


def has_peak_memory() -> bool:
    """Whether the system says what `peak_memory` asks for: Linux does."""
    return Path("/proc/self/clear_refs").exists()


def peak_memory(work: Callable[[], object]) -> float:
    """Peak of this process's memory while it works, above what it was before, in MiB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before = _memory("VmRSS")
    work()
    return _memory("VmHWM") - before


def _memory(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024

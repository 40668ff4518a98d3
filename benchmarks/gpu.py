"""The first run on a GPU, in one command: the tests marked `cuda`, then the GPU benchmarks, in under nine minutes.

    python -m benchmarks.gpu                            # one H100 or H200
    python -m benchmarks.gpu --device cpu --shape tiny  # the same steps on a processor, in a minute or two

Each step is a process of its own with a limit of time. What it found is in benchmarks/results/ as soon as it is over,
so that a run which is cut off leaves what it has; a step that fails or runs out of time is on record with what it said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import described, device_name

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
MINUTES = 8.5
OUTPUT_KEPT = 6000


class Step(NamedTuple):
    """One process.

    Attributes:
        name: What it is called in the results.
        arguments: Of the interpreter.
        seconds: What it may take at most.
        writes: Whether it writes figures to the file that `--json` names.
    """

    name: str
    arguments: list[str]
    seconds: float
    writes: bool = True


def steps(device: str, shape: str) -> Iterator[Step]:
    """What is run, from what tells most to what tells least."""
    tests = ["-m", "pytest", "tests/test_cuda.py", "-m", "cuda", "-q", "-rs", "-o", "filterwarnings=default"]
    yield Step("tests", [*tests, "-p", "no:cacheprovider"], 150, writes=False)
    search = ["-m", "benchmarks.search_gpu", "--device", device, "--shape", shape]
    small = ["--images", "64", "--classes", "20"]
    if shape == "tiny":
        search += ["--images", "6", "--classes", "5", "--candidates", "2", "--batch-size", "3"]
        small = []
    else:
        yield Step("search_tiny", [*search, "--shape", "tiny", *small], 60)
    yield Step("search_bfloat16", [*search, "--precision", "bfloat16", "--profile"], 150)
    yield Step("search_tf32", [*search, "--precision", "tf32"], 150)
    yield Step("decompositions", _decompositions(device, shape), 60)
    once = ["--runs", "1", "--no-bound"]
    # Little memory for recordings: on the device and computed again; with none of it, on disk.
    for name, memory in (("search_1_gib", "1"), ("search_on_disk", "0")):
        yield Step(name, [*search, "--recording-memory", memory, *once], 90)
    once += ["--no-screened"]
    if device == "cuda":  # half of what is free holds most of them; the rest is pinned
        yield Step("search_pinned", [*search, "--leave-free", "6", *once], 60)
    yield Step("search_batches_of_64", [*search, "--batch-size", "64", *once], 60)
    yield Step("search_float32", [*search, "--precision", "float32", *once], 120)
    yield Step("adapter", ["-m", "benchmarks.adapter", "--device", device, *_adapter(shape)], 90)


def _decompositions(device: str, shape: str) -> list[str]:
    return ["-m", "benchmarks.decompositions", "--device", device, *(["--width", "64"] if shape == "tiny" else [])]


def _adapter(shape: str) -> list[str]:
    return ["--blocks", "1", "--rounds", "1"] if shape == "tiny" else []


def run(step: Step, seconds: float, folder: Path, device: str) -> dict[str, Any]:
    """Run a step within a limit of time; what it took, said and found."""
    target = folder / f"{step.name}.json"
    command = [sys.executable, *step.arguments, *(["--json", str(target)] if step.writes else [])]
    environment = {**os.environ, "SETAR_TEST_DEVICE": device, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            cwd=ROOT,
            env=environment,
        )
        output, status = done.stdout, "done" if done.returncode == 0 else f"failed with {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        # On time-out the output is bytes, whatever was asked for.
        output = expired.output.decode(errors="replace") if isinstance(expired.output, bytes) else expired.output or ""
        status = f"out of time after {seconds:.0f} s"
    outcome = {"status": status, "took_seconds": time.perf_counter() - start, "output": output[-OUTPUT_KEPT:]}
    if target.exists():
        outcome["figures"] = json.loads(target.read_text())
        target.unlink()
    return outcome


def main() -> None:
    """Run every step, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="base16", choices=["tiny", "base32", "base16", "large14"])
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps alone")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all steps together")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; install a CUDA build of torch, or give --device cpu.")
    end = time.perf_counter() + 60 * options.minutes
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"gpu-{device_name(options.device).replace(' ', '_')}-{options.shape}.json"
    results: dict[str, Any] = {"machine": described(options.device), "steps": {}}
    for step in steps(options.device, options.shape):
        if options.only and step.name not in options.only:
            continue
        left = end - time.perf_counter()
        outcome = {"status": "no time was left"}
        if left > 5:
            outcome = run(step, min(step.seconds, left), options.results, options.device)
        results["steps"][step.name] = outcome
        file.write_text(json.dumps(results, indent=1) + "\n")
        last = (outcome.get("output") or "").strip().rpartition("\n")[2]
        print(f"{step.name:>20}: {outcome['status']}. {last}", flush=True)
    print(f"Results: {file}")
    if any(outcome["status"] != "done" for outcome in results["steps"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""SeTAR beside PEFT's LoRA, PiSSA and OSF at equal rank: forward, training step, load, save, merge, unmerge, memory.

    python -m benchmarks.adapter [--blocks 2] [--ratio 0.1] [--rounds 5] [--device cpu] [--json FILE]

The model is the vision tower of a CLIP of ViT-B/32's shape with random weights, adapted at W_up (fc1) of each block.
"Equal rank" is the rank r that the ratio removes: LoRA and PiSSA of rank r, OSF with r trainable components. SeTAR+FT
carries r frozen components beside its r trainable ones. Methods take turns in each round, so that a busy machine slows
all of them; a figure is the median of the rounds, and the table gives it as a multiple of LoRA's. Below it stand what
SeTAR is held to: its forward as a multiple of the base's, the training step of SeTAR+FT as one of LoRA's, each as the
median of the rounds' ratios, and the memory of the weights that both need for it (`SeTARLayer.keeps_weight`).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from setar_peft import SeTARConfig, SeTARLayer
from setar_peft.decomposition import residual_rank

WIDTH, FULL = 768, 3072
BASELINE = "LoRA"
FEW, MANY = 8, 16  # images a batch: 400 and 800 tokens
BASE = "base"


def base_model(blocks: int, device: torch.device) -> CLIPVisionModel:
    """A vision tower of ViT-B/32's shape, with random weights."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=FULL, num_hidden_layers=blocks, num_attention_heads=12, patch_size=32
    )
    return CLIPVisionModel(config).to(device).eval()


def configs(ratio: float) -> dict[str, PeftConfig]:
    """The methods at the rank that the ratio removes."""
    rank = residual_rank((FULL, WIDTH), ratio)
    return {
        "SeTAR": SeTARConfig(target_modules=["fc1"], rank_ratios=ratio),
        "SeTAR+FT": SeTARConfig(target_modules=["fc1"], rank_ratios=ratio, finetune=True),
        "LoRA": LoraConfig(target_modules=["fc1"], r=rank, lora_alpha=rank),
        "PiSSA": LoraConfig(target_modules=["fc1"], r=rank, lora_alpha=rank, init_lora_weights="pissa"),
        "OSF": OSFConfig(target_modules=["fc1"], effective_rank=WIDTH - rank),
    }


class Timer:
    """Seconds that an action takes, with the device's work in them."""

    def __init__(self, device: torch.device) -> None:
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __call__(self, action: Callable[[], object]) -> float:
        """Run it once."""
        self._wait()
        start = time.perf_counter()
        action()
        self._wait()
        return time.perf_counter() - start


def measure_base(base: nn.Module, timer: Timer) -> dict[str, float]:
    """The base's forward, without an adapter, in seconds."""
    device = next(base.parameters()).device
    few, many = (torch.randn(count, 3, 224, 224, device=device) for count in (FEW, MANY))
    with torch.no_grad():
        base(few)
        return {f"forward, {len(x)} images": timer(lambda x=x: base(x)) for x in (few, many)}


def measure_round(
    name: str, model: PeftModel, base: nn.Module, saved: Path, timer: Timer, *, load: bool
) -> dict[str, float]:
    """Every step of one method, once, in seconds; a step that the method has not is left out.

    Loading, for which PiSSA and OSF decompose every weight again, is measured where `load` says so.
    """
    device = next(base.parameters()).device
    few, many = (torch.randn(count, 3, 224, 224, device=device) for count in (FEW, MANY))
    seconds = {}
    with torch.no_grad():
        # Saving and merging gave back what a layer keeps, so SeTAR forms it here.
        seconds[f"first forward, {FEW} images"] = timer(lambda: model(few))
        seconds[f"forward, {FEW} images"] = timer(lambda: model(few))
        seconds[f"forward, {MANY} images"] = timer(lambda: model(many))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trainable:
        optimizer = torch.optim.SGD(trainable, lr=0.0)

        def step() -> None:
            optimizer.zero_grad()
            model(few).pooler_output.square().mean().backward()
            optimizer.step()

        seconds[f"training step, {FEW} images"] = timer(step)
    if load:
        decomposes = name in ("PiSSA", "OSF")  # which cannot be made without memory
        for step, low in (("load", False), ("load, low_cpu_mem_usage", True))[: 1 if decomposes else 2]:
            fresh = copy.deepcopy(base)
            seconds[step] = timer(partial(PeftModel.from_pretrained, fresh, saved, low_cpu_mem_usage=low))
    with tempfile.TemporaryDirectory() as folder:
        seconds["save"] = timer(lambda: model.save_pretrained(folder))
    if name != "OSF":  # which forgets the base weight, and refuses to unmerge
        seconds["merge"] = timer(model.merge_adapter)
        seconds["unmerge"] = timer(model.unmerge_adapter)
    return seconds


def measure(
    blocks: int, ratio: float, rounds: int, device: torch.device
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Method -> step -> median seconds, the base among the methods; and what SeTAR is held to."""
    timer, base = Timer(device), base_model(blocks, device)
    models, create = {}, {}
    for name, config in configs(ratio).items():
        fresh = copy.deepcopy(base)
        create[name] = timer(
            lambda fresh=fresh, config=config, name=name: models.update({name: get_peft_model(fresh, config)})
        )
        models[name].eval()
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            model.save_pretrained(f"{folder}/{name}")
        results: dict[str, dict[str, list[float]]] = {name: {} for name in (*models, BASE)}
        for number in range(rounds + 1):
            if number:
                for step, value in measure_base(base, timer).items():
                    results[BASE].setdefault(step, []).append(value)
            for name, model in models.items():
                seconds = measure_round(name, model, base, Path(folder, name), timer, load=number < 4)
                if number:  # the first round warms up
                    for step, value in seconds.items():
                        results[name].setdefault(step, []).append(value)
    medians = {name: {step: statistics.median(all_) for step, all_ in steps.items()} for name, steps in results.items()}
    goals = ratios(results) | {"kept weights, MB": kept_memory(models["SeTAR"]) / 1e6}
    return {
        name: {"create": create[name]} | steps if name in create else steps for name, steps in medians.items()
    }, goals


def ratios(results: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Medians over the rounds of what one method took as a multiple of another in the same round."""
    pairs = [(f"forward, {count} images", "SeTAR", BASE) for count in (FEW, MANY)]
    pairs.append((f"training step, {FEW} images", "SeTAR+FT", BASELINE))
    return {
        f"{step}: {one} / {other}": statistics.median(
            a / b for a, b in zip(results[one][step], results[other][step], strict=True)
        )
        for step, one, other in pairs
    }


def kept_memory(model: nn.Module) -> int:
    """Bytes of the weights that the layers keep beside the base's."""
    layers = [layer for layer in model.modules() if isinstance(layer, SeTARLayer) and layer.keeps_weight]
    return sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)


def loading_memory(saved: Path, blocks: int, *, low_cpu_mem_usage: bool) -> float:
    """Peak of this process's memory while an adapter is loaded, above what it was before, in MB (Linux).

    Pages of the file that are mapped and not copied are counted, though the system can take them back. To be called in
    a process of its own: what others have freed would be used again.
    """
    base = base_model(blocks, torch.device("cpu"))
    for _ in range(2):  # the first time imports modules
        fresh = copy.deepcopy(base)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
        before = _memory("VmRSS")
        PeftModel.from_pretrained(fresh, saved, low_cpu_mem_usage=low_cpu_mem_usage)
        peak = _memory("VmHWM") - before
    return peak


def _memory(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def measure_memory(blocks: int, ratio: float) -> dict[str, dict[str, float]]:
    """Method -> way of loading -> `loading_memory`, in a process of their own; empty where there is no /proc."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed tensors go back to the system
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        for name in ("SeTAR", "SeTAR+FT", "LoRA"):
            saved = Path(folder, name)
            get_peft_model(base_model(blocks, torch.device("cpu")), configs(ratio)[name]).save_pretrained(saved)
            for step, low in (("load", False), ("load, low_cpu_mem_usage", True)):
                run = partial(loading_memory, saved, blocks, low_cpu_mem_usage=low)
                results.setdefault(name, {})[step] = pool.apply(run)
    return results


def bandwidth_share(blocks: int, ratio: float, device: torch.device) -> dict[str, float]:
    """On a GPU: bytes a second that merging reads and writes of weights, beside a plain copy on the same card."""
    timer = Timer(device)
    model = get_peft_model(base_model(blocks, device), configs(ratio)["SeTAR"])
    layers = [layer for layer in model.modules() if isinstance(layer, SeTARLayer)]
    moved = 2 * sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    merges, copies = [], []
    for _ in range(20):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        merges.append(moved / timer(model.merge_adapter))
        peak = torch.cuda.max_memory_allocated() - before
        model.unmerge_adapter()
        copies.append(2 * source.numel() / timer(source.clone))
    merge, copy_ = statistics.median(merges), statistics.median(copies)
    return {
        "merge, GB/s": merge / 1e9,
        "copy, GB/s": copy_ / 1e9,
        "share": merge / copy_,
        "extra memory, layers": peak / (moved / 2 / len(layers)),
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """The baseline's milliseconds, and every other method as a multiple of them."""
    steps = list(dict.fromkeys(step for values in results.values() for step in values))
    lines = [f"{'':<26}{BASELINE + ', ms':>10}" + "".join(f"{name:>10}" for name in results if name != BASELINE)]
    for step in steps:
        reference = results[BASELINE][step]
        cells = [
            f"{values[step] / reference:>9.2f}x" if step in values else f"{'-':>10}"
            for name, values in results.items()
            if name != BASELINE
        ]
        lines.append(f"{step:<26}{reference * 1e3:>10.1f}{''.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the model (ViT-B/32 has 12)")
    parser.add_argument("--ratio", type=float, default=0.1, help="rank ratio, which gives every method its rank")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that the medians are taken over")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(arguments.device)
    rank = residual_rank((FULL, WIDTH), arguments.ratio)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.blocks} blocks of ViT-B/32's shape, rank {rank}, float32, {name}, torch {torch.__version__}\n")
    results, goals = measure(arguments.blocks, arguments.ratio, arguments.rounds, device)
    print(table(results))
    print("\n" + "\n".join(f"{name}: {value:.3f}" for name, value in goals.items()))
    memory = measure_memory(arguments.blocks, arguments.ratio)
    for name, peaks in memory.items():
        print(f"peak memory, {name}: " + "; ".join(f"{step} {peak:.1f} MB" for step, peak in peaks.items()))
    report: dict[str, Any] = {
        "settings": {**vars(arguments), "json": None, "rank": rank},
        "seconds": results,
        "goals": goals,
        "loading_mb": memory,
    }
    if device.type == "cuda":
        report["merge"] = bandwidth_share(arguments.blocks, arguments.ratio, device)
        print("\n" + "\n".join(f"{key}: {value:.2f}" for key, value in report["merge"].items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

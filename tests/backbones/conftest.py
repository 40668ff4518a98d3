from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Models are made with the same random weights each time."""
    torch.manual_seed(0)

"""What is recorded: within the budget, on disk beyond it, and the same in every case."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from setar_peft.backbones import backbone_of
from setar_peft.search.recording import MemoryBudget, Recording

CPU = torch.device("cpu")


def test_a_budget_counts_what_it_keeps() -> None:
    budget = MemoryBudget(CPU, 1000 / 2**30)
    first, second = budget.keep(torch.zeros(100)), budget.keep(torch.ones(150))
    assert first is not None
    assert second is not None
    assert budget.left == pytest.approx(0)
    assert budget.keep(torch.zeros(1)) is None
    budget.give_back(first.size, first.place)
    assert budget.left == pytest.approx(400)
    assert budget.keep(torch.zeros(101)) is None
    assert torch.equal(second.load(CPU), torch.ones(150))


def test_by_default_half_of_the_free_memory_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert MemoryBudget(CPU).left == 500
    assert MemoryBudget(CPU, 1.0).left == 500
    assert MemoryBudget(CPU, 0.0).left == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_goes_to_disk_comes_back_to_the_bit(dtype: torch.dtype) -> None:
    budget = MemoryBudget(CPU, 0.0)
    tensors = [torch.randn(3, 5, 7).to(dtype), torch.randn(2, 4, 6).to(dtype).transpose(1, 2)]
    kept = [budget.keep(tensor, whatever_it_takes=True) for tensor in tensors]
    for _ in range(2):
        for tensor, copy in zip(tensors, kept, strict=True):
            assert copy is not None
            assert copy.place == "disk"
            assert torch.equal(copy.load(CPU), tensor)


def test_a_full_disk_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(OSError, match=r"400 bytes could not be written \(No space left.*recording_memory.*TMPDIR"):
        MemoryBudget(CPU, 0.0).keep(torch.zeros(100), whatever_it_takes=True)


@torch.no_grad()
@pytest.mark.parametrize("room", [0, 1, 2, 3.5, 100])
def test_hidden_states_and_features_are_the_same_with_any_room(
    load_clip: Callable[..., CLIPModel], room: float
) -> None:
    tower = backbone_of(load_clip()).towers["vision"]
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = [{"pixel_values": images[:4]}, {"pixel_values": images[4:]}]
    level_bytes = 6 * 17 * 64 * 4
    whole = MemoryBudget(CPU, room * level_bytes / 2**30)
    before = whole.left
    recording = Recording(tower, batches, CPU, whole)
    states = tower.model.vision_model(images, output_hidden_states=True).hidden_states
    for level in (3, 2, 3, 0, 1, 3):
        for batch, part in enumerate((slice(0, 4), slice(4, 6))):
            torch.testing.assert_close(recording.input_at(batch, level), states[level][part], rtol=1e-5, atol=1e-5)
            assert whole.left >= 0
    expected = [tower.features(batch) for batch in batches]
    for _ in range(2):
        for batch, features in enumerate(expected):
            torch.testing.assert_close(recording.features(batch), features, rtol=1e-5, atol=1e-5)
            assert whole.left >= 0
    recording.forget_above(0)
    assert before - whole.left == pytest.approx(min(level_bytes, before), abs=level_bytes * 2 / 3)
    assert recording._states[0].keys() == {0}


@torch.no_grad()
def test_features_follow_the_weights(load_clip: Callable[..., CLIPModel]) -> None:
    tower = backbone_of(load_clip()).towers["vision"]
    images = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    recording = Recording(tower, [images], CPU, MemoryBudget(CPU))
    before = recording.features(0)[0]
    tower.blocks[2].mlp.fc1.weight.mul_(0.5)
    assert torch.equal(recording.features(0)[0], before)
    recording.forget_above(2)
    torch.testing.assert_close(recording.features(0)[0], tower.features(images)[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(recording.features(0)[0], before)

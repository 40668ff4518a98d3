"""What is recorded: within the budget, on disk beyond it, and the same in every case."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from setar_peft import LoCoOpObjective, search_rank_ratios
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


@pytest.fixture
def gpu_budget(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], MemoryBudget]:
    """A budget of so many bytes beside a GPU that has no room, whose pinned memory is plain here."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (0, 0))
    empty = torch.empty

    def pinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs)

    monkeypatch.setattr("torch.empty", pinned)
    return lambda size: MemoryBudget(torch.device("cuda"), size / 2**30)


def test_pinned_memory_is_counted_as_the_allocator_rounds_it_up(
    gpu_budget: Callable[[float], MemoryBudget],
) -> None:
    budget = gpu_budget(1024 + 512)
    tensor = torch.arange(75.0, dtype=torch.float64)  # 600 bytes take 1024
    first = budget.keep(tensor)
    assert first is not None
    assert (first.place, first.size) == ("cpu", 1024)
    assert torch.equal(first.load(CPU), tensor)
    assert budget.left == pytest.approx(512)
    assert budget.keep(tensor) is None
    exact = budget.keep(tensor[:64])
    assert exact is not None
    assert (exact.size, budget.left) == (512, pytest.approx(0))
    budget.give_back(first.size, first.place)
    assert budget.takes_at_most(300) == pytest.approx(600)
    assert budget.takes_at_most(900) == pytest.approx(1024)


def test_a_refusal_to_pin_is_said_once_and_the_disk_takes_over(
    gpu_budget: Callable[[float], MemoryBudget], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, empty = gpu_budget(2**20), torch.empty

    def refuse(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
        return empty(*args, **kwargs)

    monkeypatch.setattr("torch.empty", refuse)
    with pytest.warns(RuntimeWarning, match=r"pinned \(CUDA error: out of memory\).*recording_memory") as warned:
        assert budget.keep(torch.ones(100)) is None
    kept = budget.keep(torch.ones(100), whatever_it_takes=True)
    assert len(warned) == 1
    assert kept is not None
    assert kept.place == "disk"
    assert torch.equal(kept.load(CPU), torch.ones(100))


@pytest.mark.parametrize(("tower", "fits", "halvings"), [("vision", 6, [24, 12]), ("text", 3, [24, 12, 6])])
def test_out_of_memory_while_recording_halves_the_batch(
    load_clip: Callable[..., CLIPModel],
    clip_objective: Callable[..., LoCoOpObjective],
    monkeypatch: pytest.MonkeyPatch,
    tower: str,
    fits: int,
    halvings: list[int],
) -> None:
    """Images or prompts that do not fit on their way to the first block: the search goes on with fewer at once."""
    expected = search_rank_ratios(load_clip(), clip_objective(), progress=False)
    model = load_clip()
    kind = type(backbone_of(model).towers[tower])
    enter = kind.enter

    def short_of_memory(self: Any, inputs: Any) -> Any:
        if len(next(iter(inputs.values()))) > fits:
            raise torch.OutOfMemoryError("out of memory")
        return enter(self, inputs)

    monkeypatch.setattr(kind, "enter", short_of_memory)
    with pytest.warns(RuntimeWarning, match="Out of memory") as warned:
        found = search_rank_ratios(model, clip_objective(), progress=False)
    assert [str(warning.message).split(" images")[0] for warning in warned] == [
        f"Out of memory with {size}" for size in halvings
    ]
    assert found.rank_ratios == expected.rank_ratios
    assert found.trace.rows[-1].total_loss == pytest.approx(expected.trace.rows[-1].total_loss, abs=1e-6)


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

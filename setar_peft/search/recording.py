"""What is recorded of one tower, within a budget of memory: its blocks' inputs and its features."""

from __future__ import annotations

import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import IO, NamedTuple

import psutil
import torch
from torch import Tensor

from setar_peft.backbones import Tower, TowerInput

_SHARE_OF_FREE_MEMORY = 0.5


class Kept(NamedTuple):
    """A tensor that a `MemoryBudget` keeps.

    Attributes:
        load: `device -> tensor`, as it was.
        place: Where it is: the device's type, "cpu" or "disk".
        size: Bytes that it takes there.
    """

    load: Callable[[torch.device], Tensor]
    place: str
    size: int


class MemoryBudget:
    """Bytes that recordings may take: on the device first, then in pinned host memory.

    A pinned tensor takes what torch's allocator rounds it up to, the next power of two. What has to be kept whatever it
    takes goes to a temporary file once the budget is used up.

    Args:
        device: Where the model computes.
        gibibytes: Bound on all recordings together; by default half of what is free on the device and half of what is
            free on the host.
    """

    def __init__(self, device: torch.device, gibibytes: float | None = None) -> None:
        self._left: dict[str, float] = {}
        self._file: IO[bytes] | None = None
        total = float("inf") if gibibytes is None else gibibytes * 2**30
        on_host = _SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available
        self._pins = device.type == "cuda"
        if self._pins:
            on_device = _SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]
            self._left = {"cuda": min(total, on_device), "cpu": max(0.0, min(total - on_device, on_host))}
        else:  # the CPU, or a device that shares its memory
            self._left = {device.type: min(total, on_host)}

    @property
    def left(self) -> float:
        """Bytes that are still free in the budget."""
        return sum(self._left.values())

    def _take(self, size: int, place: str) -> bool:
        """Count bytes in a place, if there is room for them."""
        if size > self._left.get(place, 0):
            return False
        self._left[place] -= size
        return True

    def give_back(self, size: int, place: str) -> None:
        """Count bytes as free again."""
        if place in self._left:
            self._left[place] += size

    def takes_at_most(self, size: int) -> float:
        """The most bytes that tensors of `size` bytes together take within the budget."""
        first = min(size, next(iter(self._left.values())))
        return min(self.left, first + 2 * (size - first))

    def keep(self, tensor: Tensor, *, whatever_it_takes: bool = False) -> Kept | None:
        """Keep a tensor where the budget has room for it.

        Args:
            tensor: A tensor on the model's device.
            whatever_it_takes: Keep it on disk where there is no room.

        Returns:
            The tensor as it is kept, or None if there is no room.

        Raises:
            OSError: If it has to go to the disk and that is full.
        """
        size = tensor.numel() * tensor.element_size()
        for place in self._left:
            pinned = self._pins and place == "cpu"
            taken = _next_power_of_two(size) if pinned else size
            if self._take(taken, place):
                held = self._pinned(tensor) if pinned else tensor
                if held is not None:
                    return Kept(partial(held.to, non_blocking=True), place, taken)
        return self._on_disk(tensor, size) if whatever_it_takes else None

    def _pinned(self, tensor: Tensor) -> Tensor | None:
        """A copy in pinned memory; None if the system has no more of that, whatever the budget says."""
        try:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError as error:  # what CUDA raises here is no OutOfMemoryError
            self._left["cpu"] = 0.0
            warnings.warn(
                f"No more host memory can be pinned ({str(error).splitlines()[0]}); what does not fit on the device is "
                "computed again, and what stands for the images goes to a temporary file. A smaller recording_memory "
                "avoids the attempt.",
                RuntimeWarning,
                stacklevel=3,
            )
            return None
        return held.copy_(tensor)

    def _on_disk(self, tensor: Tensor, size: int) -> Kept:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="setar_peft-")  # noqa: SIM115 - gone with the budget
            weakref.finalize(self, self._file.close)
        file, shape, dtype = self._file, tensor.shape, tensor.dtype
        start = file.seek(0, os.SEEK_END)
        try:
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"Recordings beyond recording_memory go to {tempfile.gettempdir()}, where {size} bytes could not be "
                f"written ({error.strerror}). Raise recording_memory, or set TMPDIR to a folder with room.",
            ) from error

        def load(device: torch.device) -> Tensor:
            content = torch.empty(size, dtype=torch.uint8)
            file.seek(start)
            file.readinto(content.numpy())  # type: ignore[attr-defined] # a binary file has it
            return content.view(dtype).view(shape).to(device)

        return Kept(load, "disk", size)


def _next_power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


class Recording:
    """What is recorded of a tower, batch by batch: inputs of its blocks, and the features that it ends in.

    Level 0, what enters the first block, is always kept, on disk if need be: it stands for the images, which are
    decoded once. Of the levels above, as many are kept as the budget allows, from the one asked for downwards, since
    the default search walks from the top down; the others are computed again from the nearest kept level below. So are
    the features where there is no room for them.

    Args:
        tower: The tower.
        batches: Its inputs.
        device: Where the model computes.
        budget: Room for all of it.
    """

    def __init__(
        self,
        tower: Tower,
        batches: Iterable[Mapping[str, Tensor]],
        device: torch.device,
        budget: MemoryBudget,
    ) -> None:
        self.tower = tower
        self._device = device
        self._budget = budget
        self._entries: list[TowerInput] = []
        # One dictionary a batch: level -> hidden state.
        self._states: list[dict[int, Kept]] = []
        self._features: dict[int, list[Kept]] = {}
        nothing = torch.empty(0, device=device)
        for inputs in batches:
            entry = tower.enter({key: value.to(device) for key, value in inputs.items()})
            kept = budget.keep(entry.hidden, whatever_it_takes=True)
            assert kept is not None
            entry.hidden = nothing
            self._entries.append(entry)
            self._states.append({0: kept})
        size = sum(kept.size for states in self._states for kept in states.values())
        # Levels above 0 that every batch may keep, so that no batch lives at another's expense; and as much again is
        # left for the features, unless there is room for everything.
        top = len(tower.blocks) - 1
        room = int(budget.left // max(1, size))
        self._capacity = top if room > top else max(0, room - 1)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def largest_batch(self) -> int:
        """Images or prompts in the largest batch, at least 1."""
        return max((entry.rows for entry in self._entries), default=1)

    def entry(self, batch: int) -> TowerInput:
        """What the tower was entered with, apart from the hidden states, which `input_at(batch, 0)` gives."""
        return self._entries[batch]

    def input_at(self, batch: int, level: int) -> Tensor:
        """Input of block `level` for a batch, on the device."""
        states = self._states[batch]
        start = max(known for known in states if known <= level)
        hidden = states[start].load(self._device)
        for below in range(start, level):
            hidden = self.tower.step(self._entries[batch], below, hidden)
            self._keep(batch, below + 1, level, hidden)
        return hidden

    def features(self, batch: int) -> tuple[Tensor, ...]:
        """The tower's features of a batch (see `Tower.finish`)."""
        if batch in self._features:
            return tuple(kept.load(self._device) for kept in self._features[batch])
        features = self.tower.finish(self._entries[batch], self.input_at(batch, len(self.tower.blocks) - 1))
        kept = [self._budget.keep(feature) for feature in features]
        there = [feature for feature in kept if feature is not None]
        if len(there) == len(kept):
            self._features[batch] = there
        else:
            self._release(there)
        return features

    def forget_above(self, level: int) -> None:
        """Drop what depends on the weights of block `level`: the inputs of all blocks above it, and the features."""
        for states in self._states:
            self._release(states.pop(known) for known in [known for known in states if known > level])
        for features in self._features.values():
            self._release(features)
        self._features.clear()

    def _keep(self, batch: int, level: int, wanted: int, hidden: Tensor) -> None:
        states = self._states[batch]
        if len(states) > self._capacity:
            spare = [known for known in states if known > wanted] or [known for known in states if 0 < known < level]
            if not spare:
                return
            self._release([states.pop(min(spare))])
        kept = self._budget.keep(hidden)
        if kept is not None:
            states[level] = kept

    def _release(self, kept: Iterable[Kept]) -> None:
        for one in kept:
            self._budget.give_back(one.size, one.place)

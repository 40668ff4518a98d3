"""Recorded hidden states of one tower, within a budget of memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import psutil
import torch
from torch import Tensor

from setar_peft.backbones import Tower, TowerInput

_SHARE_OF_FREE_MEMORY = 0.5


class MemoryBudget:
    """Bytes that recordings may take: on the device first, then in pinned host memory.

    Args:
        device: Where the model computes.
        gibibytes: Bound on all recordings together; by default half of what is free on the device and half of what is
            free on the host.
    """

    def __init__(self, device: torch.device, gibibytes: float | None = None) -> None:
        self._left: dict[str, float] = {}
        total = float("inf") if gibibytes is None else gibibytes * 2**30
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            self._left[device.type] = min(total, _SHARE_OF_FREE_MEMORY * free)
            total -= self._left[device.type]
        self._left["cpu"] = max(0.0, min(total, _SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available))

    @property
    def left(self) -> float:
        """Bytes that are still free in the budget."""
        return sum(self._left.values())

    def place(self, tensor: Tensor, *, whatever_it_takes: bool = False) -> Tensor | None:
        """Keep a tensor where the budget has room for it: as it is, or as a copy on the host.

        Args:
            tensor: A hidden state on the model's device.
            whatever_it_takes: Keep it on the host even where there is no room.

        Returns:
            The tensor to keep, or None if there is no room.
        """
        size = tensor.numel() * tensor.element_size()
        for place, left in self._left.items():
            if size <= left or (whatever_it_takes and place == "cpu"):
                self._left[place] -= size
                if place == tensor.device.type:
                    return tensor
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        return None

    def release(self, tensor: Tensor) -> None:
        """Give the bytes of a kept tensor back."""
        self._left[tensor.device.type] += tensor.numel() * tensor.element_size()


class Recording:
    """Inputs of a tower's blocks, batch by batch.

    Level 0, what enters the first block, is always kept: it stands for the images, which are decoded once. Of the
    levels above, as many are kept as the budget allows, from the one asked for downwards, since the default search
    walks from the top down; the others are computed again from the nearest kept level below.

    Args:
        tower: The tower.
        batches: Its inputs.
        device: Where the model computes.
        budget: Room for the hidden states.
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
        self._states: list[dict[int, Tensor]] = []
        for inputs in batches:
            entry = tower.enter({key: value.to(device) for key, value in inputs.items()})
            kept = budget.place(entry.hidden, whatever_it_takes=True)
            assert kept is not None
            entry.hidden = kept
            self._entries.append(entry)
            self._states.append({0: kept})
        size = sum(state.numel() * state.element_size() for states in self._states for state in states.values())
        # Levels above 0 that every batch may keep, so that no batch lives at another's expense.
        self._capacity = min(len(tower.blocks) - 1, max(0, int(budget.left // max(1, size))))

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, batch: int) -> TowerInput:
        """What the tower was entered with."""
        return self._entries[batch]

    def input_at(self, batch: int, level: int) -> Tensor:
        """Input of block `level` for a batch, on the device."""
        states = self._states[batch]
        start = max(known for known in states if known <= level)
        hidden = states[start].to(self._device, non_blocking=True)
        for below in range(start, level):
            hidden = self.tower.step(self._entries[batch], below, hidden)
            self._keep(batch, below + 1, level, hidden)
        return hidden

    def forget_above(self, level: int) -> None:
        """Drop what depends on the weights of block `level`: the inputs of all blocks above it."""
        for states in self._states:
            for known in [known for known in states if known > level]:
                self._budget.release(states.pop(known))

    def _keep(self, batch: int, level: int, wanted: int, hidden: Tensor) -> None:
        states = self._states[batch]
        if len(states) > self._capacity:
            spare = [known for known in states if known > wanted] or [known for known in states if 0 < known < level]
            if not spare:
                return
            self._budget.release(states.pop(min(spare)))
        kept = self._budget.place(hidden)
        if kept is not None:
            states[level] = kept

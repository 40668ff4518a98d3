"""Several processes under `accelerate launch` or torchrun: each holds a shard, all take the same decisions."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor


class Processes:
    """The processes that take part in a search; one where nothing was launched.

    Args:
        device: Where the model computes.

    Attributes:
        index: Number of this process.
        count: Number of processes.
    """

    def __init__(self, device: torch.device) -> None:
        launched = torch.distributed.is_available() and (
            torch.distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1
        )
        self._state = PartialState(cpu=device.type == "cpu") if launched else None
        self.index: int = self._state.process_index if self._state else 0
        self.count: int = self._state.num_processes if self._state else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.index == 0

    def total(self, sums: Tensor) -> Tensor:
        """The sum of a tensor over the processes, the same bits on each."""
        if self.count == 1:
            return sums
        return broadcast(reduce(sums, reduction="sum"))

    def gathered(self, value: Any) -> list[Any]:
        """One value of each process, in their order."""
        return gather_object([value]) if self.count > 1 else [value]

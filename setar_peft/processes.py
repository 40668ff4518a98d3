"""Several processes under `accelerate launch` or torchrun: each holds a shard, all take the same decisions."""

from __future__ import annotations

import atexit
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
        alone: Whether this process works by itself, whatever was launched.

    Attributes:
        index: Number of this process.
        count: Number of processes.

    Raises:
        ValueError: If that is another process's GPU.
    """

    def __init__(self, device: torch.device, *, alone: bool = False) -> None:
        self._state = _joined(cpu=device.type == "cpu") if _are_several() and not alone else None
        self.index: int = self._state.process_index if self._state else 0
        self.count: int = self._state.num_processes if self._state else 1
        own = self._state.device if self._state else device
        if device.type == own.type == "cuda" and device != own:
            raise ValueError(
                f"The model of process {self.index} of {self.count} is on {device}, but {own} is this process's own "
                "GPU. Move the model to accelerate.PartialState().device before the search."
            )

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.index == 0

    def total(self, sums: Tensor) -> Tensor:
        """The sum of a tensor over the processes, the same bits on each.

        Raises:
            OutOfMemoryElsewhere: If another process ran out of memory on the way here.
        """
        if self.count == 1:
            return sums
        self._meet(out_of_memory=False)
        return broadcast(reduce(sums, reduction="sum"))

    def gathered(self, value: Any) -> list[Any]:
        """One value of each process, in their order.

        Raises:
            OutOfMemoryElsewhere: If another process ran out of memory on the way here.
        """
        if self.count == 1:
            return [value]
        self._meet(out_of_memory=False)
        return gather_object([value])

    def tell_out_of_memory(self) -> None:
        """Let the others know that this process ran out of memory: they learn it where they wait for its part."""
        if self.count > 1:
            self._meet(out_of_memory=True)

    def _meet(self, *, out_of_memory: bool) -> None:
        assert self._state is not None
        failed = reduce(torch.tensor(float(out_of_memory), device=self._state.device), reduction="sum")
        if failed and not out_of_memory:
            raise OutOfMemoryElsewhere("Another process ran out of memory.")


def own_device(name: str | None) -> str | None:
    """The device of that name; of several processes, the GPU that is this one's own unless another device is named.

    Args:
        name: "cuda" is any GPU; None is a GPU if there is one.
    """
    if _are_several() and (name == "cuda" or (name is None and torch.cuda.is_available())):
        return str(_joined(cpu=False).device)
    return name


def _joined(*, cpu: bool) -> PartialState:
    """This process as one of the group, which it leaves again at its end if it was not in it before."""
    was_in = torch.distributed.is_initialized()
    state = PartialState(cpu=cpu)
    if not was_in and torch.distributed.is_initialized():
        # A process that ends while it is in a group can be killed by the group's own threads.
        atexit.register(state.destroy_process_group)
    return state


def _are_several() -> bool:
    return torch.distributed.is_available() and (
        torch.distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1
    )


class OutOfMemoryElsewhere(torch.OutOfMemoryError):
    """Another process ran out of memory, so that this one cannot go on alone."""

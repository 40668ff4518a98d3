"""A progress bar on standard error, where that is a terminal."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from setar_peft.data.inputs import InputBatch, Inputs

_T = TypeVar("_T")


def shown(items: Iterable[_T], total: int, doing: str) -> Iterator[_T]:
    """The items, with a bar that each moves on.

    Args:
        items: The items.
        total: How many there will be.
        doing: What is being done with them.
    """
    console = Console(stderr=True)
    return iter(track(items, doing, total, console=console, transient=True, disable=not console.is_terminal))


def watched(inputs: Inputs, doing: str) -> Inputs:
    """The same inputs, with a bar whenever they, or a part of them, are read.

    Args:
        inputs: The inputs.
        doing: What is being done with them.
    """
    kind: Any = type(inputs)

    class Watched(kind):
        def readable_batches(self) -> Generator[InputBatch, None, None]:
            with closing(super().readable_batches()) as batches:
                yield from shown(batches, math.ceil(len(self) / self.batch_size), doing)

    part = copy.copy(inputs)
    part.__class__ = Watched
    return part

"""What a search shows while it runs: the layer, the candidate, the best loss so far, and the time that is left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from setar_peft.backbones import Location


class SearchProgress:
    """A progress bar on standard error; a line a layer where that is a log file and no terminal; or nothing.

    Args:
        total: The whole search's work, in units of block passes.
        shown: Whether to show anything.
    """

    def __init__(self, total: float, *, shown: bool) -> None:
        self._done, self._total = 0.0, total
        self._loss = ""
        self._started = time.monotonic()
        console = Console(stderr=True)
        self._logs = shown and not console.is_terminal
        self._bar = Progress(
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or self._logs,
        )
        self._task = self._bar.add_task("recording the towers", total=total)

    def __enter__(self) -> SearchProgress:  # noqa: PYI034 - typing.Self is younger than Python 3.10
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def candidate(self, layer: Location, ratio: float, share: float, work: float) -> None:
        """Show a candidate.

        Args:
            layer: Where the layer sits.
            ratio: The candidate's ratio.
            share: Share of the layer's work that is done, 0 to 1.
            work: The layer's work, in units of block passes.
        """
        description = f"{layer.tower} {layer.level} {layer.weight_type}  ratio {ratio:.2f}  best {self._loss}"
        self._bar.update(self._task, completed=self._done + share * work, description=description)

    def decided(self, layer: Location, work: float, loss: float) -> None:
        """Count a layer as done.

        Args:
            layer: Where the layer sits.
            work: The layer's work, in units of block passes.
            loss: The best loss so far.
        """
        self._done += work
        self.best(loss)
        self._bar.update(self._task, completed=self._done)
        if self._logs:
            passed = time.monotonic() - self._started
            left = passed * (self._total - self._done) / self._done
            print(
                f"SeTAR search {self._done / self._total:4.0%}  {layer.tower} {layer.level} {layer.weight_type}  "
                f"best loss {self._loss}  {passed:.0f} s passed, about {max(0.0, left):.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def best(self, loss: float) -> None:
        """Set the best loss so far."""
        self._loss = f"{loss:.6f}"

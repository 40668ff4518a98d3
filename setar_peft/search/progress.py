"""What a search shows while it runs: the layer, the candidate, the best loss so far, and the time that is left."""

from __future__ import annotations

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
    """A progress bar on standard error, or nothing.

    Args:
        total: The whole search's work, in units of block passes.
        shown: Whether to show anything.
    """

    def __init__(self, total: float, *, shown: bool) -> None:
        self._done = 0.0
        self._loss = ""
        self._bar = Progress(
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
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

    def decided(self, work: float, loss: float) -> None:
        """Count a layer as done.

        Args:
            work: The layer's work, in units of block passes.
            loss: The best loss so far.
        """
        self._done += work
        self.best(loss)
        self._bar.update(self._task, completed=self._done)

    def best(self, loss: float) -> None:
        """Set the best loss so far."""
        self._loss = f"{loss:.6f}"

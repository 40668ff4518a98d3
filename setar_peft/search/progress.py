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
            TextColumn("SeTAR search"),
            BarColumn(bar_width=24),
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

    def candidate(self, layer: str, ratio: float, done: float) -> None:
        """Show a candidate.

        Args:
            layer: Name of the layer.
            ratio: The candidate's ratio.
            done: Work done in the present layer, in units of block passes.
        """
        description = f"{layer}  ratio {ratio:.2f}  best loss {self._loss}"
        self._bar.update(self._task, completed=self._done + done, description=description)

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

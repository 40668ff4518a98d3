"""What a search shows while it runs: the layer, the candidate, the best loss so far, and the time that is left."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from setar_peft.backbones import Location


class SearchProgress:
    """A progress bar on standard error; a line a layer where that is a log file and no terminal; or nothing.

    The time that is left is predicted from what the loss of the base took (see `begin`), corrected for each tower by
    what its layers took so far; a tower that was not visited yet is taken to be off as the others were.

    Args:
        shown: Whether to show anything.
    """

    def __init__(self, *, shown: bool) -> None:
        self._left: dict[str, float] = {}
        self._total = 0.0
        # Of the layers that were evaluated: what was predicted, and what they took; both in seconds by tower.
        self._predicted: defaultdict[str, float] = defaultdict(float)
        self._taken: defaultdict[str, float] = defaultdict(float)
        self._best = math.inf
        self._started = self._since = time.monotonic()
        console = Console(stderr=True)
        self._logs = shown and not console.is_terminal
        self._bar = Progress(
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not shown or self._logs,
        )
        self._task = self._bar.add_task("recording the towers", total=None, left="")

    def __enter__(self) -> SearchProgress:  # noqa: PYI034 - typing.Self is younger than Python 3.10
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, work: Mapping[str, float], loss: float) -> None:
        """Begin to count.

        Args:
            work: Seconds that the whole search will take by tower, as predicted.
            loss: What is minimised, of the base.
        """
        self._left = dict(work)
        self._total = sum(work.values())
        self._since = time.monotonic()
        self._best = loss
        self._bar.update(self._task, total=self._total)

    def expect(self, work: Mapping[str, float]) -> None:
        """Count with other work from here on than `begin` was told.

        Args:
            work: Seconds that the rest of the search will take by tower, as predicted.
        """
        self._total += sum(work.values()) - sum(self._left.values())
        self._left = dict(work)

    def candidate(self, layer: Location, ratio: float, share: float, seconds: float) -> None:
        """Show a candidate.

        Args:
            layer: Where the layer sits.
            ratio: The candidate's ratio.
            share: Share of the layer's work that is done, 0 to 1.
            seconds: Seconds that the layer was predicted to take.
        """
        description = f"{layer.tower} {layer.level} {layer.weight_type}  ratio {ratio:.2f}  best {self._best:.6f}"
        left = self._seconds_left(layer.tower, share * seconds, time.monotonic() - self._since)
        self._bar.update(
            self._task,
            completed=self._total - sum(self._left.values()) + share * seconds,
            description=description,
            left=f"about {timedelta(seconds=round(left))} left",
        )

    def decided(self, layer: Location, seconds: float, loss: float, *, evaluated: bool) -> None:
        """Count a layer's candidates as done.

        Args:
            layer: Where the layer sits.
            seconds: Seconds that they were predicted to take.
            loss: The best value of what is minimised, of these candidates and those decided.
            evaluated: Whether they were evaluated, and not read from a trace.
        """
        self._best = min(self._best, loss)
        self._done(layer.tower, seconds, f"{layer.tower} {layer.level} {layer.weight_type}", evaluated=evaluated)

    def decided_together(self, seconds: float, changes: int, loss: float, *, evaluated: bool) -> None:
        """Count an evaluation of several changes at once as done; the rest as for `decided`."""
        self._best = min(self._best, loss)
        self._done("all", seconds, f"{changes} change{'s at once' if changes > 1 else ''}", evaluated=evaluated)

    def predicting(self) -> None:
        """Show that a gradient is being computed."""
        self._bar.update(self._task, description=f"gradients  best {self._best:.6f}")

    def predicted(self, seconds: float, *, evaluated: bool) -> None:
        """Count a gradient, and what it predicts, as done; the arguments as for `decided`."""
        self._done("gradients", seconds, "gradients", evaluated=evaluated)

    def _done(self, kind: str, seconds: float, what: str, *, evaluated: bool) -> None:
        now = time.monotonic()
        if evaluated:
            self._predicted[kind] += seconds
            self._taken[kind] += now - self._since
        self._since = now
        # A search whose rounds are not known beforehand may take more of them than was thought.
        left = self._left.get(kind, 0.0)
        self._total += max(0.0, seconds - left)
        self._left[kind] = max(0.0, left - seconds)
        done = self._total - sum(self._left.values())
        self._bar.update(self._task, completed=done, total=self._total)
        if self._logs:
            print(
                f"SeTAR search {done / self._total:4.0%}  {what}  best loss {self._best:.6f}  "
                f"{now - self._started:.0f} s passed, about {self._seconds_left():.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def _seconds_left(self, tower: str = "", predicted: float = 0.0, taken: float = 0.0) -> float:
        """Seconds to the end; of the layer at hand, in `tower`, the given seconds are done and were taken."""
        of_all = sum(self._predicted.values()) + predicted
        usual = (sum(self._taken.values()) + taken) / of_all if of_all else 1.0
        left = 0.0
        for name, seconds in self._left.items():
            here = (predicted, taken) if name == tower else (0.0, 0.0)
            known = self._predicted[name] + here[0]
            left += max(0.0, seconds - here[0]) * ((self._taken[name] + here[1]) / known if known else usual)
        return left

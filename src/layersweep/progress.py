"""Progress: a bar with ETA on a terminal, a plain line every 30 s otherwise. Never on stdout.

A notebook has its own (notebook.py).
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from layersweep.notebook import in_notebook_shell
from layersweep.units import format_seconds

PLAIN_EVERY_S = 30.0


class SweepProgress:
    """Call it as `progress(phase, done, total)`; use it as a context manager.

    `shown`: False in a process beside others of its host, which is as far as they are.
    """

    def __init__(self, console: Console, *, shown: bool = True) -> None:
        self.console, self.shown = console, shown
        self._live = shown and console.is_terminal and not in_notebook_shell()
        self._bars = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._said = time.monotonic()

    def __enter__(self) -> SweepProgress:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if not self.shown:
            return
        if self._live:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=total)
            self._bars.update(self._tasks[phase], completed=done)
            return
        now = time.monotonic()
        if done == 1 or phase not in self._started:
            self._started[phase] = now
        if now - self._said < PLAIN_EVERY_S:
            return
        self._said = now
        spent = now - self._started[phase]
        left = format_seconds(spent / max(1, done) * (total - done))
        self.console.print(f"{phase} {done}/{total}, about {left} left", highlight=False)

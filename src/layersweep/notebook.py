"""Notebooks: lines that must be seen, and progress, one output per evaluation, redrawn in place.

rich draws live bars in a notebook only with ipywidgets, which leave nothing in a saved file. An
updated display needs no more than the kernel that is there, in Jupyter, Colab and Kaggle alike, and
its last state, finished bars, is what the saved notebook holds.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from dataclasses import dataclass
from html import escape
from types import TracebackType
from typing import Any

from layersweep.errors import Fallback, LayersweepWarning
from layersweep.units import format_seconds

REDRAWN_EVERY_S = 0.25  # each drawing is a message to the browser, over a network in Colab
CELLS = 32  # of a bar that is text


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this. IPython is looked for, never imported."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


def in_notebook_shell() -> bool:
    """Whether a cell's `!command` runs this: on a terminal, and with FORCE_COLOR, but what shows
    it knows no cursor, so that a live bar would be written again below itself."""
    return "JPY_PARENT_PID" in os.environ and not in_notebook()


def tell(line: str) -> None:
    """Say a line to who calls from Python: in the cell's output, or as a warning where there is
    none, at the line outside layersweep that led here."""
    if in_notebook():
        sys.modules["IPython"].display.display({"text/plain": line}, raw=True)
        return
    depth, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "layersweep":
        depth, frame = depth + 1, frame.f_back
    warnings.warn(line, LayersweepWarning, stacklevel=depth)


def tell_fallback(fallback: Fallback) -> None:
    """A fallback, in the words of the command line."""
    tell(f"fallback: {fallback}")


@dataclass
class Bar:
    """One phase: `done` of `total` steps after `spent` seconds. `stopped`: it will not go on."""

    phase: str
    total: int
    started: float
    done: int = 0
    spent: float = 0.0
    stopped: bool = False

    def step(self, done: int, total: int, since: float, now: float) -> None:
        """Take over a report; `since`: when the last one came, of any phase."""
        if done < self.done:  # the next sweep of several
            self.started = since
        self.done, self.total, self.spent = done, total, now - self.started

    @property
    def words(self) -> str:
        """How far, and how long: "12/33, 4.1 s, about 7.2 s left"."""
        so_far = f"{self.done}/{self.total}, {format_seconds(self.spent)}"
        if self.done >= self.total:
            return so_far
        if self.stopped:
            return f"{so_far}, stopped"
        if not self.done:
            return so_far
        return f"{so_far}, about {format_seconds(self.spent / self.done * self._left)} left"

    @property
    def _left(self) -> int:
        return self.total - self.done

    @property
    def filled(self) -> int:
        return CELLS * self.done // max(1, self.total)


class Bars:
    """What is displayed. Frontends take the HTML; consoles and text exports the text."""

    def __init__(self) -> None:
        self.by_phase: dict[str, Bar] = {}

    def __repr__(self) -> str:
        return "\n".join(
            f"{bar.phase:<8} {'#' * bar.filled}{'.' * (CELLS - bar.filled)} {bar.words}"
            for bar in self.by_phase.values()
        )

    def _repr_html_(self) -> str:
        cell = 'style="text-align: left; padding: 0 1em 0 0; border: none; white-space: nowrap"'
        lines = "".join(
            f'<tr style="background: none"><td {cell}>{escape(bar.phase)}</td>'
            f'<td {cell}><progress value="{bar.done}" max="{max(1, bar.total)}" '
            f'style="width: 18em; vertical-align: middle"></progress></td>'
            f"<td {cell}>{escape(bar.words)}</td></tr>"
            for bar in self.by_phase.values()
        )
        place = "margin: 0.3em 0 0.3em 0.6em; border: none"
        return f'<table style="{place}"><tbody>{lines}</tbody></table>'


class NotebookProgress:
    """Call it as `progress(phase, done, total)`; use it as a context manager."""

    def __init__(self) -> None:
        self._bars = Bars()
        self._handle: Any = None
        self._drawn = 0.0
        self._last = time.monotonic()

    def __enter__(self) -> NotebookProgress:
        self._last = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for bar in self._bars.by_phase.values():
            bar.stopped = failure is not None
        if self._handle is not None:
            self._draw(time.monotonic())

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        bars = self._bars.by_phase
        bars.setdefault(phase, Bar(phase, total, self._last)).step(done, total, self._last, now)
        self._last = now
        if now - self._drawn >= REDRAWN_EVERY_S:
            self._draw(now)

    def _draw(self, now: float) -> None:
        self._drawn = now
        if self._handle is None:
            self._handle = sys.modules["IPython"].display.display(self._bars, display_id=True)
        else:
            self._handle.update(self._bars)

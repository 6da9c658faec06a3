"""Where a sweep's time goes, by the clock of the device that computes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layersweep.stream.events import mark, seconds_between

Moment = torch.cuda.Event | float  # an event of a GPU, the wall clock's seconds


class PhaseClock:
    """Times named phases: with events on the compute stream of a GPU, which costs no
    synchronization, with the wall clock on the CPU. Inside of another phase, which stands still
    meanwhile, a phase has its time for itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[str] = []
        self._since: Moment = 0.0
        self._spans: list[tuple[str, Moment, Moment]] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        yield  # what fails is not timed: a device that fails takes no more marks
        self._switch()
        self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds per phase so far; waits for the device."""
        if self._spans and self._device.type != "cpu":
            torch.cuda.synchronize(self._device)
        for name, start, stop in self._spans:
            self._seconds[name] = self._seconds.get(name, 0.0) + _between(start, stop)
        self._spans.clear()
        return dict(self._seconds)

    def _switch(self) -> None:
        """What was measured so far ends here, and something else begins."""
        now = time.perf_counter() if self._device.type == "cpu" else mark(self._device)
        if self._open:
            self._spans.append((self._open[-1], self._since, now))
        self._since = now


def _between(start: Moment, stop: Moment) -> float:
    if isinstance(start, float) or isinstance(stop, float):
        assert isinstance(start, float) and isinstance(stop, float)
        return stop - start
    return seconds_between([(start, stop)])

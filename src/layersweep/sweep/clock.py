"""Where a sweep's time goes, by the clock of the device that computes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layersweep.stream.events import mark, seconds_between


class PhaseClock:
    """Times named phases: with events on the compute stream of a GPU, which costs no
    synchronization, with the wall clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._device.type == "cpu":
            begun = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - begun)
            return
        start = mark(self._device)
        yield
        self._events.append((name, start, mark(self._device)))

    def seconds(self) -> dict[str, float]:
        """Seconds per phase so far; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for name, start, stop in self._events:
            self._add(name, seconds_between([(start, stop)]))
        self._events.clear()
        return dict(self._seconds)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

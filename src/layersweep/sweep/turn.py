"""Whose thread launches, where several walk the layers at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class HostTurn:
    """Held by a thread while it launches, and left while it waits for a device or for weights.

    Each step of torch lets go of the interpreter for a moment. With two threads in it, each step
    would hand it over, which costs more than the step: they would be slower than one.
    `held_s`: seconds that it was held, which is what launching takes the host.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._since = self.held_s = 0.0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._since = time.perf_counter()

    def __exit__(self, *failure: object) -> None:
        self.held_s += time.perf_counter() - self._since
        self._lock.release()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let others have the turn, and take it back."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

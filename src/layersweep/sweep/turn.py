"""Whose thread launches, where several walk the layers at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class HostTurn:
    """Held by a thread while it launches, and left while it waits for a device or for weights.

    Each step of torch lets go of the interpreter for a moment. With two threads in it, each step
    would hand it over, which costs more than the step: they would be slower than one.
    """

    def __init__(self) -> None:
        self._lock = Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *failure: object) -> None:
        self._lock.release()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let others have the turn, and take it back."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

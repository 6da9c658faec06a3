"""Byte ranges of a circular buffer, first in, first out. Arithmetic alone: no memory, no locks."""

from __future__ import annotations

from collections import deque


class ByteRing:
    """Hands out contiguous ranges of `capacity` bytes; the oldest is always freed first.

    A range that does not fit before the end starts at 0, and the bytes before the end are lost
    until it is freed.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: deque[tuple[int, int]] = deque()  # (first, past the last), oldest first

    def take(self, nbytes: int) -> int | None:
        """First byte of a free range of `nbytes` > 0, or None while there is none."""
        start = self._place(nbytes)
        if start is not None:
            self._taken.append((start, start + nbytes))
        return start

    def free(self) -> None:
        """Give the oldest range back."""
        self._taken.popleft()

    def clear(self) -> None:
        self._taken.clear()

    @property
    def used(self) -> int:
        return sum(stop - start for start, stop in self._taken)

    def __len__(self) -> int:
        return len(self._taken)

    def _place(self, nbytes: int) -> int | None:
        if not self._taken:
            return 0 if nbytes <= self.capacity else None
        oldest, (newest, end) = self._taken[0][0], self._taken[-1]
        if newest < oldest:  # wrapped: the free range lies between the newest and the oldest
            return end if end + nbytes <= oldest else None
        if end + nbytes <= self.capacity:
            return end
        return 0 if nbytes <= oldest else None

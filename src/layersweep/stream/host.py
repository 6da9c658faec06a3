"""The host half of the store: runs in host memory, in sweep order, read ahead.

feeder thread:  waits for ring bytes, hands the reading to a pool
pool:           file -> ring            (or -> memory of its own, for runs that are kept)
caller:         take() -> the next run's bytes;  release(event) -> the oldest's are free again
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from layersweep.errors import Fallback
from layersweep.stream.pinned import HostBuffer, pinned_ring
from layersweep.stream.reader import PIECE_BYTES, RunReader, Task
from layersweep.stream.ring import ByteRing
from layersweep.stream.runs import Placement, Run, staging_ring
from layersweep.units import format_bytes

# A disk's queue needs many readers, which wait and cost nothing. From the page cache few are as
# fast, and more of them are in the way of the thread that launches kernels.
READERS, CACHED_READERS = 16, 6
# Of the page cache one call reads a run of small blocks, for few steps of Python. An embedding or a
# head is for all readers: one copies 4 to 5 GB/s (beside an H200), and the device waits for it.
CACHED_PIECE_BYTES = 96 * 2**20
CACHED_RATE = 1e9  # bytes/s of one reader from which on it reads from memory
TIMED_BYTES = 4 * 2**20  # a piece that is large enough to tell
AHEAD = 16  # runs whose reading may be under way; the ring is the real limit


class Readers:
    """Threads that read: few while that is fast, many once it waits for a disk. A pool starts its
    threads when they are needed."""

    def __init__(self) -> None:
        self._many = ThreadPoolExecutor(READERS, "block-reader")
        self._few = ThreadPoolExecutor(CACHED_READERS, "cached-block-reader")
        self.cached = True

    def piece_bytes(self, nbytes: int) -> int:
        """Of a run of `nbytes`, as much as one call should read."""
        if not self.cached:
            return PIECE_BYTES
        return max(CACHED_PIECE_BYTES, -(-nbytes // CACHED_READERS))

    def submit(self, task: Task) -> Future[None]:
        return (self._few if self.cached else self._many).submit(self._run, task)

    def _run(self, task: Task) -> None:
        started = time.perf_counter()
        nbytes = task()
        if nbytes >= TIMED_BYTES:
            self.cached = nbytes > CACHED_RATE * (time.perf_counter() - started)

    def close(self) -> None:
        """Once what was submitted is done."""
        self._many.shutdown()
        self._few.shutdown()


class Event(Protocol):
    """A copy that still reads ring bytes (torch.cuda.Event)."""

    def synchronize(self) -> None: ...


@dataclass
class Arrival:
    """A run in host memory, or on its way there. `in_ring`: its bytes must be released."""

    run: Run
    bytes: Tensor
    reads: list[Future[None]]
    in_ring: bool


class HostStage:
    """Runs of a checkpoint in host memory. `pin`: as memory that a GPU copies at full rate.

    Runs in `placement.host` stay in memory of their own after the first sweep. A refused pin is
    told to `say`: a smaller ring, then a pageable one; kept runs go through the ring instead.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        reader: RunReader,
        placement: Placement,
        *,
        pin: bool,
        say: Callable[[Fallback], None],
    ) -> None:
        self.runs, self.reader, self.placement, self.say = runs, reader, placement, say
        self.pin = pin
        self.bytes_read = 0
        self._kept: dict[int, HostBuffer] = {}
        self._filled: set[int] = set()
        self._buffer = self._open_ring()
        self._ring = ByteRing(self._buffer.bytes.numel())
        self._readers = Readers()
        reader.prepare(runs, self._readers.piece_bytes)
        self._changed = threading.Condition()
        self._queue: deque[Arrival] = deque()
        self._freed: deque[Event | None] = deque()
        self._last_uses = reader.last_uses(runs) if placement.drop_cache else {}
        self._failure: BaseException | None = None
        self._stop = True
        self._feeder: threading.Thread | None = None

    @property
    def pinned(self) -> bool:
        return self._buffer.pinned

    @property
    def ring_bytes(self) -> Tensor:
        """The whole ring, for measurements between sweeps."""
        return self._buffer.bytes

    def _open_ring(self) -> HostBuffer:
        wanted = self.placement.host_ring
        if not self.pin:
            return HostBuffer(wanted)
        buffer, size = pinned_ring(wanted, min(wanted, staging_ring(self.runs)))
        asked, pinned = (f"{format_bytes(count)} pinned" for count in (wanted, size))
        if not buffer.pinned:
            why = "the system refuses to pin it; copies take about 5 times as long"
            self.say(Fallback("host ring", asked, "pageable memory", why))
        elif size < wanted:
            self.say(Fallback("host ring", asked, pinned, "the system pins no more"))
        return buffer

    def start(self, skip: frozenset[int]) -> None:
        """Begin a sweep over all runs but `skip` (they are on the device)."""
        self._stop, self._failure = False, None
        order = [run for run in self.runs if run.index not in skip]
        if all(self._waits_here(run) for run in order):  # nothing is read: no thread is needed
            self._queue.extend(Arrival(r, self._kept[r.index].bytes, [], False) for r in order)
            return
        self._feeder = threading.Thread(
            target=self._feed, args=(order,), name="run-feeder", daemon=True
        )
        self._feeder.start()

    def halt(self) -> None:
        """Nobody waits for ring bytes or for a run any more: `take` returns None from now on."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()

    def stop(self) -> None:
        """End the sweep, wherever it is. The caller of `take` and `release` is done with both, and
        no copy reads ring bytes any more."""
        self.halt()
        if self._feeder is not None:
            self._feeder.join()
            self._feeder = None
        wait([read for arrival in self._queue for read in arrival.reads])
        self._queue.clear()
        self._freed.clear()
        self._ring.clear()

    def take(self) -> Arrival | None:
        """The next run, complete and checked; None once the sweep was stopped.

        Raises what its reading raised.
        """
        with self._changed:
            while not self._queue and not self._stop and self._failure is None:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            if self._stop:
                return None
            arrival = self._queue[0]  # it stays there until it is read: `stop` waits for that
        for read in arrival.reads:
            read.result()
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()
        if arrival.reads:
            if not self.reader.checks_itself(arrival.run):
                self.reader.check(arrival.run, arrival.bytes)
            self.bytes_read += arrival.run.stored_bytes
            self._keep(arrival.run)
            for file in self._last_uses.get(arrival.run.index, ()):
                self._readers.submit(partial(self.reader.drop, file))
        return arrival

    def release(self, event: Event | None = None) -> None:
        """The oldest run in the ring is done with, once `event` has happened."""
        with self._changed:
            self._freed.append(event)
            self._changed.notify_all()

    def close(self) -> None:
        self._readers.close()
        for buffer in self._kept.values():
            buffer.close()
        self._kept.clear()
        self._buffer.close()

    def _keep(self, run: Run) -> None:
        """A kept run has been filled: pin it, so that the next sweep copies it from there."""
        if run.index not in self._kept:
            return
        self._filled.add(run.index)
        if not self.pin or not self.pinned:
            return
        if not self._kept[run.index].pin():
            done = sum(self._kept[index].bytes.numel() for index in self._filled) - run.nbytes
            used = "pageable memory, copied through the ring"
            why = f"the system pins no more than {format_bytes(done)}"
            self.say(Fallback("host store", "pinned", used, why))
            self.pin = False

    def _feed(self, order: list[Run]) -> None:
        try:
            for run in order:
                arrival = self._arrange(run)
                if arrival is None:
                    return
                with self._changed:
                    while len(self._queue) >= AHEAD and not self._stop:
                        self._changed.wait()
                    self._queue.append(arrival)
                    self._changed.notify_all()
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _arrange(self, run: Run) -> Arrival | None:
        """Memory for a run and the reading that fills it; None once the sweep was stopped."""
        if self._waits_here(run):
            return Arrival(run, self._kept[run.index].bytes, [], in_ring=False)
        if run.index in self._filled:
            kept = self._kept[run.index]
            target = self._ring_bytes(run)
            return None if target is None else self._copied(run, kept.bytes, target)
        if run.index in self.placement.host:
            if run.index not in self._kept:
                self._kept[run.index] = HostBuffer(run.nbytes)
            buffer = self._kept[run.index]
            return Arrival(run, buffer.bytes, self._read(run, buffer.bytes), in_ring=False)
        target = self._ring_bytes(run)
        if target is None:
            return None
        return Arrival(run, target, self._read(run, target), in_ring=True)

    def _waits_here(self, run: Run) -> bool:
        """Whether it is used where it is kept."""
        if run.index not in self._filled:
            return False
        return self._kept[run.index].pinned or not self.pinned

    def _read(self, run: Run, target: Tensor) -> list[Future[None]]:
        piece = self._readers.piece_bytes(run.nbytes)
        return [self._readers.submit(task) for task in self.reader.tasks(run, target, piece)]

    def _copied(self, run: Run, source: Tensor, target: Tensor) -> Arrival:
        target.copy_(source)
        return Arrival(run, target, [], in_ring=True)

    def _ring_bytes(self, run: Run) -> Tensor | None:
        """Ring bytes for a run, waiting until there are enough; None once stopped."""
        while True:
            with self._changed:
                start = self._ring.take(run.nbytes)
                while start is None and not self._freed and not self._stop:
                    self._changed.wait()
                if self._stop:
                    return None
                if start is not None:
                    return self._buffer.bytes[start : start + run.nbytes]
                event = self._freed.popleft()
            if event is not None:
                event.synchronize()  # outside of the lock: the copy may take a while
            with self._changed:
                self._ring.free()

"""The device half of the store: copies runs from host memory to the GPU on a stream of its own.

    courier thread:  host run -> ring slot      (a slot waits, on the copy stream, for the last
                                                 kernel that used it; the host does not wait)
    compute stream:  waits for the copy of a run before its first kernel

`stall_s` is what the compute stream spent waiting, `copy_s` what the copies took, both by events.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.stream.events import mark, seconds_between
from layersweep.stream.host import HostStage
from layersweep.stream.ring import ByteRing
from layersweep.stream.runs import Placement, Run

MEASURED_BYTES = 256 * 2**20  # from here up, pinned copies run at their full rate


@dataclass
class Landed:
    """A run on the device; `arrived` is recorded after its copy, None for one that was kept."""

    run: Run
    bytes: Tensor
    arrived: torch.cuda.Event | None
    in_ring: bool


class DeviceStage:
    """Runs of a checkpoint on one GPU, in sweep order, `placement.device_ring` bytes ahead.

    Runs in `placement.device` stay there after the first sweep.
    """

    def __init__(
        self, host: HostStage, runs: Sequence[Run], placement: Placement, device: torch.device
    ) -> None:
        self.host, self.runs, self.placement, self.device = host, runs, placement, device
        self._buffer = torch.empty(placement.device_ring, dtype=torch.uint8, device=device)
        self._ring = ByteRing(placement.device_ring)
        self._kept = {
            index: torch.empty(runs[index].nbytes, dtype=torch.uint8, device=device)
            for index in sorted(placement.device)
        }
        self._filled: set[int] = set()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._changed = threading.Condition()
        self._ready: deque[Landed] = deque()
        self._freed: deque[torch.cuda.Event] = deque()
        self._failure: BaseException | None = None
        self._stop = True
        self._courier: threading.Thread | None = None
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._copies: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.h2d_bytes = 0
        self.stall_s = self.copy_s = 0.0

    def start(self) -> None:
        """Begin a sweep."""
        self._stop, self._failure = False, None
        if len(self._filled) == len(self.runs):  # nothing is copied: no thread is needed
            self._ready.extend(Landed(r, self._kept[r.index], None, False) for r in self.runs)
            return
        self.host.start(skip=frozenset(self._filled))
        self._courier = threading.Thread(target=self._carry, name="run-courier", daemon=True)
        self._courier.start()

    def stop(self) -> None:
        """End the sweep, wherever it is, when all copies have ended. The courier ends first: what
        it gives back after the rings are cleared would be the next sweep's."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if self._courier is None:
            self._ready.clear()
            return
        self.host.halt()
        self._courier.join()
        self._courier = None
        torch.cuda.synchronize(self.device)
        self.host.stop()
        self.stall_s += seconds_between(self._waits)
        self.copy_s += seconds_between(self._copies)
        self._waits.clear()
        self._copies.clear()
        self._ready.clear()
        self._freed.clear()
        self._ring.clear()

    @property
    def has_next(self) -> bool:
        """Whether `take` returns at once."""
        return bool(self._ready)

    def take(self) -> Landed:
        """The next run; the current stream waits for its copy. Raises what a reader raised."""
        with self._changed:
            if self._ready and self._ready[0].arrived is None:
                return self._ready.popleft()
        begun = mark(self.device)
        with self._changed:
            while not self._ready and self._failure is None:
                self._changed.wait()
            if not self._ready:
                assert self._failure is not None
                raise self._failure
            landed = self._ready.popleft()
        if landed.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(landed.arrived)
            self._waits.append((begun, mark(self.device)))
        return landed

    def release(self, landed: Landed) -> None:
        """Kernels launched so far were the last to use the run: its slot may be refilled."""
        if not landed.in_ring:
            return
        event = mark(self.device, timed=False)
        with self._changed:
            self._freed.append(event)
            self._changed.notify_all()

    def measure(self) -> float:
        """Bytes per second from host ring to device, the best of three copies. Before a sweep."""
        # where everything will stay there is no ring, but memory that is still empty
        buffer = max((self._buffer, *self._kept.values()), key=len)
        source = self.host.ring_bytes[: min(MEASURED_BYTES, len(buffer))]
        target, best = buffer[: source.numel()], float("inf")
        with torch.cuda.stream(self._stream):
            for _ in range(4):  # the first one warms up
                begun = mark(self.device)
                target.copy_(source, non_blocking=True)
                ended = mark(self.device)
                ended.synchronize()
                best = min(best, seconds_between([(begun, ended)]))
        return source.numel() / best

    def close(self) -> None:
        self._kept.clear()
        self._buffer = torch.empty(0)
        self.host.close()

    def _carry(self) -> None:
        try:
            torch.cuda.set_device(self.device)
            with torch.cuda.stream(self._stream):
                for run in self.runs:
                    landed = self._land(run)
                    if landed is None:
                        return
                    with self._changed:
                        self._ready.append(landed)
                        self._changed.notify_all()
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _land(self, run: Run) -> Landed | None:
        """Start the copy of a run; None once the sweep was stopped."""
        if run.index in self._filled:
            return Landed(run, self._kept[run.index], None, in_ring=False)
        arrival = self.host.take()
        if arrival is None:
            return None
        assert arrival.run.index == run.index
        in_ring = run.index not in self._kept
        target = self._slot(run) if in_ring else self._kept[run.index]
        if target is None:
            return None
        begun = mark(self.device)
        target.copy_(arrival.bytes, non_blocking=True)
        arrived = mark(self.device)
        if arrival.in_ring:
            self.host.release(arrived)
        if not in_ring:
            self._filled.add(run.index)
        self._copies.append((begun, arrived))
        self.h2d_bytes += run.nbytes
        return Landed(run, target, arrived, in_ring)

    def _slot(self, run: Run) -> Tensor | None:
        """Ring bytes for a run; the copy stream waits for the kernels that used them last."""
        with self._changed:
            while (start := self._ring.take(run.nbytes)) is None:
                while not self._freed and not self._stop:
                    self._changed.wait()
                if self._stop:
                    return None
                self._stream.wait_event(self._freed.popleft())
                self._ring.free()
        return self._buffer[start : start + run.nbytes]

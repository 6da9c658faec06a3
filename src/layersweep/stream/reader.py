"""Reads runs from a checkpoint's files, each byte range straight into its place.

tasks(run, target) -> small pieces of work, any order, any thread
then check(run, target), unless it checks_itself(run)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from layersweep.checkpoint.header import StoredTensor
from layersweep.errors import CheckpointError, MachineError
from layersweep.stream.blocks import BlockSpec, PlacedWeight
from layersweep.stream.preadv import preadv, remaining
from layersweep.stream.reading_plan import (
    Call,
    Reading,
    calls_for,
    plan_reading,
    ranges_of,
)
from layersweep.stream.runs import Run
from layersweep.stream.scales import ScaleCheck, plan_check

# Large enough that a disk streams and that few steps of Python are taken: each of them may hold up
# the thread that launches kernels.
PIECE_BYTES = 32 * 2**20

Task = Callable[[], int]  # the bytes that it has read


class RunReader:
    """Makes the reading of a run into tasks, which may run on any thread.

    A task raises CheckpointError for a file that is gone or ended early, MachineError for one that
    the system cannot read.
    """

    def __init__(self, specs: Sequence[BlockSpec]) -> None:
        self.specs = specs
        self._handles: dict[Path, int] = {}
        self._opened: dict[Path, tuple[int, int]] = {}  # sizes and times of change
        self._lock = threading.Lock()
        self._readings: dict[tuple[Run, int], Reading] = {}  # by run and bytes of a call
        self._checks: dict[Run, ScaleCheck] = {}

    def prepare(self, runs: Sequence[Run], piece_bytes: Callable[[int], int]) -> None:
        """Plan all runs before the first sweep; `piece_bytes`: of a run's bytes, those of a call.
        What is not planned here is planned when it is first needed."""
        for run in runs:
            self._reading(run, piece_bytes(run.nbytes))
            self._scales(run)

    def tasks(self, run: Run, target: Tensor, piece: int = PIECE_BYTES) -> list[Task]:
        """The work that fills `target` (uint8, CPU, run.nbytes): up to `piece` bytes each. A check
        that takes long is part of it, see `checks_itself`."""
        assert target.numel() == run.nbytes  # addresses are not checked again
        reading = self._reading(run, piece)
        made = [partial(self._make, placed, target[start:]) for placed, start in reading.made]
        found: list[Task] = [
            *made,
            *(partial(self._fill_all, calls, target) for calls in reading.calls),
        ]
        if not self.checks_itself(run):
            return found
        countdown = _Countdown(len(found), partial(self.check, run, target))
        return [partial(countdown.run, task) for task in found]

    def checks_itself(self, run: Run) -> bool:
        """Whether the last task of a run to end looks at its scales: of GGML's types there is one
        in 18 bytes, and the thread that copies to the device would take longer than the copy."""
        return self._scales(run).long

    def check(self, run: Run, target: Tensor) -> None:
        """Scales of a run whose tasks are done. Raises CheckpointError for NaN or infinity, which
        would poison every token."""
        if self._scales(run).plausible(target):
            return
        for block, start in zip(run.blocks, run.offsets, strict=True):
            for placed in self.specs[block].weights.values():
                placed.storage.check(placed.views(target[start:]))

    def _reading(self, run: Run, piece: int) -> Reading:
        if (run, piece) not in self._readings:
            self._readings[run, piece] = plan_reading(self.specs, run, piece)
        return self._readings[run, piece]

    def _scales(self, run: Run) -> ScaleCheck:
        if run not in self._checks:
            self._checks[run] = plan_check(self.specs, run)
        return self._checks[run]

    def drop(self, file: Path) -> int:
        """Take a file out of the page cache; a task, which reads nothing.

        Only once nothing more of it is read: the cache's lock is one per file, and dropping what
        lies behind the readers slows them (1.9 to 1.5 GB/s, seen).
        """
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # advice, which some file systems do not take
                os.posix_fadvise(self._handle(file), 0, 0, os.POSIX_FADV_DONTNEED)
        return 0

    def last_uses(self, runs: Sequence[Run]) -> dict[int, list[Path]]:
        """{index of a run: the files that no run after it reads from}."""
        last: dict[Path, int] = {}
        for run in runs:
            for block in run.blocks:
                for placed in self.specs[block].weights.values():
                    last.update({source.file: run.index for source in placed.weight.stored})
        found: dict[int, list[Path]] = {}
        for file, index in last.items():
            found.setdefault(index, []).append(file)
        return found

    def _fill_all(self, calls: Sequence[Call], target: Tensor) -> int:
        return sum(self._fill(call, target) for call in calls)

    def _fill(self, call: Call, target: Tensor) -> int:
        """Read what a call takes of a file, to its places in `target`; how many bytes that is."""
        handle, vectors, done = self._handle(call.file), call.vectors_in(target), 0
        while True:
            at = call.offset + done
            try:
                count = preadv(handle, vectors, at)
            except OSError as failure:
                raise MachineError(
                    f"{call.file}: tensor {call.source_at(at).name} cannot be read "
                    f"({failure.strerror})",
                    hint="check the disk, then go on with --resume if there is an --out",
                ) from failure
            if count == 0:
                source = call.source_at(at)
                raise CheckpointError(
                    f"{call.file.name}: tensor {source.name} ends after "
                    f"{max(0, at - source.offset)} bytes, needed {source.nbytes}",
                    hint="the file changed or was cut short while it was read: copy it again",
                )
            done += count
            if done == call.nbytes:
                return done
            vectors = remaining(vectors, count)

    def _make(self, placed: PlacedWeight, arena: Tensor) -> int:
        return placed.storage.make(self._whole, placed.views(arena), placed.weight.shape)

    def _whole(self, source: StoredTensor) -> Tensor:
        """All bytes of a tensor, in memory of their own."""
        raw = torch.empty(source.nbytes, dtype=torch.uint8)
        for call in calls_for(ranges_of(source, 0, source.nbytes), source.nbytes):
            self._fill(call, raw)
        return raw

    def _handle(self, file: Path) -> int:
        with self._lock:
            if file not in self._handles:
                try:
                    self._handles[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as failure:
                    raise CheckpointError(
                        f"{file}: found no file that can be opened any more ({failure.strerror}), "
                        "needed the one whose header was read",
                        hint="put it back; a run with --out continues with --resume",
                    ) from failure
                self._opened[file] = _state(self._handles[file])
            return self._handles[file]

    def check_unchanged(self) -> None:
        """Raises CheckpointError for a file that was written to since it was opened here: part of
        what was read may be of another model."""
        with self._lock:
            for file, handle in self._handles.items():
                if _state(handle) != self._opened[file]:
                    raise CheckpointError(
                        f"{file}: changed while it was read, needed the same bytes throughout",
                        hint="leave the checkpoint alone while it is in use; start again",
                    )

    def close(self) -> None:
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()
            self._opened.clear()


class _Countdown:
    """Tasks of which the last one to end goes on with `then`; none does where one fails."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left, self._then = count, then
        self._lock = threading.Lock()

    def run(self, task: Task) -> int:
        nbytes = task()
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._then()
        return nbytes


def _state(handle: int) -> tuple[int, int]:
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns

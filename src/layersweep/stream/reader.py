"""Reads runs from a checkpoint's files, each byte range straight into its place.

tasks(run, target) -> small pieces of work, any order, any thread; then check(run, target)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from layersweep.checkpoint import nf4
from layersweep.checkpoint.header import StoredTensor
from layersweep.errors import CheckpointError, MachineError
from layersweep.stream.blocks import STORED_DTYPES, BlockSpec, PlacedWeight
from layersweep.stream.runs import Run

# Large enough that a disk streams and that few steps of Python are taken: each of them may hold up
# the thread that launches kernels (8 MiB cost 1.2 % of a study, and 5 % of one on two GPUs).
PIECE_BYTES = 32 * 2**20
SMALL_BYTES = 2**20  # tensors up to here are read one after the other

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

    def tasks(self, run: Run, target: Tensor) -> list[Task]:
        """The work that fills `target` (uint8, CPU, run.nbytes), largest pieces first."""
        large: list[Task] = []
        small: list[Task] = []
        for block, start in zip(run.blocks, run.offsets, strict=True):
            arena = target[start : start + self.specs[block].nbytes]
            for placed in self.specs[block].weights.values():
                if placed.quantize:
                    large.append(partial(self._read_quantized, placed, arena))
                    continue
                for slot in placed.slots:
                    assert slot.source is not None
                    part = arena[slot.offset : slot.offset + slot.nbytes]
                    pieces = list(self._pieces(slot.source, part))
                    (large if slot.nbytes > SMALL_BYTES else small).extend(pieces)
        return [*large, partial(_one_after_another, small)]

    def check(self, run: Run, target: Tensor) -> None:
        """Scales of a run whose tasks are done. Raises CheckpointError for NaN or infinity, which
        would poison every token."""
        for block, start in zip(run.blocks, run.offsets, strict=True):
            arena = target[start : start + self.specs[block].nbytes]
            for placed in self.specs[block].weights.values():
                if placed.weight.quant is not None:
                    _check_scales(placed, arena)

    def drop(self, file: Path) -> int:
        """Take a file out of the page cache; a task, which reads nothing.

        Only once nothing more of it is read: the cache's lock is one per file, and dropping what
        lies behind the readers slows them (1.9 to 1.5 GB/s, seen).
        """
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle(file), 0, 0, os.POSIX_FADV_DONTNEED)
        return 0

    def last_uses(self, runs: Sequence[Run]) -> dict[int, list[Path]]:
        """{index of a run: the files that no run after it reads from}."""
        last: dict[Path, int] = {}
        for run in runs:
            for block in run.blocks:
                for placed in self.specs[block].weights.values():
                    sources = (placed.weight.data, *(slot.source for slot in placed.slots))
                    last.update({source.file: run.index for source in sources if source})
        found: dict[int, list[Path]] = {}
        for file, index in last.items():
            found.setdefault(index, []).append(file)
        return found

    def _pieces(self, source: StoredTensor, target: Tensor) -> Iterator[Task]:
        for start in range(0, source.nbytes, PIECE_BYTES):
            part = target[start : start + PIECE_BYTES]
            yield partial(self._read_range, source, start, part)

    def _read_range(self, source: StoredTensor, start: int, target: Tensor) -> int:
        """Bytes [start, start + len(target)) of a tensor; how many they are."""
        view = memoryview(target.numpy().data)
        handle, done = self._handle(source.file), 0
        while done < len(view):
            try:
                count = os.preadv(handle, [view[done:]], source.offset + start + done)
            except OSError as failure:
                raise MachineError(
                    f"{source.file}: tensor {source.name} cannot be read ({failure.strerror})",
                    hint="check the disk, then go on with --resume if there is an --out",
                ) from failure
            if count == 0:
                raise CheckpointError(
                    f"{source.file.name}: tensor {source.name} ends after {start + done} bytes, "
                    f"needed {source.nbytes}",
                    hint="the file changed or was cut short while it was read: copy it again",
                )
            done += count
        return done

    def _read_quantized(self, placed: PlacedWeight, arena: Tensor) -> int:
        source = placed.weight.data
        raw = torch.empty(source.nbytes, dtype=torch.uint8)
        self._read_range(source, 0, raw)
        weight = raw.view(STORED_DTYPES[source.dtype]).view(placed.weight.shape)
        quantized = nf4.quantize(weight, blocksize=64, nested=False)
        assert placed.absmax is not None
        for slot, made in ((placed.data, quantized.packed), (placed.absmax, quantized.absmax)):
            bytes_made = made.reshape(-1).view(torch.uint8)
            arena[slot.offset : slot.offset + slot.nbytes].copy_(bytes_made)
        return source.nbytes

    def _handle(self, file: Path) -> int:
        with self._lock:
            if file not in self._handles:
                try:
                    self._handles[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as failure:
                    raise CheckpointError(
                        f"{file}: found no file that can be opened any more ({failure.strerror}), "
                        "needed the one whose header was read",
                        hint="put it back; a run with --out goes on with --resume",
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


def _state(handle: int) -> tuple[int, int]:
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns


def _one_after_another(tasks: Sequence[Task]) -> int:
    return sum(task() for task in tasks)


def _check_scales(placed: PlacedWeight, arena: Tensor) -> None:
    quant = placed.weight.quant
    assert quant is not None
    slots = [(placed.nested_absmax, False), (placed.nested_quant_map, True)]
    for slot, signed in slots if quant.nested else [(placed.absmax, False)]:
        assert slot is not None
        source = slot.source
        assert source is not None
        scales = arena[slot.offset : slot.offset + slot.nbytes].view(torch.float32)
        nf4.check_scales(scales, file=source.file.name, tensor=source.name, signed=signed)
    if quant.nested:
        source = quant.nested.absmax
        outer, table = (
            arena[slot.offset : slot.offset + slot.nbytes].view(torch.float32)
            for slot, _ in slots
            if slot is not None
        )
        offset = quant.nested.offset
        nf4.check_products(outer, table, offset, file=source.file.name, tensor=source.name)

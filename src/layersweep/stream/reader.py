"""Reads runs from a checkpoint's files, each byte range straight into its place.

tasks(run, target) -> small pieces of work, any order, any thread; then check(run, target)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from layersweep.checkpoint import nf4
from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.weights import Nested
from layersweep.errors import CheckpointError, MachineError
from layersweep.stream.blocks import STORED_DTYPES, BlockSpec, PlacedWeight, Slot
from layersweep.stream.runs import Run

# Large enough that a disk streams and that few steps of Python are taken: each of them may hold up
# the thread that launches kernels.
PIECE_BYTES = 32 * 2**20
GAP_BYTES = 64 * 2**10  # bytes between tensors that are read and dropped
MOST_RANGES = 500  # of one call; with the gaps between them, the system takes 1,024
_UNREAD = memoryview(bytearray(GAP_BYTES))

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

    def tasks(self, run: Run, target: Tensor, piece: int = PIECE_BYTES) -> list[Task]:
        """The work that fills `target` (uint8, CPU, run.nbytes): up to `piece` bytes each.

        What lies together in a file is read by one call, whatever tensors it is, since a thread
        that launches kernels has to wait for each step of Python that others take.
        """
        found: list[Task] = []
        wanted: dict[Path, list[_Range]] = {}
        for block, start in zip(run.blocks, run.offsets, strict=True):
            for placed in self.specs[block].weights.values():
                if placed.quantize:
                    found.append(partial(self._read_quantized, placed, target[start:]))
                    continue
                for slot in placed.slots:
                    if slot.source is None:
                        found.append(partial(self._read_nested_scales, placed, target[start:]))
                        continue
                    parts = _cut(slot.source, start + slot.offset, piece)
                    wanted.setdefault(slot.source.file, []).extend(parts)
        memory = target.numpy().data
        for ranges in wanted.values():
            ranges.sort(key=attrgetter("offset"))
            found += (partial(self._read, parts, memory) for parts in _together(ranges, piece))
        return found

    def check(self, run: Run, target: Tensor) -> None:
        """Scales of a run whose tasks are done. Raises CheckpointError for NaN or infinity, which
        would poison every token."""
        placed = [
            (one, start)
            for block, start in zip(run.blocks, run.offsets, strict=True)
            for one in self.specs[block].weights.values()
            if one.weight.quant is not None
        ]
        if not _all_plausible(placed, target):
            for one, start in placed:
                _check_scales(one, target[start:])

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

    def _read(self, parts: Sequence[_Range], memory: memoryview) -> int:
        """Fill ranges of `memory` that follow each other in one file; how many bytes that takes."""
        first, views = parts[0], _views(parts, memory)
        handle, total, done = self._handle(first.source.file), sum(map(len, views)), 0
        while done < total:
            at = first.offset + done
            try:
                count = os.preadv(handle, views, at)
            except OSError as failure:
                raise MachineError(
                    f"{first.source.file}: tensor {_source_at(parts, at).name} cannot be read "
                    f"({failure.strerror})",
                    hint="check the disk, then go on with --resume if there is an --out",
                ) from failure
            if count == 0:
                source = _source_at(parts, at)
                raise CheckpointError(
                    f"{source.file.name}: tensor {source.name} ends after "
                    f"{max(0, at - source.offset)} bytes, needed {source.nbytes}",
                    hint="the file changed or was cut short while it was read: copy it again",
                )
            done += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]
        return total

    def _read_quantized(self, placed: PlacedWeight, arena: Tensor) -> int:
        source = placed.weight.data
        raw = torch.empty(source.nbytes, dtype=torch.uint8)
        self._read_whole(source, raw)
        shape = placed.weight.shape
        weight = raw.view(STORED_DTYPES[source.dtype])
        weight = weight.view(shape[::-1]).t() if placed.weight.transposed else weight.view(shape)
        quantized = nf4.quantize(weight, blocksize=64, nested=False)
        assert placed.absmax is not None
        for slot, made in ((placed.data, quantized.packed), (placed.absmax, quantized.absmax)):
            bytes_made = made.reshape(-1).view(torch.uint8)
            arena[slot.offset : slot.offset + slot.nbytes].copy_(bytes_made)
        return source.nbytes

    def _read_nested_scales(self, placed: PlacedWeight, arena: Tensor) -> int:
        """Scales whose first lies inside a nested block, expanded to plain ones and checked."""
        quant, slot = placed.weight.quant, placed.absmax
        assert quant is not None and quant.nested is not None and slot is not None
        sources = (quant.absmax, quant.nested.absmax, quant.nested.quant_map)
        absmax, outer, table = (torch.empty(source.nbytes, dtype=torch.uint8) for source in sources)
        for source, raw in zip(sources, (absmax, outer, table), strict=True):
            self._read_whole(source, raw)
        outer, table = outer.view(torch.float32), table.view(torch.float32)
        _check_nested(quant.nested, outer, table)
        nested = quant.nested
        scales = nf4.expand_absmax(
            absmax, outer, table, nested.blocksize, nested.offset, nested.skip
        )
        arena[slot.offset : slot.offset + slot.nbytes].copy_(scales.view(torch.uint8))
        return sum(source.nbytes for source in sources)

    def _read_whole(self, source: StoredTensor, raw: Tensor) -> None:
        self._read([_Range(source, source.offset, 0, source.nbytes)], raw.numpy().data)

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


def _state(handle: int) -> tuple[int, int]:
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns


class _Range(NamedTuple):
    """`nbytes` of a tensor from `offset` in its file on, and the place that they go to."""

    source: StoredTensor
    offset: int
    place: int
    nbytes: int

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes


def _cut(source: StoredTensor, place: int, piece: int) -> list[_Range]:
    """A tensor in ranges of at most `piece` bytes."""
    if source.nbytes <= piece:
        return [_Range(source, source.offset, place, source.nbytes)]
    starts = range(0, source.nbytes, piece)
    return [
        _Range(source, source.offset + at, place + at, min(piece, source.nbytes - at))
        for at in starts
    ]


def _together(ranges: Sequence[_Range], piece: int) -> list[list[_Range]]:
    """Ranges of one file in order of their offsets, those that one call reads in one list."""
    found: list[list[_Range]] = []
    begin = end = -1
    for part in ranges:
        if (
            found
            and 0 <= part.offset - end <= GAP_BYTES
            and part.stop - begin <= piece
            and len(found[-1]) < MOST_RANGES
        ):
            found[-1].append(part)
        else:
            found.append([part])
            begin = part.offset
        end = part.stop
    return found


def _views(parts: Sequence[_Range], memory: memoryview) -> list[memoryview]:
    """Where the file's bytes go, those between two ranges to memory that nobody reads."""
    views: list[memoryview] = []
    at = parts[0].offset
    for _, offset, place, nbytes in parts:
        if offset > at:
            views.append(_UNREAD[: offset - at])
        views.append(memory[place : place + nbytes])
        at = offset + nbytes
    return views


def _source_at(parts: Sequence[_Range], offset: int) -> StoredTensor:
    """The tensor that the byte at `offset` is of; before one, that tensor."""
    return next(part.source for part in parts if offset < part.stop)


# Scales of scales, entries of their table and offsets are all far below this in a whole file, and
# no product of them overflows.
PLAUSIBLE = 1e18


def _all_plausible(placed: Sequence[tuple[PlacedWeight, int]], target: Tensor) -> bool:
    """Whether nothing of many weights, whose blocks begin at some place of `target`, needs a closer
    look: a look at each takes 100 us."""
    positive: list[tuple[int, Slot]] = []
    signed: list[tuple[int, Slot]] = []
    for one, start in placed:
        quant = one.weight.quant
        assert quant is not None and one.absmax is not None
        if one.nested_absmax is not None and one.nested_quant_map is not None:
            positive.append((start, one.nested_absmax))
            signed.append((start, one.nested_quant_map))
            assert quant.nested is not None
            if not abs(quant.nested.offset) < PLAUSIBLE:
                return False
        elif quant.nested is None:
            positive.append((start, one.absmax))
    lowest, highest = _extremes(positive, target)
    least, most = _extremes(signed, target)
    return lowest >= 0 and highest < PLAUSIBLE and least > -PLAUSIBLE and most < PLAUSIBLE


def _extremes(slots: Sequence[tuple[int, Slot]], target: Tensor) -> tuple[float, float]:
    """Least and greatest of float32 values, NaN where one is NaN. numpy's views take a quarter of
    the time of torch's."""
    raw = target.numpy()
    starts = ((start + slot.offset, slot.nbytes) for start, slot in slots)
    parts = [raw[start : start + nbytes].view(np.float32) for start, nbytes in starts if nbytes]
    values = np.concatenate(parts or [np.zeros(1, np.float32)])
    return float(values.min()), float(values.max())


def _values(slot: Slot, arena: Tensor) -> Tensor:
    return arena[slot.offset : slot.offset + slot.nbytes].view(torch.float32)


def _check_scales(placed: PlacedWeight, arena: Tensor) -> None:
    quant = placed.weight.quant
    assert quant is not None and placed.absmax is not None
    if quant.nested is None:
        source = quant.absmax
        scales = _values(placed.absmax, arena)
        nf4.check_scales(scales, file=source.file.name, tensor=source.name, signed=False)
    elif placed.nested_absmax is not None and placed.nested_quant_map is not None:
        outer = _values(placed.nested_absmax, arena)
        table = _values(placed.nested_quant_map, arena)
        _check_nested(quant.nested, outer, table)


def _check_nested(nested: Nested, outer: Tensor, table: Tensor) -> None:
    """Raises CheckpointError for values that are not finite, or whose product is not."""
    for source, values, signed in (
        (nested.absmax, outer, False),
        (nested.quant_map, table, True),
    ):
        nf4.check_scales(values, file=source.file.name, tensor=source.name, signed=signed)
    source = nested.absmax
    nf4.check_products(outer, table, nested.offset, file=source.file.name, tensor=source.name)

"""Plans how a run is read, once for all sweeps.

The thread that launches kernels waits for each step of Python that others take, and a model may
have 18,432 weights of four tensors each. Where their bytes go is kept in arrays, counted from the
run's first byte: in a sweep, a call adds the address of the run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from layersweep.checkpoint.header import StoredTensor
from layersweep.stream.blocks import BlockSpec, PlacedWeight
from layersweep.stream.preadv import Vectors
from layersweep.stream.runs import Run

GAP_BYTES = 64 * 2**10  # bytes between tensors that are read and dropped
DISK_SHARES = 4  # of a call's bytes, which small calls may be together
_UNREAD = np.empty(GAP_BYTES, np.uint8)
Numbers = NDArray[np.int64]
Range = tuple[int, int, int, StoredTensor]  # offset in the file, place in the run, bytes, of what


@dataclass(frozen=True, eq=False)
class Call:
    """What one call reads: `nbytes` of `file` from `offset` on, gaps between tensors included.

    vectors: [n, 2], places and numbers of bytes. Where `moves` (int64 [n, 2]) is 1, a place counts
    from the run's first byte; elsewhere it is an address, of memory that nobody reads.
    sources: the tensors that the bytes are of, in the order of the file.
    """

    file: Path
    offset: int
    nbytes: int
    vectors: Vectors
    moves: NDArray[np.int64]
    sources: tuple[StoredTensor, ...]

    def vectors_in(self, target: Tensor) -> Vectors:
        """With addresses, for a run that lies in `target`."""
        return self.vectors + self.moves * target.data_ptr()

    def source_at(self, offset: int) -> StoredTensor:
        """The tensor that the file's byte at `offset` is of; in a gap, the next one."""
        return next(one for one in self.sources if offset < one.offset + one.nbytes)


@dataclass(frozen=True, eq=False)
class Reading:
    """How a run is filled: calls, in tuples for one reader each, and weights that are made from
    what is read, with the first byte of their block in the run."""

    calls: tuple[tuple[Call, ...], ...]
    made: tuple[tuple[PlacedWeight, int], ...]


def plan_reading(specs: Sequence[BlockSpec], run: Run, piece: int) -> Reading:
    """Calls of at most `piece` bytes. What lies together in a file is read by one of them, whatever
    tensors it is."""
    wanted: list[Range] = []
    made: list[tuple[PlacedWeight, int]] = []
    for block, start in zip(run.blocks, run.offsets, strict=True):
        for placed in specs[block].weights.values():
            whole = True
            for slot in placed.slots:
                if slot.source is None:
                    whole = False
                else:
                    wanted += ranges_of(slot.source, start + slot.offset, piece)
            if not whole:
                made.append((placed, start))
    files: dict[Path, list[Range]] = {}
    for file, ranges in groupby(wanted, lambda one: one[3].file):
        files.setdefault(file, []).extend(ranges)
    calls = [call for ranges in files.values() for call in calls_for(ranges, piece)]
    # a run that one call might read is for one reader; a disk's queue needs more of them
    share = piece if run.nbytes <= piece else piece // DISK_SHARES
    return Reading(tuple(_shares(calls, share)), tuple(made))


def _shares(calls: Sequence[Call], most: int) -> Iterator[tuple[Call, ...]]:
    """Calls of up to `most` bytes together for each reader: handing one over takes 20 us of Python,
    and experts that lie in the order "1", "10", "100" are many calls."""
    ends = list(accumulate(call.nbytes for call in calls))
    first = 0
    while first < len(calls):
        before = ends[first] - calls[first].nbytes
        after = max(first + 1, bisect_right(ends, before + most))
        yield tuple(calls[first:after])
        first = after


def ranges_of(source: StoredTensor, place: int, piece: int) -> list[Range]:
    """A tensor in ranges of at most `piece` bytes."""
    if source.nbytes <= piece:
        return [(source.offset, place, source.nbytes, source)]
    return [
        (source.offset + at, place + at, min(piece, source.nbytes - at), source)
        for at in range(0, source.nbytes, piece)
    ]


def calls_for(ranges: list[Range], piece: int) -> Iterator[Call]:
    """The calls that read ranges of one file."""
    *columns, sources = zip(*sorted(ranges, key=itemgetter(0)), strict=True)
    offsets, places, sizes = np.array(columns, np.int64)
    stops = offsets + sizes
    gaps = np.append(0, offsets[1:] - stops[:-1])
    rows, moves = np.zeros((2, len(offsets), 2, 2), np.int64)  # [range, (gap before it, itself), 2]
    rows[:, 0, 0], rows[:, 0, 1] = _UNREAD.ctypes.data, gaps
    rows[:, 1, 0], rows[:, 1, 1] = places, sizes
    moves[:, 1, 0] = 1
    for part in _together(offsets, stops, gaps, piece):
        rows[part.start, 0, 1] = 0
        some = rows[part, :, 1] > 0
        first, stop = int(offsets[part.start]), int(stops[part.stop - 1])
        if first < stop:
            file = sources[part.start].file
            vectors = rows[part][some]
            yield Call(file, first, stop - first, vectors, moves[part][some], sources[part])


def _together(offsets: Numbers, stops: Numbers, gaps: Numbers, piece: int) -> Iterator[slice]:
    """Ranges in order of their offsets, those that one call reads in one slice."""
    first = 0
    for end in (*np.flatnonzero((gaps < 0) | (gaps > GAP_BYTES)).tolist(), len(offsets)):
        while first < end:  # without overlap, so stops grow
            fit = int(np.searchsorted(stops[first:end], offsets[first] + piece, side="right"))
            yield slice(first, first + max(fit, 1))
            first += max(fit, 1)

"""Runs: consecutive blocks of one layer that are copied at once, and where each of them waits.

A copy of 64 MiB moves at the full rate of the bus, one of 1 MiB at two thirds of it, so small
blocks travel together. A run never crosses a layer: the compute thread gives a layer back whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layersweep.stream.blocks import BlockSpec

RUN_BYTES = 64 * 2**20
RUNS_AHEAD = 2
LAYER_BYTES = 3 * 2**30  # of a layer in a ring: more than a bus brings while attention is computed


@dataclass(frozen=True)
class Run:
    """Blocks `first` .. `first + len(offsets) - 1` (numbers in sweep order) in one piece of
    memory, block `first + i` at `offsets[i]`."""

    index: int
    layer: int | None
    first: int
    offsets: tuple[int, ...]
    nbytes: int
    stored_bytes: int

    @property
    def blocks(self) -> range:
        return range(self.first, self.first + len(self.offsets))


def runs_of(specs: Sequence[BlockSpec], least: int = RUN_BYTES) -> list[Run]:
    """Cut blocks into runs of at least `least` bytes; the last of a layer may be smaller."""
    runs: list[Run] = []
    offsets: list[int] = []
    first = nbytes = stored = 0
    layer = specs[0].layer if specs else None

    def cut() -> None:
        if offsets:
            runs.append(Run(len(runs), layer, first, tuple(offsets), nbytes, stored))

    for index, spec in enumerate(specs):  # 15,000 in the largest models
        of_layer = spec.layer
        if nbytes >= least or of_layer != layer:
            cut()
            first, layer, nbytes, stored = index, of_layer, 0, 0
            offsets.clear()
        offsets.append(nbytes)
        nbytes += spec.nbytes
        stored += spec.stored_bytes
    cut()
    return runs


def layer_bytes(runs: Sequence[Run]) -> int:
    """Of the largest layer."""
    layers: dict[int, int] = {}
    for run in runs:
        if run.layer is not None:
            layers[run.layer] = layers.get(run.layer, 0) + run.nbytes
    return max(layers.values(), default=0)


def compute_ring(runs: Sequence[Run]) -> int:
    """Bytes of the ring where a sweep computes: one layer, or LAYER_BYTES of it, so that copies go
    on while attention is computed, two runs ahead of it, and a third run's bytes that may be lost
    at the ring's end."""
    largest = max((run.nbytes for run in runs if run.layer is not None), default=0)
    in_use = min(layer_bytes(runs), LAYER_BYTES) + (RUNS_AHEAD + 1) * largest
    return max(in_use, max(run.nbytes for run in runs))


def staging_ring(runs: Sequence[Run]) -> int:
    """Least bytes of the pinned ring between file and device: one run is read, one is copied."""
    return 2 * max(run.nbytes for run in runs)


def choose_spread(sizes: Sequence[int], budget: int) -> frozenset[int]:
    """Indices of `sizes` that fit `budget` together, spread evenly.

    What is kept needs no transfer. Were the kept runs neighbours, the bus would idle while they
    are used and be late afterwards; evenly spread it never has to catch up.
    """
    total = sum(sizes)
    if budget >= total:
        return frozenset(range(len(sizes)))
    chosen, used, credit = set(), 0, 0.0
    for index, size in enumerate(sizes):
        credit += size * budget / total
        if credit >= size and used + size <= budget:
            chosen.add(index)
            used += size
            credit -= size
    return frozenset(chosen)


@dataclass(frozen=True)
class Placement:
    """Where runs wait between sweeps. `device` and `host` are kept there after their first read,
    the others pass through the rings each time.

    device_ring: bytes where blocks are computed with, 0 on the CPU, where the host ring serves.
    host_ring: bytes between file and device. drop_cache: files do not fit the host budget
    beside what is kept, so what was read is taken out of the page cache, where it would only push
    out other data.
    """

    device: frozenset[int]
    host: frozenset[int]
    device_ring: int
    host_ring: int
    drop_cache: bool = False


def spread_layers(sizes: Sequence[int], rooms: Sequence[int]) -> list[range] | None:
    """Consecutive layers for each device, at least one, each filled to the same share of its room
    as nearly as whole layers allow; None where they do not fit together."""
    if len(sizes) < len(rooms) or min(rooms) <= 0:
        return None
    low, high = 0.0, 1.0
    best = _filled(sizes, rooms, high)
    for _ in range(30):
        middle = (low + high) / 2
        if (found := _filled(sizes, rooms, middle)) is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _filled(sizes: Sequence[int], rooms: Sequence[int], share: float) -> list[range] | None:
    """Layers in order, as many to each device as fit `share` of its room."""
    parts, first = [], 0
    for device, room in enumerate(rooms):
        last, used = first, 0
        most = len(sizes) - (len(rooms) - 1 - device)  # one for each device after it
        while last < most and used + sizes[last] <= share * room:
            used += sizes[last]
            last += 1
        if last == first:
            return None
        parts.append(range(first, last))
        first = last
    return parts if first == len(sizes) else None

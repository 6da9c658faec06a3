"""Checks the scales of a run that was read: NaN or infinity would poison every token.

A look at each of 18,432 weights takes 100 us. So a few views of a run, planned once, show whether
one is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from layersweep.checkpoint.storage.storage import PLAUSIBLE, Look
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.runs import Run

# Halves are looked at as integers, which takes numpy a third of the time: without their signs,
# infinity is the least of those that are not finite.
HALVES = {"f2": (np.uint16, np.uint16(0x7FFF)), "2f2": (np.uint32, np.uint32(0x7FFF7FFF))}
HALF_INFINITY = 0x7C00
MANY = 100_000  # numbers of a run that whoever has read it looks at: 1 ms


@dataclass(frozen=True)
class Floats:
    """Numbers of equal tensors of equal blocks, the first at byte `start` of the run; `look` says
    how they lie in each. shape: [blocks, tensors of one, numbers of one]; strides in bytes."""

    start: int
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    look: Look

    def plausible(self, memory: NDArray[np.uint8]) -> bool:
        """Whether all are in [least, below), NaN is not; of halves, whether they are finite."""
        if self.look.dtype in HALVES:
            dtype, magnitudes = HALVES[self.look.dtype]
            words = np.ndarray(self.shape, dtype, memory, self.start, self.strides)
            return bool((words & magnitudes).view(np.uint16).max(initial=0) < HALF_INFINITY)
        values = np.ndarray(self.shape, self.look.dtype, memory, self.start, self.strides)
        lowest, highest = np.minimum.reduce(values, axis=None), np.maximum.reduce(values, axis=None)
        return float(lowest) >= self.look.least and float(highest) < self.look.below


@dataclass(frozen=True)
class ScaleCheck:
    """The scales of a run. `offsets_plausible`: those of nested scales, from the headers."""

    floats: tuple[Floats, ...]
    offsets_plausible: bool

    @cached_property
    def long(self) -> bool:
        """Whether a glance takes so long that it must not hold up copies to the device."""
        return sum(math.prod(one.shape) for one in self.floats) > MANY

    def plausible(self, target: Tensor) -> bool:
        """Whether no scale needs a closer look: one at each weight takes 100 us."""
        memory = target.numpy()
        return self.offsets_plausible and all(one.plausible(memory) for one in self.floats)


def plan_check(specs: Sequence[BlockSpec], run: Run) -> ScaleCheck:
    """Equal blocks share views: numpy's calls for each of them take longer than the look."""
    floats: list[Floats] = []
    start = 0
    for _, group in groupby(run.blocks, lambda block: specs[block].layout):
        blocks = [specs[block] for block in group]
        size = blocks[0].nbytes
        for look, places in _looks_of(blocks[0]).items():
            floats += (
                Floats(
                    start + at, (len(blocks), tensors, look.count), (size, step, look.step), look
                )
                for at, tensors, step in _evenly_spaced(places)
            )
        start += len(blocks) * size
    offsets = [
        placed.storage.offset for block in run.blocks for placed in specs[block].weights.values()
    ]
    return ScaleCheck(tuple(floats), all(abs(offset) < PLAUSIBLE for offset in offsets))


def _looks_of(spec: BlockSpec) -> dict[Look, list[int]]:
    """{what is looked at alike: places of the first numbers in the block}."""
    found: dict[Look, list[int]] = {}
    for placed in spec.weights.values():
        for look in placed.storage.looks:
            if look.count:
                place = placed.slots[look.piece].offset + look.first
                found.setdefault(replace(look, piece=0, first=0), []).append(place)
    return found


def _evenly_spaced(places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Rising places in runs of (first, count, step)."""
    first = 0
    while first < len(places):
        step, end = 0, first + 1
        if end < len(places):
            step = places[end] - places[first]
        while end < len(places) and places[end] - places[end - 1] == step:
            end += 1
        yield places[first], end - first, step
        first = end

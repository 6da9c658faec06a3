"""Checks the scales of a run that was read: NaN or infinity would poison every token.

A look at each of 18,432 weights takes 100 us. So a few views of a run, planned once, show whether
one is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from layersweep.checkpoint.storage.storage import PLAUSIBLE, Look
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.runs import Run


@dataclass(frozen=True)
class Floats:
    """Numbers of equal tensors of equal blocks, the first at byte `start` of the run; `look` says
    how they lie in each. shape: [blocks, tensors of one, numbers of one]; strides in bytes."""

    start: int
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    look: Look

    def plausible(self, memory: NDArray[np.uint8]) -> bool:
        """Whether all are in [least, below); NaN is not."""
        values = np.ndarray(self.shape, self.look.dtype, memory, self.start, self.strides)
        lowest = float(np.minimum.reduce(values, axis=None))  # of any dtype, and then comparable
        highest = float(np.maximum.reduce(values, axis=None))
        return lowest >= self.look.least and highest < self.look.below


@dataclass(frozen=True)
class ScaleCheck:
    """The scales of a run. `offsets_plausible`: those of nested scales, from the headers."""

    floats: tuple[Floats, ...]
    offsets_plausible: bool

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

"""Checks the scales of a run that was read: NaN or infinity would poison every token.

A look at each of 18,432 weights takes 100 us. So a few views of a run, planned once, show whether
one is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layersweep.checkpoint import nf4
from layersweep.checkpoint.weights import Nested
from layersweep.stream.blocks import BlockSpec, PlacedWeight, Slot
from layersweep.stream.runs import Run

# Scales of scales, entries of their table and offsets are all far below this in a whole file, and
# no product of them overflows.
PLAUSIBLE = 1e18


@dataclass(frozen=True)
class Floats:
    """Float32 values of equal tensors of equal blocks, the first at byte `start` of the run.
    shape: [blocks, tensors of one, values of one]; strides, in bytes, of the same."""

    start: int
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    least: float

    def plausible(self, memory: NDArray[np.uint8]) -> bool:
        """Whether all are in [least, PLAUSIBLE); NaN is not."""
        values = np.ndarray(self.shape, np.float32, memory, self.start, self.strides)
        lowest, highest = np.minimum.reduce(values, axis=None), np.maximum.reduce(values, axis=None)
        return bool(lowest >= self.least and highest < PLAUSIBLE)


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
        for (values, least), places in _scales_of(blocks[0]).items():
            floats += (
                Floats(start + first, (len(blocks), tensors, values), (size, step, 4), least)
                for first, tensors, step in _evenly_spaced(places)
            )
        start += len(blocks) * size
    offsets = [
        placed.nested_offset for block in run.blocks for placed in specs[block].weights.values()
    ]
    return ScaleCheck(tuple(floats), all(abs(offset) < PLAUSIBLE for offset in offsets))


def _scales_of(spec: BlockSpec) -> dict[tuple[int, float], list[int]]:
    """{(how many float32 scales, the least that one may be): places of tensors in the block}."""
    found: dict[tuple[int, float], list[int]] = {}
    for placed in spec.weights.values():
        looks: list[tuple[Slot | None, float]] = []
        if placed.nested_absmax is not None:
            looks = [(placed.nested_absmax, 0.0), (placed.nested_quant_map, -PLAUSIBLE)]
        elif placed.weight.quant is not None and placed.weight.quant.nested is None:
            looks = [(placed.absmax, 0.0)]
        for slot, least in looks:
            if slot is not None and slot.nbytes:
                found.setdefault((slot.nbytes // 4, least), []).append(slot.offset)
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


def _values(slot: Slot, arena: Tensor) -> Tensor:
    return arena[slot.offset : slot.offset + slot.nbytes].view(torch.float32)


def check_weight(placed: PlacedWeight, arena: Tensor) -> None:
    quant = placed.weight.quant
    assert quant is not None and placed.absmax is not None
    if quant.nested is None:
        source = quant.absmax
        scales = _values(placed.absmax, arena)
        nf4.check_scales(scales, file=source.file.name, tensor=source.name, signed=False)
    elif placed.nested_absmax is not None and placed.nested_quant_map is not None:
        outer = _values(placed.nested_absmax, arena)
        table = _values(placed.nested_quant_map, arena)
        check_nested(quant.nested, outer, table)


def check_nested(nested: Nested, outer: Tensor, table: Tensor) -> None:
    """Raises CheckpointError for values that are not finite, or whose product is not."""
    for source, values, signed in (
        (nested.absmax, outer, False),
        (nested.quant_map, table, True),
    ):
        nf4.check_scales(values, file=source.file.name, tensor=source.name, signed=signed)
    source = nested.absmax
    nf4.check_products(outer, table, nested.offset, file=source.file.name, tensor=source.name)

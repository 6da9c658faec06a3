"""What a walk over an engine's blocks visits, and in which order: found once, walked many times."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from layersweep.families.spec import Decoder
from layersweep.families.weights import BlockShape
from layersweep.model.compute import Compute
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.shapes import experts_at_once
from layersweep.sweep.feed import groups_of
from layersweep.sweep.record import Progress


@dataclass(frozen=True)
class FeedGroup:
    """An MLP, a shared expert, or routed experts that are dense together: their numbers in the
    store, and their shapes."""

    numbers: tuple[int, ...]
    shapes: tuple[BlockShape, ...]

    @property
    def routed(self) -> bool:
        """Whether only some rows go here."""
        return self.shapes[0].role == "expert"

    def used_by(self, experts: Collection[int], *, whole: bool) -> FeedGroup | None:
        """Its experts that have rows, None if none has; where it is `whole`, all if one has."""
        if not self.routed:
            return self
        some = [at for at, shape in enumerate(self.shapes) if shape.expert in experts]
        if not some or whole or len(some) == len(self.shapes):
            return self if some else None
        return FeedGroup(
            tuple(self.numbers[at] for at in some), tuple(self.shapes[at] for at in some)
        )


@dataclass(frozen=True)
class LayerBlocks:
    """Of one layer: the number of attention's block, and its feed in the order of visits, up to
    `at_once` experts in a group. `fetched`: experts that another store brings by id."""

    attention: int
    groups: tuple[FeedGroup, ...]
    at_once: int
    fetched: tuple[BlockShape, ...]

    @cached_property
    def feeds(self) -> tuple[BlockShape, ...]:
        """An MLP, or all experts."""
        return *(shape for group in self.groups for shape in group.shapes), *self.fetched


def visits_of(
    decoder: Decoder, specs: Sequence[BlockSpec], fetched: Sequence[BlockSpec], compute: Compute
) -> dict[int, LayerBlocks]:
    """By layer, of the blocks in a store and of experts beside it."""
    numbers: dict[int, list[int]] = {}
    for number, spec in enumerate(specs):
        if spec.layer is not None:
            numbers.setdefault(spec.layer, []).append(number)
    beside: dict[int | None, list[BlockShape]] = {}
    for spec in fetched:
        beside.setdefault(spec.layer, []).append(spec.shape)
    found = {}
    for layer, (attention, *feeds) in numbers.items():
        described, element = decoder.layers[layer], compute.dtype.itemsize
        at_once = experts_at_once(decoder, described, element, cpu=compute.cpu)
        groups = tuple(
            FeedGroup(tuple(some), tuple(specs[number].shape for number in some))
            for some in groups_of(feeds, [specs[number].shape for number in feeds], at_once)
        )
        own = tuple(beside.get(layer, ()))
        found[layer] = LayerBlocks(attention, groups, at_once, own)
    return found


class Visits:
    """Progress: a visit is a tile's attention, or an expert or MLP with all tiles."""

    def __init__(self, progress: Progress, layers: Sequence[LayerBlocks], tiles: int) -> None:
        self.progress, self.done = progress, 0
        self.total = len(layers) * tiles + sum(len(blocks.feeds) for blocks in layers)

    def __call__(self, count: int = 1) -> None:
        self.done += count
        self.progress("sweep", self.done, self.total)

"""What a walk over an engine's blocks visits, and in which order: found once, walked many times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layersweep.families.spec import Decoder
from layersweep.families.weights import BlockShape
from layersweep.model.compute import Compute
from layersweep.model.routing import Routing
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.shapes import experts_at_once
from layersweep.sweep.feed import groups_of


@dataclass(frozen=True)
class FeedGroup:
    """An MLP, a shared expert, or routed experts that are dense together: their numbers in the
    store, and their shapes. `experts`: the first, and the first beyond; None where all rows go."""

    numbers: tuple[int, ...]
    shapes: tuple[BlockShape, ...]
    experts: tuple[int, int] | None

    @classmethod
    def of(cls, numbers: Sequence[int], shapes: Sequence[BlockShape]) -> FeedGroup:
        first, last = shapes[0].expert, shapes[-1].expert
        routed = None if first is None or last is None else (first, last + 1)
        return cls(tuple(numbers), tuple(shapes), routed)

    def has_rows(self, routings: Sequence[Routing | None]) -> bool:
        """Whether any tile sends rows here, once the host knows."""
        if self.experts is None:
            return True
        first, last = self.experts
        return any(one.start[last] > one.start[first] for one in routings if one)


@dataclass(frozen=True)
class LayerBlocks:
    """Of one layer: the number of attention's block, and its feed in the order of visits, up to
    `at_once` experts in a group. `top_k` of `experts` for each row; 0 where nothing is routed."""

    attention: int
    groups: tuple[FeedGroup, ...]
    at_once: int
    top_k: int
    experts: int

    def reached_by(self, rows: int) -> bool:
        """Whether the first group is likely to be among those that so many rows go to."""
        return self.groups[0].experts is None or rows * self.top_k >= self.experts


class WalkedBlocks:
    """Of an engine. `embedding` and `head` are numbers in the store, where it has these blocks
    (its first and its last one)."""

    def __init__(self, decoder: Decoder, specs: Sequence[BlockSpec], compute: Compute) -> None:
        of_layer: dict[int, list[int]] = {}
        for number, spec in enumerate(specs):
            if spec.layer is not None:
                of_layer.setdefault(spec.layer, []).append(number)
        self.embedding, self.head = 0, len(specs) - 1
        self.layers: dict[int, LayerBlocks] = {}
        for layer, (attention, *feeds) in of_layer.items():
            described, element = decoder.layers[layer], compute.dtype.itemsize
            at_once = experts_at_once(decoder, described, element, cpu=compute.cpu)
            groups = groups_of(feeds, [specs[number].shape for number in feeds], at_once)
            router = described.feed.router
            self.layers[layer] = LayerBlocks(
                attention,
                tuple(FeedGroup.of(some, [specs[n].shape for n in some]) for some in groups),
                at_once,
                router.top_k if router else 0,
                described.feed.experts,
            )

    @property
    def feeds(self) -> int:
        """Blocks that are an MLP or an expert."""
        every = (group for layer in self.layers.values() for group in layer.groups)
        return sum(len(group.numbers) for group in every)

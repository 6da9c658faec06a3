"""One walk over the weights: each text that grows reads its next tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.sweep.engine import Engine
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.record import Pieces, Progress
from layersweep.sweep.running import RunningCaches, Text
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile

TILE = 20  # prompts of a tile at most
TILE_ROWS = 4096  # and tokens of all of them


@dataclass(frozen=True, eq=False)
class Rider:
    """Tokens `ids` that a text reads; the logits of the last `wanted` of them are of interest."""

    text: Text
    ids: tuple[int, ...]
    wanted: int = 1

    @property
    def sequence(self) -> BranchedSequence:
        tokens = len(self.ids)
        branch = Branch(self.text.arm, self.ids, (tokens - self.wanted, tokens))
        return BranchedSequence((), (branch,), self.text.end)


@dataclass(frozen=True)
class Walked:
    """`logits` float32 [wanted, V] of each rider, on the device. `broken`: riders with non-finite
    numbers, and the first layer that has them."""

    logits: dict[Rider, Tensor]
    broken: dict[Rider, int]


@torch.inference_mode()
def walk(
    engine: Engine, caches: RunningCaches, riders: Sequence[Rider],
    progress: Progress = lambda phase, done, total: None,
) -> Walked:  # fmt: skip
    """Every text reads its rider's tokens, which it then has. The texts are different ones."""
    for rider in riders:
        caches.make_room(rider.text, rider.text.end + len(rider.ids))
    of = {rider.text: rider for rider in riders}
    order = [of[text] for text in caches.in_order(list(of))]
    seats = list(_together(order))
    tiles = [
        Tile("running", tuple(rider.sequence for rider in some), first)
        for first, some in enumerate(seats)
    ]
    caches.ride([
        (tile, [rider.text for rider in some]) for tile, some in zip(tiles, seats, strict=True)
    ])  # fmt: skip
    logits: dict[Rider, Tensor] = {}

    def keep(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
        counts = [rider.wanted for rider in seats[tile.first]]
        kept = torch.empty(
            sum(counts), engine.decoder.vocab_size, dtype=torch.float32,
            device=engine.compute.device,
        )  # fmt: skip
        for at, (some,) in pieces:
            kept[at] = some
        logits.update(zip(seats[tile.first], torch.split(kept, counts), strict=True))

    record = run_sweep(engine, tiles, keep, caches=caches, progress=progress)
    for rider in riders:
        rider.text.end += len(rider.ids)
    bad = {(tile, row): layer for (tile, row, _), layer in record.nonfinite.items()}
    return Walked(logits, {seats[tile][row]: layer for (tile, row), layer in bad.items()})


def _together(order: Sequence[Rider]) -> Iterator[list[Rider]]:
    """Riders of a tile each: all that read one token, then the others, a few together."""
    steps = [rider for rider in order if len(rider.ids) == 1]
    if steps:
        yield steps
    longer = [rider for rider in order if len(rider.ids) > 1]
    some: list[Rider] = []
    for rider in sorted(longer, key=lambda one: (one.text.arm.name, len(one.ids))):
        rows = sum(len(one.ids) for one in some) + len(rider.ids)
        if some and (len(some) == TILE or rows > TILE_ROWS):
            yield some
            some = []
        some.append(rider)
    if some:
        yield some

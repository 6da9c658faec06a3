"""One walk over the weights: each text that grows reads its next tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.sweep.engine import Engine
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.record import Pieces, Progress, SweepRecord
from layersweep.sweep.running import RunningCaches, Text
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile
from layersweep.sweep.turn import HostTurn

TILE = 20  # prompts of a tile at most
TILE_ROWS = 4096  # and tokens of all of them


@dataclass(frozen=True, eq=False)
class Passage:
    """Tokens `ids` that a text reads next; the logits of the last `wanted` are of interest."""

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
    """`logits` float32 [wanted, V] of each passage, on the device. `broken`: those with non-finite
    numbers, and the first layer that has them."""

    record: SweepRecord
    logits: dict[Passage, Tensor]
    broken: dict[Passage, int]


@torch.inference_mode()
def walk(
    engine: Engine, caches: RunningCaches, passages: Sequence[Passage],
    progress: Progress = lambda phase, done, total: None, turn: HostTurn | None = None,
) -> Walked:  # fmt: skip
    """Every text reads its passage, which it then has. The texts are different ones, and there is
    room for them in `caches`. Where memory ends they have what they had; but what is coded may have
    taken some tokens."""
    of = {passage.text: passage for passage in passages}
    order = [of[text] for text in caches.in_order(list(of))]
    seats = list(_together(order))
    tiles = [
        Tile("running", tuple(passage.sequence for passage in some), first)
        for first, some in enumerate(seats)
    ]
    caches.ride([
        (tile, [passage.text for passage in some]) for tile, some in zip(tiles, seats, strict=True)
    ])  # fmt: skip
    logits: dict[Passage, Tensor] = {}

    def keep(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
        counts = [passage.wanted for passage in seats[tile.first]]
        kept = torch.empty(
            sum(counts), engine.decoder.vocab_size, dtype=torch.float32,
            device=engine.compute.device,
        )  # fmt: skip
        for at, (some,) in pieces:
            kept[at] = some
        logits.update(zip(seats[tile.first], torch.split(kept, counts), strict=True))

    record = run_sweep(engine, tiles, keep, caches=caches, progress=progress, turn=turn)
    for passage in passages:
        passage.text.end += len(passage.ids)
    bad = {(tile, row): layer for (tile, row, _), layer in record.nonfinite.items()}
    return Walked(record, logits, {seats[tile][row]: layer for (tile, row), layer in bad.items()})


def _together(order: Sequence[Passage]) -> Iterator[list[Passage]]:
    """Passages of a tile each: all that read one token, then the others, a few together."""
    steps = [passage for passage in order if len(passage.ids) == 1]
    if steps:
        yield steps
    longer = [passage for passage in order if len(passage.ids) > 1]
    some: list[Passage] = []
    for passage in sorted(longer, key=lambda one: (one.text.arm.name, len(one.ids))):
        rows = sum(len(one.ids) for one in some) + len(passage.ids)
        if some and (len(some) == TILE or rows > TILE_ROWS):
            yield some
            some = []
        some.append(passage)
    if some:
        yield some

"""Requests that run, and how they ride on a walk: in which tiles, with which of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layersweep.generate.request import Request
from layersweep.sweep.running import Text
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile
from layersweep.text.streaming import TextStream

TILE = 20  # prompts of a tile at most
TILE_ROWS = 4096  # and tokens of all of them


@dataclass(eq=False)
class Run:
    """A request on its way. `ids`: its prompt and what has been chosen; `rides`: how many of them
    the walk reads that is next."""

    request: Request
    text: Text
    stream: TextStream | None
    ids: list[int]
    slot: int = -1
    rides: int = 0
    cancelled: bool = False

    @property
    def unread(self) -> int:
        """Tokens whose keys are not kept yet."""
        return len(self.ids) - self.text.end

    @property
    def made(self) -> int:
        return len(self.ids) - len(self.request.ids)


def together(order: Sequence[Run]) -> Iterator[list[Run]]:
    """Requests of a tile each: all that get their next token, then those that are read, a few
    together."""
    steps = [run for run in order if run.rides == 1]
    if steps:
        yield steps
    some: list[Run] = []
    for run in sorted((r for r in order if r.rides > 1), key=lambda r: (r.text.arm.name, r.rides)):
        if some and (len(some) == TILE or sum(r.rides for r in some) + run.rides > TILE_ROWS):
            yield some
            some = []
        some.append(run)
    if some:
        yield some


def tile_of(runs: list[Run], first: int) -> tuple[Tile, list[Run]]:
    return Tile("running", tuple(map(_sequence, runs)), first), runs


def _sequence(run: Run) -> BranchedSequence:
    """The tokens of a request that ride, of which the last one's logits are read."""
    ids = tuple(run.ids[run.text.end : run.text.end + run.rides])
    return BranchedSequence(
        (), (Branch(run.text.arm, ids, (len(ids) - 1, len(ids))),), run.text.end
    )

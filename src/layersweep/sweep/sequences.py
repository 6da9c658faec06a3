"""What rides on a sweep: sequences with branches, laid out as the rows of a tile.

A sequence is a prefix, computed once, and branches that continue it. Each branch sees the
prefix's keys and values through its own codec (its arm). A tile is a fixed number of whole
sequences with all their branches: the unit of numerics, since an expert's rows of a tile are
one matrix product.

    tile rows:  [prefix 0 | branch 0.0 | branch 0.1 | prefix 1 | branch 1.0 | ...]
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from layersweep.kv.arms import EXACT, Arm

Role = Literal["baseline", "arm", "control"]


@dataclass(frozen=True)
class Branch:
    """Tokens `ids` that continue the sequence's prefix, read through `arm`.

    `read` = (start, stop): the rows of this branch whose logits are wanted; row r predicts
    the token after ids[r]. With `streaming`, the branch's own keys and values also pass
    through the codec before anything reads them. `role`: the exact baseline, an arm, or a control
    that measures noise.
    """

    arm: Arm
    ids: tuple[int, ...]
    read: tuple[int, int]
    streaming: bool = False
    role: Role = "arm"


@dataclass(frozen=True)
class BranchedSequence:
    """A prefix (possibly empty) and the branches that continue it.

    `past` is the number of tokens that earlier sweeps left in this sequence's cache: 0 in an
    evaluation, where a layer's keys and values are dropped when the layer is left.
    """

    prefix: tuple[int, ...]
    branches: tuple[Branch, ...]
    past: int = 0

    @cached_property
    def rows(self) -> int:
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)

    @property
    def longest(self) -> int:
        """Keys that its longest branch sees, itself included."""
        return self.past + len(self.prefix) + max(len(branch.ids) for branch in self.branches)

    @property
    def is_step(self) -> bool:
        """Each branch goes on by one token."""
        return not self.prefix and all(len(branch.ids) == 1 for branch in self.branches)

    @property
    def shape(self) -> tuple[object, ...]:
        """Sequences of equal shape are attended together; steps whatever came before them."""
        branches = tuple((b.arm.name, len(b.ids), b.streaming) for b in self.branches)
        return (len(self.prefix), None if self.is_step else self.past, branches)


@dataclass(frozen=True)
class Group:
    """Consecutive sequences of equal shape: rows [start, start + count * rows_each)."""

    sequences: tuple[BranchedSequence, ...]
    first: int
    start: int

    @property
    def rows_each(self) -> int:
        return self.sequences[0].rows

    @property
    def stop(self) -> int:
        return self.start + len(self.sequences) * self.rows_each


@dataclass(frozen=True)
class Tile:
    """Whole sequences that are computed together.

    `name` says what job they belong to, `first` is the job's index of the first of them.
    """

    name: str
    sequences: tuple[BranchedSequence, ...]
    first: int = 0

    @cached_property
    def rows(self) -> int:
        return sum(sequence.rows for sequence in self.sequences)

    @property
    def branches(self) -> int:
        """Most of one sequence."""
        return max(len(sequence.branches) for sequence in self.sequences)

    def ids(self) -> NDArray[np.int64]:
        """All token ids in row order, [rows]."""
        parts = ((s.prefix, *(b.ids for b in s.branches)) for s in self.sequences)
        ids = itertools.chain.from_iterable(itertools.chain.from_iterable(parts))
        return np.fromiter(ids, np.int64, self.rows)

    def groups(self, most: int) -> list[Group]:
        """Runs of at most `most` equal-shaped sequences, of any number of steps."""
        groups: list[Group] = []
        first = start = 0
        while first < len(self.sequences):
            one, last = self.sequences[first], first
            while (
                last < len(self.sequences)
                and (last - first < most or one.is_step)
                and self.sequences[last].shape == one.shape
            ):
                last += 1
            groups.append(Group(self.sequences[first:last], first, start))
            start, first = groups[-1].stop, last
        return groups


def reference_tile(ids: tuple[int, ...]) -> Tile:
    """The reference text as a tile of its own; no logits are read."""
    branch = Branch(EXACT, ids, (0, 0), role="baseline")
    return Tile("reference", (BranchedSequence((), (branch,)),))


def want_reference(tiles: list[Tile]) -> bool:
    """Whether prefixes of `tiles` are encoded in coordinates that come from it."""
    sequences = [one for tile in tiles for one in tile.sequences if not one.past]
    return any(branch.arm.fits for one in sequences for branch in one.branches)


def tiles_of(name: str, sequences: list[BranchedSequence], size: int) -> list[Tile]:
    """Cut sequences into tiles of `size`; the last may be smaller."""
    cuts = range(0, len(sequences), size)
    return [Tile(name, tuple(sequences[cut : cut + size]), cut) for cut in cuts]

"""Keys and values of texts that grow: each enters, gets a token with every walk, and leaves.

What attention reads of a text lies in a row of a shelf, a tensor for all texts of one arm and about
one length, so that a step attends to all of them in one call:

    shelf of (arm, capacity), per layer:   [rows, heads, capacity, dim], a tensor per stream

Rows have keys AFTER RoPE and values; of latents, what the cache keeps. Under an arm with a codec
the truth is a KvStore beside the row. It is written when tokens leave the arm's window, a block at
a time, and then the row is decoded anew from it, so that no token decodes the whole history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from layersweep.families.spec import Decoder, Rope
from layersweep.kv.arms import Arm
from layersweep.kv.fit import Fit
from layersweep.kv.store import KvStore
from layersweep.sweep.sequences import Tile
from layersweep.sweep.state import COLUMN_ALIGNMENT
from layersweep.sweep.streams import streams_of

SMALLEST = 64  # tokens of the smallest shelf; each is twice as long as the one before
SPARE = 8  # texts for each row that a shelf may have too many
# Tokens before RoPE, columns [first, last) of streams [1, heads, T, dim]: of a prompt, or one of
# the new tokens of all texts of a step, which are copied at once.
Waiting = tuple[tuple[Tensor, ...], int, int]


@dataclass(eq=False)
class Text:
    """One that grows: `end` tokens are kept, at most `reach` will be. `stores`, `coded` and
    `pending` have an entry per layer: what is coded, up to which position, and the tokens that are
    not in it yet. `packed_bytes`: of what is coded. `aside`: by layer, what its row had, while it
    has none."""

    arm: Arm
    reach: int
    layers: int
    end: int = 0
    stores: list[KvStore | None] = field(init=False)
    coded: list[int] = field(init=False)
    pending: list[list[Waiting]] = field(init=False)
    packed_bytes: int = field(init=False)
    aside: dict[int, list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        self.end, self.aside = 0, {}
        self.stores = [None] * self.layers
        self.coded = [0] * self.layers
        self.pending = [[] for _ in range(self.layers)]
        self.packed_bytes = 0

    def keep(self, layer: int, store: KvStore, coded: int) -> None:
        """In place of what was coded of a layer; up to position `coded`, and exactly beyond."""
        before = self.stores[layer]
        self.packed_bytes += _held_bytes(store) - (_held_bytes(before) if before else 0)
        self.stores[layer], self.coded[layer] = store, coded

    @property
    def aside_bytes(self) -> int:
        """Of what it has put aside."""
        return sum(x.nbytes for held in self.aside.values() for x in held)


@dataclass(eq=False)
class Shelf:
    """Rows of the texts of one arm that have at most `capacity` tokens."""

    capacity: int
    texts: list[Text] = field(default_factory=list)
    layers: dict[int, list[Tensor]] = field(default_factory=dict)
    arriving: list[Text] = field(default_factory=list)

    def views(self, layer: int, like: Sequence[Tensor]) -> list[Tensor]:
        """Memory of a layer, [rows, heads, capacity, dim] for each of `like` [B, heads, T, dim],
        with a row for every text and few others."""
        found, rows = self.layers.get(layer), len(self.texts)
        if found is None or not rows <= len(found[0]) <= rows + rows // SPARE:
            sizes = [(rows, x.shape[1], self.capacity, x.shape[3]) for x in like]
            moved = [x.new_zeros(size) for x, size in zip(like, sizes, strict=True)]
            for new, old in zip(moved, found or moved, strict=True):
                new[: len(old)] = old[:rows]
            self.layers[layer] = found = moved
        for text in self.arriving:
            row = self.texts.index(text)
            for view, x in zip(found, text.aside.pop(layer, ()), strict=False):
                view[row, :, : text.end] = x[0]
        return found

    def place(self, text: Text) -> None:
        """A row for it, into which goes what it has put aside."""
        self.texts.append(text)
        self.arriving = [one for one in self.arriving if one.aside]
        if text.aside:
            self.arriving.append(text)

    def take(self, text: Text, aside: torch.device | None) -> None:
        """Its row is free; the last one takes its place, so that rows stay together. What it held
        is wiped: a NaN would spoil what adds nothing to it. It is put `aside` on that device."""
        row, last = self.texts.index(text), len(self.texts) - 1
        for layer, views in self.layers.items():
            if row >= len(views[0]):
                continue
            if aside and layer not in text.aside:
                held = [view[row : row + 1, :, : text.end] for view in views]
                text.aside[layer] = [x.to(aside, copy=True) for x in held]
            for view in views:
                if last < len(view):
                    view[row] = view[last]
                    view[last] = 0
                else:  # the last one came for this walk, and what it has is put aside
                    view[row] = 0
        self.texts[row] = self.texts[last]
        self.texts.pop()
        if text in self.arriving:
            self.arriving.remove(text)
        if not self.texts:
            self.layers.clear()


@dataclass(eq=False)
class Rows:
    """A shelf's part in a step: texts `first` to `first + len(rows)` of the group ride, in `rows`
    of the shelf; the shelf's others are there as well and nobody looks at what they give. `ends`:
    tokens that each has."""

    shelf: Shelf
    device: torch.device
    first: int
    rows: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    _bias: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row, and column of the new token, of each text, int64 on the device."""
        row, end = torch.tensor([self.rows, self.ends]).to(self.device)
        return row, end

    @property
    def columns(self) -> int:
        """Of the longest, its new token included, aligned as kernels want it."""
        columns = max(self.ends) + 1
        return columns + -columns % COLUMN_ALIGNMENT

    @cached_property
    def every(self) -> bool:
        """Whether all rows of the shelf ride, in order."""
        return self.rows == list(range(len(self.shelf.texts)))

    def bias(self, window: int | None, like: Tensor) -> Tensor:
        """What is added to scores [rows of the shelf, columns]: -inf where a text has no token, or
        one behind the window."""
        key = window, like.dtype
        if key not in self._bias:
            end = torch.zeros(len(self.shelf.texts), 1, dtype=torch.long)
            end[self.rows, 0] = torch.tensor(self.ends)
            at = torch.arange(self.columns)
            seen = at <= end
            if window is not None:
                seen &= at > end - window
            bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
            self._bias[key] = bias.to(like.device, like.dtype)
        return self._bias[key]


@dataclass(eq=False)
class Ride:
    """Texts of one tile, in the tile's order, and where each has its next token."""

    texts: list[Text]
    device: torch.device
    # cos and sin of `positions`, by RoPE and by which of the texts
    turned: dict[tuple[Rope, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [texts] of a step."""
        return torch.tensor([text.end for text in self.texts], device=self.device)


class RunningCaches:
    """The texts that run, their rows, and which of them ride in which tile of a walk. `fits`: by
    layer, what is fitted to the reference text, once for all walks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shelves: dict[tuple[Arm, int], Shelf] = {}
        self.at: dict[Text, Shelf] = {}
        self.fits: dict[int, Fit] = {}
        self.rides: dict[int, Ride] = {}
        self._parts: dict[tuple[int, int, int], list[Rows]] = {}

    def make_room(self, text: Text, tokens: int) -> None:
        """A row of at least `tokens`, with what the text has."""
        before = self.at.get(text)
        if before is not None and before.capacity >= tokens:
            return
        if before is not None:
            before.take(text, self.device)
        capacity = capacity_for(tokens, text.reach)
        self.at[text] = self.shelves.setdefault((text.arm, capacity), Shelf(capacity))
        self.at[text].place(text)

    def leave(self, text: Text, *, aside: bool = False) -> None:
        """Its row is free. `aside`: what it held waits in host memory."""
        shelf = self.at.pop(text, None)
        if shelf is not None:
            shelf.take(text, torch.device("cpu") if aside else None)

    def ride(self, tiles: Sequence[tuple[Tile, Sequence[Text]]]) -> None:
        """These tiles ride next, with these texts, for which there is room."""
        self.rides = {tile.first: Ride(list(texts), self.device) for tile, texts in tiles}
        self._parts = {}

    def rows_of(self, tile: Tile, first: int, count: int) -> list[Rows]:
        """The shelves that some texts of a step lie on, in the order of the texts."""
        at = tile.first, first, count
        if at not in self._parts:
            texts = self.rides[tile.first].texts[first : first + count]
            found: list[Rows] = []
            for index, text in enumerate(texts):
                shelf = self.at[text]
                if not found or found[-1].shelf is not shelf:
                    found.append(Rows(shelf, self.device, index))
                found[-1].rows.append(shelf.texts.index(text))
                found[-1].ends.append(text.end)
            self._parts[at] = found
        return self._parts[at]

    def in_order(self, texts: Sequence[Text]) -> list[Text]:
        """Texts of one arm together, and of one shelf, row after row: what rides so is one call."""
        shelves = list(self.shelves.values())
        place = {
            text: (at, row)
            for at, shelf in enumerate(shelves)
            for row, text in enumerate(shelf.texts)
        }
        return sorted(texts, key=lambda text: (text.arm.name, place[text]))

    @property
    def nbytes(self) -> int:
        """Of all rows, and of what is coded."""
        views = (x for shelf in self.shelves.values() for of in shelf.layers.values() for x in of)
        return sum(x.nbytes for x in views) + sum(text.packed_bytes for text in self.at)


def _held_bytes(store: KvStore) -> int:
    return sum(stream.held_bytes for stream in store.arms[0])


def capacity_for(tokens: int, reach: int) -> int:
    """Columns of the smallest shelf for so many tokens of a text that has at most `reach`."""
    capacity = SMALLEST
    while capacity < tokens:
        capacity *= 2
    return min(capacity, max(reach + -reach % COLUMN_ALIGNMENT, SMALLEST))


def row_bytes(decoder: Decoder, capacity: int, element: int) -> int:
    """Of one row on a shelf, in all layers."""
    width = sum(
        stream.heads * stream.dim
        for layer in decoder.layers
        for stream in streams_of(layer.attention)
    )
    return width * capacity * element

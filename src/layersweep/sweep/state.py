"""A tile in flight: its hidden states, the routing of the current layer, and its health."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from layersweep.model.ops import NEVER
from layersweep.model.routing import Routing
from layersweep.sweep.sequences import BranchedSequence, Group, Tile

# Sequences attended in one call. Bounded by shape alone, never by a budget, so that numbers
# do not depend on the machine: keys and values of a call stay below this many elements.
ATTENTION_ELEMENTS = 48 * 2**20
# Keys of the branches whose next tokens are attended in one call, likewise.
STEP_ELEMENTS = 64 * 2**20
COLUMN_ALIGNMENT = 8  # of a mask's rows, for the memory-efficient kernel


def attention_batch(longest: int, heads_times_dim: int) -> int:
    """Sequences of at most `longest` keys that one attention call takes."""
    return max(1, ATTENTION_ELEMENTS // (longest * heads_times_dim))


def kept_columns(prefix: int, question: int, new_tokens: int) -> int:
    """Columns that the next token of a branch may attend to, see sweep/caches.py."""
    return -(-(prefix + question + new_tokens) // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT


def arms_at_once(sequences: int, columns: int, kv_heads_times_dim: int) -> int:
    """Arms of a tile whose next tokens are attended in one call."""
    return max(1, STEP_ELEMENTS // (sequences * columns * kv_heads_times_dim))


class TileState:
    """Mutable state of one tile during a sweep."""

    def __init__(self, tile: Tile, heads_times_dim: int) -> None:
        self.tile = tile
        longest = max(sequence.longest for sequence in tile.sequences)
        self.groups: list[Group] = tile.groups(attention_batch(longest, heads_times_dim))
        self.hidden = torch.empty(0)
        self.update = torch.empty(0)
        self.normed: Tensor | None = None  # what the layer's experts see, where it is kept
        self.routing: Routing | None = None
        # logits are kept where `looked_at`, by who checks that the model works
        self.router_logits: Tensor | None = None
        self.looked_at = False
        self.unit_of_row, units = _units(tile)
        self.first_bad_layer = torch.full((units,), NEVER, dtype=torch.int32)

    def start(self, hidden_NH: Tensor, keeps_normed: bool) -> None:
        """Before the first layer, or before a later one on another device."""
        self.hidden = hidden_NH
        self.update = torch.zeros_like(hidden_NH)
        self.normed = torch.empty_like(hidden_NH) if keeps_normed else None
        self.unit_of_row = self.unit_of_row.to(hidden_NH.device)
        self.first_bad_layer = self.first_bad_layer.to(hidden_NH.device)

    def move(self, device: torch.device, keeps_normed: bool) -> int:
        """Go on between two layers on another device; the bytes that moved."""
        self.start(self.hidden.to(device), keeps_normed)
        return self.hidden.nbytes

    def nonfinite(self) -> dict[tuple[int, int], int]:
        """{(sequence, branch): first non-finite layer}; branch -1 is the prefix."""
        layers = self.first_bad_layer.tolist()
        found, unit = {}, 0
        for index, sequence in enumerate(self.tile.sequences):
            for branch in range(-1, len(sequence.branches)):
                if layers[unit] != NEVER:
                    found[index, branch] = layers[unit]
                unit += 1
        return found


def _units(tile: Tile) -> tuple[Tensor, int]:
    """The unit (a prefix or a branch) that each row belongs to, and how many there are."""
    lengths: list[int] = []
    for sequence in tile.sequences:
        lengths += [len(sequence.prefix), *(len(b.ids) for b in sequence.branches)]
    units = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return units.to(torch.int32), len(lengths)


Rows = tuple[int, int]  # the first, and the first beyond


def read_rows(sequence: BranchedSequence, start: int) -> list[Rows]:
    """Row ranges of the tile whose logits the branches of a sequence at `start` want."""
    ranges, at = [], start + len(sequence.prefix)
    for branch in sequence.branches:
        ranges.append((at + branch.read[0], at + branch.read[1]))
        at += len(branch.ids)
    return ranges


def pieces_of(ranges: list[Rows], at_once: int) -> Iterator[tuple[slice, list[Rows]]]:
    """`ranges` cut alike, `at_once` rows of each at a time: which of them, and where they are."""
    for start in range(0, max(last - first for first, last in ranges), at_once):
        cut = [(first + start, min(first + start + at_once, last)) for first, last in ranges]
        yield slice(start, start + at_once), [(min(rows), rows[1]) for rows in cut]


def lots_of(ranges: list[Rows], at_once: int) -> Iterator[list[Rows]]:
    """`ranges` in order, in lots of at most `at_once` rows."""
    lot: list[Rows] = []
    free = at_once
    for first, last in ranges:
        while first < last:
            stop = min(last, first + free)
            lot.append((first, stop))
            free -= stop - first
            first = stop
            if not free:
                yield lot
                lot, free = [], at_once
    if lot:
        yield lot

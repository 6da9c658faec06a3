"""A tile in flight: its hidden states, the routing of the current layer, and its health."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.sweep.sequences import Group, Sequence, Tile

# Sequences attended in one call. Bounded by shape alone, never by a budget, so that numbers
# do not depend on the machine: keys and values of a call stay below this many elements.
ATTENTION_ELEMENTS = 48 * 2**20


def attention_batch(longest: int, heads_times_dim: int) -> int:
    """Sequences of at most `longest` keys that one attention call takes."""
    return max(1, ATTENTION_ELEMENTS // (longest * heads_times_dim))


@dataclass(frozen=True)
class Routing:
    """Rows of a tile sorted by expert: rows[start[e]:start[e+1]] go to expert e.

    `weights` [N*K] belong to `rows`; `start` is on the host: one small copy per layer.
    """

    rows: Tensor
    weights: Tensor
    start: list[int]

    @classmethod
    def of(cls, experts_NK: Tensor, weights_NK: Tensor, num_experts: int) -> Routing:
        per_token = experts_NK.shape[1]
        flat = experts_NK.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=num_experts)
        start = [0, *counts.cumsum(0).tolist()]
        return cls(order // per_token, weights_NK.flatten()[order], start)


class TileState:
    """Mutable state of one tile during a sweep."""

    def __init__(self, tile: Tile, heads_times_dim: int) -> None:
        self.tile = tile
        longest = max(sequence.longest for sequence in tile.sequences)
        self.groups: list[Group] = tile.groups(attention_batch(longest, heads_times_dim))
        self.hidden = torch.empty(0)
        self.update = torch.empty(0)
        self.routing: Routing | None = None
        self.router_logits: Tensor | None = None
        self._unit_of_row, units = _units(tile)
        self.first_bad_layer = torch.full((units,), -1, dtype=torch.int32)

    def start(self, hidden_NH: Tensor) -> None:
        self.hidden = hidden_NH
        self.update = torch.zeros_like(hidden_NH)
        self._unit_of_row = self._unit_of_row.to(hidden_NH.device)
        self.first_bad_layer = self.first_bad_layer.to(hidden_NH.device)

    def leave_layer(self, layer: int) -> None:
        """Add the experts' sum once, and note who has become non-finite; no sync."""
        self.hidden += self.update
        self.update.zero_()
        self.routing = self.router_logits = None
        bad_rows = ~self.hidden.abs().amax(-1).isfinite()
        bad = torch.zeros_like(self.first_bad_layer)
        bad.index_add_(0, self._unit_of_row, bad_rows.to(torch.int32))
        newly = (bad > 0) & (self.first_bad_layer < 0)
        self.first_bad_layer = torch.where(newly, layer, self.first_bad_layer)

    def nonfinite(self) -> dict[tuple[int, int], int]:
        """{(sequence, branch): first non-finite layer}; branch -1 is the prefix."""
        layers = self.first_bad_layer.tolist()
        found, unit = {}, 0
        for index, sequence in enumerate(self.tile.sequences):
            for branch in range(-1, len(sequence.branches)):
                if layers[unit] >= 0:
                    found[index, branch] = layers[unit]
                unit += 1
        return found


def _units(tile: Tile) -> tuple[Tensor, int]:
    """The unit (a prefix or a branch) that each row belongs to, and how many there are."""
    lengths: list[int] = []
    for sequence in tile.sequences:
        lengths += [len(sequence.prefix), *(len(b.ids) for b in sequence.branches)]
    units = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return units, len(lengths)


def read_rows(sequence: Sequence, start: int) -> list[tuple[int, int]]:
    """Row ranges of the tile whose logits the branches of a sequence at `start` want."""
    ranges, at = [], start + len(sequence.prefix)
    for branch in sequence.branches:
        ranges.append((at + branch.read[0], at + branch.read[1]))
        at += len(branch.ids)
    return ranges

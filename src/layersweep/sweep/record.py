"""What a sweep tells: who is told, what the lead tile looks like, and what is left at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layersweep.sweep.sequences import BranchedSequence, Tile


@dataclass(frozen=True)
class LayerHealth:
    """What the lead tile looked like as it left a layer. `largest` may be infinite or NaN;
    `experts_used` and `router_spread` are None in a layer that routes nothing."""

    layer: int
    largest: float
    experts_used: int | None
    router_spread: float | None


@dataclass(frozen=True)
class HealthThere:
    """LayerHealth that is still on the device: float32 [2], or [1] without a router."""

    layer: int
    experts_used: int | None
    largest_and_spread: Tensor


Piece = tuple[slice, list[Tensor]]  # some of the positions that branches read: logits of each
Pieces = Iterable[Piece]
LogitsReader = Callable[[Tile, int, BranchedSequence, Pieces], None]
LayerCheck = Callable[[LayerHealth], None]
Progress = Callable[[str, int, int], None]


@dataclass
class SweepRecord:
    """What a sweep leaves besides logits.

    `cache_bits[tile name, arm]` = [bits stored, elements]; `nonfinite` = (tile index, index of
    the sequence within the tile, branch or -1 for the prefix) -> first bad layer; `seconds` per
    phase, by the device's own clock; `moved_bytes` of hidden states between devices. `sweeps` and
    `bytes_read` of weights: of all that `Model.run` did.
    """

    cache_bits: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    nonfinite: dict[tuple[int, int, int], int] = field(default_factory=dict)
    experts_used: list[int | None] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    moved_bytes: int = 0
    sweeps: int = 0
    bytes_read: int = 0

    def add(self, later: SweepRecord, ahead: int = 0) -> None:
        """Take over a later sweep of the same tiles, or of those after the first `ahead`."""
        for key, counted in later.cache_bits.items():
            total = self.cache_bits.setdefault(key, [0.0, 0.0])
            total[0] += counted[0]
            total[1] += counted[1]
        for (tile, sequence, branch), layer in later.nonfinite.items():
            where = ahead + tile, sequence, branch
            self.nonfinite[where] = min(layer, self.nonfinite.get(where, layer))
        for phase, seconds in later.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.moved_bytes += later.moved_bytes


def joined(pieces: Pieces) -> list[Tensor]:
    """Logits [rows, V] of each branch in memory of their own, for those who read few."""
    kept = [[logits.clone() for logits in of_branches] for _, of_branches in pieces]
    return [torch.cat(of_branch) for of_branch in zip(*kept, strict=True)]

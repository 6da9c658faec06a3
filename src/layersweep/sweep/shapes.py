"""Tiles as the planner sees them: sizes alone."""

from __future__ import annotations

from layersweep.stream.shapes import TileShape
from layersweep.sweep.sequences import BranchedSequence, Tile
from layersweep.sweep.state import attention_batch


def tile_shape(tile: Tile, heads_times_dim: int) -> TileShape:
    """What `make_plan` must know of a tile. `heads_times_dim`: query heads x head_dim."""
    longest = max(sequence.longest for sequence in tile.sequences)
    at_once = min(len(tile.sequences), attention_batch(longest, heads_times_dim))
    return TileShape(
        name=tile.name,
        rows=tile.rows,
        longest=longest,
        attention_keys=sum(_attended(sequence) for sequence in tile.sequences),
        read_rows=sum(_read(sequence) for sequence in tile.sequences),
        read_at_once=max(_read(sequence) for sequence in tile.sequences),
        branches=max(len(sequence.branches) for sequence in tile.sequences),
        sequences_at_once=at_once,
        rows_at_once=_rows_at_once(tile, longest, heads_times_dim),
    )


def _rows_at_once(tile: Tile, longest: int, heads_times_dim: int) -> int:
    groups = tile.groups(attention_batch(longest, heads_times_dim))
    return max(group.stop - group.start for group in groups)


def _attended(sequence: BranchedSequence) -> int:
    """Keys that all rows of a sequence attend to, together."""
    prefix = len(sequence.prefix)
    total = prefix * (prefix + 1) // 2
    for branch in sequence.branches:
        own = len(branch.ids)
        total += own * (prefix + sequence.past) + own * (own + 1) // 2
    return total


def _read(sequence: BranchedSequence) -> int:
    return sum(branch.read[1] - branch.read[0] for branch in sequence.branches)

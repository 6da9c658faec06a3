"""Tiles as the planner sees them: sizes alone. And how long a sequence may be."""

from __future__ import annotations

from collections import Counter

from layersweep.errors import InputError
from layersweep.families.spec import Decoder
from layersweep.stream.shapes import TileShape
from layersweep.sweep.sequences import BranchedSequence, Tile
from layersweep.sweep.state import attention_batch


def length_limit(decoder: Decoder) -> tuple[int, str]:
    """Most tokens of a sequence, and the field of config.json that says so."""
    return decoder.max_position_embeddings, "max_position_embeddings"


def check_length(decoder: Decoder, longest: int, shorten: str) -> None:
    """Raises InputError where the longest sequence has more tokens than the model's limit;
    `shorten` is how to ask for less."""
    limit, field = length_limit(decoder)
    if longest > limit:
        raise InputError(
            f"the longest sequence: found {longest} tokens, needed at most {limit}, the model's "
            f"limit ({field} in config.json)",
            hint=f"{shorten}: up to {limit} tokens",
        )


def tile_shape(tile: Tile, heads_times_dim: int) -> TileShape:
    """What `make_plan` must know of a tile. `heads_times_dim`: query heads x head_dim."""
    longest = max(sequence.longest for sequence in tile.sequences)
    at_once = min(len(tile.sequences), attention_batch(longest, heads_times_dim))
    return TileShape(
        name=tile.name,
        rows=tile.rows,
        longest=longest,
        spans=_spans(tile),
        read_rows=sum(_read(sequence) for sequence in tile.sequences),
        read_each=max(_read(sequence) for sequence in tile.sequences),
        branches=tile.branches,
        sequences_at_once=at_once,
        rows_at_once=_rows_at_once(tile, longest, heads_times_dim),
    )


def _rows_at_once(tile: Tile, longest: int, heads_times_dim: int) -> int:
    groups = tile.groups(attention_batch(longest, heads_times_dim))
    return max(group.stop - group.start for group in groups)


def _spans(tile: Tile) -> tuple[tuple[int, int, int], ...]:
    """(past, own, how often) of prefixes and branches."""
    found: Counter[tuple[int, int]] = Counter()
    for sequence in tile.sequences:
        prefix = len(sequence.prefix)
        if prefix:
            found[0, prefix] += 1
        for branch in sequence.branches:
            found[prefix + sequence.past, len(branch.ids)] += 1
    return tuple((past, own, count) for (past, own), count in found.items())


def _read(sequence: BranchedSequence) -> int:
    return sum(branch.read[1] - branch.read[0] for branch in sequence.branches)

"""Attention of one more token of every branch, over the caches that are kept: a tile at once.

Launches decide here, not bytes: a branch alone is tens of small steps in each layer. So the
branches of a tile, all sequences and arms, are one call, padded to the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from layersweep.model.attention import attend_one
from layersweep.sweep.caches import KeptCaches, KeptLayer, Pair
from layersweep.sweep.context import LayerContext
from layersweep.sweep.heads import Projected, Streams, read, rotary_part
from layersweep.sweep.sequences import Group, Tile
from layersweep.sweep.state import arms_at_once


def attend_step(
    tile: Tile, group: Group, projected: Projected, out: Tensor, context: LayerContext
) -> None:
    """Queries and streams of a row [B A] each, the next token of one branch; into `out` [B A, Q D].

    A row attends to all that its branch has seen, and to itself; its keys and values are kept.
    `group` is the whole tile.
    """
    assert isinstance(context.caches, KeptCaches)
    one, kept = context.attention, context.caches.layer(tile, context.index)
    arms, count = kept.shape.arms, len(group.sequences)
    step = kept.shape.step_of(tile)
    position, bias = kept.shape.at(step, one.window, projected.q)
    table = context.table(kept.shape.longest)
    if table is not None:  # each sequence has a place of its own
        table = table[0][position], table[1][position]
    # [B, heads, A, D] -> [A, heads, B, D]
    q, *streams = (x.transpose(0, 2) for x in (projected.q, *projected.streams))
    rotary = rotary_part(q, context)
    context.turn(rotary, table, 0, rotary)
    with context.scratch.frame():
        kept.extend(step, *read([tuple(streams)], 0, table, context))
    exact = kept.exact_on(q.device)
    attended = out.view(count, arms, one.num_heads, -1).transpose(0, 1)
    width = sum(x.shape[2] * x.shape[4] for x in kept.question) // 2
    size = arms_at_once(count, kept.shape.columns, width)
    for first in range(0, arms, size):
        some = slice(first, min(first + size, arms))
        with context.scratch.frame():
            keys, values = _columns(kept, some, exact, context)
            queries = q[some].transpose(1, 2)
            found = attend_one(
                queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1),
                bias.repeat(len(queries), 1), context.rule.masked(), context.sinks,
            )  # fmt: skip
            attended[some] = found.view(*queries.shape[:3], -1)


def _columns(kept: KeptLayer, arms: slice, exact: Sequence[Pair], context: LayerContext) -> Streams:
    """Keys (after RoPE) and values [A, B, G, columns, D] of some arms, finite in the padding, which
    would otherwise spoil what it adds nothing to."""
    shape = kept.shape
    both = []
    for question, _ in exact:
        sizes = (*question[arms].shape[:3], shape.columns, question.shape[4])
        both.append(context.scratch.take(*sizes, dtype=question.dtype))
    table = context.table(shape.longest)
    for prefixes in kept.prefixes_on(both[0].device, arms):
        rows, length, store = prefixes.rows, prefixes.length, prefixes.store
        for arm in range(len(store.arms) if store else 0):
            assert store is not None
            with context.scratch.frame():
                places = tuple(out[arm, rows, :, :length] for out in both)
                read(store.pieces(arm), prefixes.first, table, context, places)
        for out in both:
            out[:, rows, :, length : shape.prefix] = 0
    behind = shape.prefix + shape.question
    for out, (question, generated) in zip(both, exact, strict=True):
        out[..., shape.prefix : behind, :] = question[arms]
        out[..., behind:, :] = generated[:, arms].permute(1, 2, 3, 0, 4)
    return tuple(both)

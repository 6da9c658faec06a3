"""Attention of one more token of every branch, over the caches that are kept: a tile at once.

Launches decide here, not bytes: a branch alone is tens of small steps in each layer. So the
branches of a tile, all sequences and arms, are one call, padded to the longest of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layersweep.model.attention import attend_one
from layersweep.sweep.caches import KeptLayer, Pair
from layersweep.sweep.context import LayerContext
from layersweep.sweep.sequences import Group, Tile
from layersweep.sweep.state import arms_at_once


def attend_step(tile: Tile, group: Group, qkv: Tensor, out: Tensor, context: LayerContext) -> None:
    """qkv [B A, (Q + 2G) D] before RoPE, whose queries are overwritten; out [B A, Q D].

    A row is the next token of one branch. It attends to all that its branch has seen, and to
    itself; its keys and values are kept. `group` is the whole tile.
    """
    assert context.caches is not None
    config, kept = context.config, context.caches.layer(tile, context.layer)
    heads, kv_heads, dim = (
        config.num_attention_heads, config.num_key_value_heads, config.head_dim,
    )  # fmt: skip
    arms, count = kept.shape.arms, len(group.sequences)
    # [B, A, heads, D] -> [A, heads, B, D]: RoPE turns each sequence to a place of its own
    q, k, v = (
        x.permute(1, 2, 0, 3)
        for x in torch.split(qkv.view(count, arms, -1, dim), [heads, kv_heads, kv_heads], dim=2)
    )
    step = kept.shape.step_of(tile)
    position, bias = kept.shape.at(step, qkv)
    rope, at = context.compute.ops.rope, (context.cos[position], context.sin[position])
    rope(q, *at, 0, q)
    kept.extend(step, rope(k, *at, 0, k), v)
    exact = kept.exact_on(qkv.device)
    attended = out.view(count, arms, heads, dim).transpose(0, 1)
    size = arms_at_once(count, kept.shape.columns, kv_heads * dim)
    for first in range(0, arms, size):
        some = slice(first, min(first + size, arms))
        with context.scratch.frame():
            keys, values = _columns(kept, some, exact, context)
            queries = q[some].transpose(1, 2)
            found = attend_one(
                queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1),
                bias.repeat(len(queries), 1),
            )  # fmt: skip
            attended[some] = found.view(queries.shape)


def _columns(kept: KeptLayer, arms: slice, exact: Pair, context: LayerContext) -> Pair:
    """Keys (after RoPE) and values [A, B, G, columns, D] of some arms, finite in the padding, which
    would otherwise spoil what it adds nothing to."""
    shape, (question, generated) = kept.shape, (exact[0][:, arms], exact[1][:, :, arms])
    sizes = (*question.shape[1:4], shape.columns, question.shape[5])
    both = [context.scratch.take(*sizes, dtype=question.dtype) for _ in range(2)]
    for prefixes in kept.prefixes_on(question.device, arms):
        rows, length, store = prefixes.rows, prefixes.length, prefixes.store
        for arm, streams in enumerate(store.arms if store else ()):
            assert store is not None
            for x, stream, out in zip(store.decoded(arm), streams, both, strict=True):
                context.place(x, stream.stream, 0, out[arm, rows, :, :length])
        for x in both:
            if length < shape.prefix:
                x[:, rows, :, length : shape.prefix] = 0
    behind = shape.prefix + shape.question
    for index, x in enumerate(both):
        x[..., shape.prefix : behind, :] = question[index]
        x[..., behind:, :] = generated[:, index].permute(1, 2, 3, 0, 4)
    return both[0], both[1]

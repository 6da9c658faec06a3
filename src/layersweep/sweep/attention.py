"""The attention half of a layer visit: project, attend over KV views, route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from layersweep.kv.arms import Arm
from layersweep.kv.codec import key_group
from layersweep.kv.store import KvStore
from layersweep.model import maths
from layersweep.sweep.caches import Pair
from layersweep.sweep.context import LayerContext
from layersweep.sweep.sequences import Branch, Group, Tile
from layersweep.sweep.state import Routing, TileState, attention_batch
from layersweep.sweep.step import attend_step

QUERY_CHUNK = 512
STREAMING_MEAN = 128  # tokens that a channel mean comes from where later ones are not known yet


def visit_attention(state: TileState, context: LayerContext) -> None:
    """Attention and routing of one tile; the tile's hidden states are updated in place.

    It goes group by group, so that projections are held for a few sequences at a time.
    """
    routed = []
    for group in state.groups:
        with context.scratch.frame():
            routed.append(_visit_group(state, group, context))
    logits, share, experts = (torch.cat(parts) for parts in zip(*routed, strict=True))
    state.router_logits = logits
    state.routing = Routing.of(experts, share, context.config.num_local_experts)


def _visit_group(state: TileState, group: Group, context: LayerContext) -> tuple[Tensor, ...]:
    """Router logits, weights and experts of a group's rows, after their attention."""
    config, weights = context.config, context.weights
    ops, dtype = context.compute.ops, context.compute.dtype
    hidden, eps = state.hidden[group.start : group.stop], config.rms_norm_eps
    count, take = len(hidden), context.scratch.take
    normed = take(count, config.hidden_size, dtype=dtype)
    x = ops.rms_norm(hidden, weights.input_norm, eps, normed)
    qkv = ops.linear(x, weights.qkv, take(count, len(weights.qkv), dtype=dtype))
    del x
    out = take(count, weights.o_proj.shape[1], dtype=dtype)
    attend = attend_step if group.sequences[0].past else attend_group
    attend(state.tile, group, qkv, out, context)
    del qkv
    ops.add_linear_(hidden, out, weights.o_proj)
    x = ops.rms_norm(hidden, weights.post_attention_norm, eps, normed)
    keep_float = context.compute.router_float
    return maths.route(x, weights.router, config.num_experts_per_tok, keep_float=keep_float)


def attend_group(tile: Tile, group: Group, qkv: Tensor, out: Tensor, context: LayerContext) -> None:
    """Attention of a group of equal-shaped sequences.

    qkv [rows, (Q + 2G) D] before RoPE, whose queries may be overwritten; out [rows, Q D]. Each
    branch attends to its history (the prefix, decoded from the branch's arm) and to itself.
    """
    config, count = context.config, len(group.sequences)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    # [B, rows of a sequence, heads, D] -> [B, heads, rows, D]
    parts, out = (
        x.view(count, group.rows_each, -1, config.head_dim).transpose(1, 2) for x in (qkv, out)
    )
    q, k, v = torch.split(parts, [heads, kv_heads, kv_heads], dim=1)
    sequence = group.sequences[0]
    prefix = len(sequence.prefix)
    if prefix:
        own = slice(0, prefix)
        out[:, :, own] = _attend_prefix(q[:, :, own], k[:, :, own], v[:, :, own], context)
    past = k[:, :, :prefix], v[:, :, :prefix]
    readers = [branch.arm for branch in sequence.branches if not branch.streaming]
    store = _stored(readers, past, context) if prefix else None
    if store:
        _count(tile.name, readers, store, context)
    start, reader = prefix, 0
    for branch in sequence.branches:
        own = slice(start, start + len(branch.ids))
        kv = (k[:, :, own], v[:, :, own])
        with context.scratch.frame():
            if branch.streaming:
                attended = _attend_streaming(tile.name, branch, q[:, :, own], kv, context)
            else:
                seen = store.decoded(reader) if store else past
                attended = _attend_branch(q[:, :, own], seen, kv, context)
                reader += 1
            out[:, :, own] = attended
        start = own.stop
    if context.caches is not None:
        _keep(tile, group, store, (k[:, :, prefix:], v[:, :, prefix:]), context)


def _attend_prefix(q: Tensor, k: Tensor, v: Tensor, context: LayerContext) -> Tensor:
    with context.scratch.frame():
        keys = context.rope(k, 0, context.take_like(k, k.shape[2]))
        return context.compute.attention(context.rope(q, 0, q), keys, v)


def _attend_branch(q: Tensor, past: tuple[Tensor, ...], own: Pair, context: LayerContext) -> Tensor:
    """Queries over past and own keys, all rotated to their places, and values."""
    before, count = past[0].shape[2], own[0].shape[2]
    both = [context.take_like(x, before + count) for x in own]
    for x, new, stream, out in zip(past, own, context.plain_streams, both, strict=True):
        if before:
            context.place(x, stream, 0, out[:, :, :before])
        context.place(new, stream, before, out[:, :, before:])
    return context.compute.attention(context.rope(q, before, q), *both)


def _stored(
    arms: Sequence[Arm], kv: Pair, context: LayerContext, mean_tokens: int | None = None
) -> KvStore:
    """Keys and values as each arm keeps them."""
    streams = [(arm, context.streams(arm)) for arm in arms]
    layers = context.config.num_hidden_layers
    return KvStore.empty(streams, context.layer, layers, mean_tokens).appended(kv)


def _count(tile_name: str, arms: Sequence[Arm], store: KvStore, context: LayerContext) -> None:
    for index, arm in enumerate(arms):
        counted = context.cache_bits.setdefault((tile_name, arm.name), [0.0, 0.0])
        counted[0] += store.nbits(index)
        counted[1] += store.elements(index)


def _keep(
    tile: Tile, group: Group, prefix: KvStore | None, own: Pair, context: LayerContext
) -> None:
    """Put away what each branch has seen. `own`: keys before RoPE and values of all branches."""
    assert context.caches is not None
    before, branches = len(group.sequences[0].prefix), len(group.sequences[0].branches)
    pairs: list[Pair] = []
    with context.scratch.frame():
        for k, v in zip(*(x.chunk(branches, dim=2) for x in own), strict=True):
            pairs.append((context.rope(k, before, context.take_like(k, k.shape[2])), v))
        longest = max(sequence.longest for sequence in tile.sequences)
        width = context.config.num_attention_heads * context.config.head_dim
        at_once = attention_batch(longest, width)
        context.caches.layer(tile, context.layer).keep(group, prefix, pairs, at_once)


def _attend_streaming(
    tile_name: str, branch: Branch, q: Tensor, kv: Pair, context: LayerContext
) -> Tensor:
    """Every token reads the decoded K/V of every earlier token and of itself; with `@window=W`,
    the last W tokens (itself included) exactly, and exactly too the keys that wait until a group
    of theirs is full."""
    tokens, arm = q.shape[2], branch.arm
    group = 1 if arm.codec is None else key_group(arm.codec)
    attention = context.compute.attention
    stored = _stored([arm], kv, context, STREAMING_MEAN)
    _count(tile_name, [arm], stored, context)
    q = context.rope(q, 0, q)
    parts = 1 + (group > 1) + (arm.window > 0)
    keys = context.take_like(kv[0], parts * tokens)
    if parts == 1:
        coded_keys, coded_values = stored.decoded(0)
        return attention(q, context.rope(coded_keys, 0, keys), coded_values)
    coded = _stored([replace(arm, window=0)], kv, context, STREAMING_MEAN)
    coded_keys, coded_values = coded.decoded(0)
    values = [coded_values] * (1 + (group > 1)) + [kv[1]] * (arm.window > 0)
    for part, own in enumerate(keys.chunk(parts, dim=2)):
        context.rope(kv[0] if part else coded_keys, 0, own)
    together = torch.cat(values, dim=2)
    key_at = torch.arange(tokens, device=q.device)
    pieces = []
    for first in range(0, tokens, QUERY_CHUNK):
        at = key_at[first : first + QUERY_CHUNK, None]
        left = (at + 1 - arm.sink - arm.window).clamp(min=0)  # tokens that have left the window
        exact_keys, exact_values = arm.sink + left // group * group, arm.sink + left
        far, near = key_at < exact_keys, key_at >= exact_values
        masks = [far, ~far & ~near, near] if group > 1 else [far, near]
        mask = torch.cat(masks[:parts], dim=1) & (key_at <= at).repeat(1, parts)
        pieces.append(attention(q[:, :, first : first + QUERY_CHUNK], keys, together, mask))
    return torch.cat(pieces, dim=2)

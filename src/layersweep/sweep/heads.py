"""Normed rows -> queries and what the cache keeps -> keys and values, for grouped and latent heads.

Streams are what comes out of the projections, before RoPE: keys and values, or a latent and its
rotary key. `read` turns streams, as decoded from a cache, into what attention looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.model.attention import Pair
from layersweep.sweep.context import LayerContext, Table
from layersweep.sweep.sequences import BranchedSequence

Streams = tuple[Tensor, ...]  # [B, heads, T, D] each


@dataclass(frozen=True)
class Projected:
    """`q` [B, Q, T, D] before RoPE, which may be overwritten; `streams` [B, G, T, D] each."""

    q: Tensor
    streams: Streams


def project(x_NH: Tensor, sequences: int, context: LayerContext) -> Projected:
    """Queries and streams of N normed rows, `sequences` of equal length one after the other."""
    one = context.attention
    return (_latent if one.latent else _grouped)(x_NH, sequences, context)


def read(
    parts: Sequence[Streams], first: int, table: Table | None, context: LayerContext,
    into: Streams | None = None,
) -> Pair:  # fmt: skip
    """Keys, turned to positions from `first` on, and values of tokens that lie in one or several
    parts, one after the other; `into` given memory, or in the scratch, or as they come."""
    if context.attention.latent:
        whole = parts[0] if len(parts) == 1 else tuple(map(_joined, zip(*parts, strict=True)))
        return _expanded(whole, first, table, context, into)
    tokens = sum(part[0].shape[2] for part in parts)
    copies = into is not None or len(parts) > 1
    keys, values = into or (context.take_like(parts[0][0], tokens), parts[0][1])
    if copies and into is None:
        values = context.take_like(values, tokens)
    start = 0
    for part_keys, part_values in parts:
        stop = start + part_keys.shape[2]
        context.turn(part_keys, table, first + start, keys[:, :, start:stop])
        if copies:
            values[:, :, start:stop] = part_values
        start = stop
    return keys, values


def read_apart(
    streams: Streams, sequence: BranchedSequence, table: Table | None, context: LayerContext
) -> Streams | None:
    """The same of a prefix and all its branches, whose keys turn together, where attention reads a
    past apart from them; None where it does not. Latents have to become keys and values of one
    buffer with their past anyway."""
    if context.attention.latent or not context.compute.attention.reads_past:
        return None
    keys, values = streams
    turned = context.take_like(keys, keys.shape[2])
    return context.turn_branches(keys, table, sequence, turned), values


def rotary_part(q: Tensor, context: LayerContext) -> Tensor:
    """What turns of queries, in place."""
    latent = context.attention.latent
    return q[..., latent.nope_dim :] if latent else q


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.to(parts[-1].dtype) for part in parts], dim=2)


def _linear(x_NH: Tensor, weight: Tensor, bias: Tensor | None, context: LayerContext) -> Tensor:
    memory = context.scratch.take(len(x_NH), len(weight), dtype=context.compute.dtype)
    return context.compute.ops.linear(x_NH, weight, memory, bias)


def _product(x_NH: Tensor, name: str, context: LayerContext) -> Tensor:
    """By the weight `name`_proj, with its bias if the layer has one."""
    weights = context.weights
    return _linear(x_NH, weights[f"{name}_proj"], weights.get(f"{name}_bias"), context)


def _normed(x: Tensor, key: str, context: LayerContext) -> Tensor:
    """Rows normed by the weight `key`, or their heads, where it is as wide as one; in place."""
    one, weight = context.inner_norm, context.weights[key]
    rows = x.view(-1, len(weight))
    found = context.compute.ops.rms_norm(rows, weight, one.eps, rows, offset=one.offset)
    return found.view(x.shape)


def _heads(x_ND: Tensor, sequences: int, count: int) -> Tensor:
    """[N, count D] -> [B, count, T, D], a view."""
    return x_ND.view(sequences, len(x_ND) // sequences, count, -1).transpose(1, 2)


def _grouped(x_NH: Tensor, sequences: int, context: LayerContext) -> Projected:
    one = context.attention
    if one.qk_norm:
        q = _normed(_product(x_NH, "q", context), "q_norm", context)
        k = _normed(_product(x_NH, "k", context), "k_norm", context)
        v = _product(x_NH, "v", context)
    else:
        qkv = _product(x_NH, "qkv", context)
        q, k, v = torch.split(qkv, [one.query_width, one.key_width, one.value_width], dim=1)
    if one.clip is not None:
        q, k, v = (x.clamp_(-one.clip, one.clip) for x in (q, k, v))
    counts = (one.num_heads, one.num_kv_heads, one.num_kv_heads)
    q, k, v = (_heads(x, sequences, n) for x, n in zip((q, k, v), counts, strict=True))
    return Projected(q, (k, v))


def _latent(x_NH: Tensor, sequences: int, context: LayerContext) -> Projected:
    one, latent, weights = context.attention, context.attention.latent, context.weights
    assert latent is not None
    if latent.query_rank:
        low = _normed(_product(x_NH, "q_a", context), "q_a_norm", context)
        q = _product(low, "q_b", context)
    else:
        q = _product(x_NH, "q", context)
    down = weights["kv_a_proj"]
    low = _linear(x_NH, down[: latent.kv_rank], None, context)
    rotary = _linear(x_NH, down[latent.kv_rank :], None, context)
    streams = tuple(_heads(x, sequences, 1) for x in (_normed(low, "kv_a_norm", context), rotary))
    return Projected(_heads(q, sequences, one.num_heads), streams)


def _expanded(
    streams: Streams, first: int, table: Table | None, context: LayerContext, into: Streams | None
) -> Pair:
    """Keys [B, Q, T, nope + rope] and values of all heads from latents and rotary keys."""
    one, latent = context.attention, context.attention.latent
    assert latent is not None
    low, rotary = streams
    batch, _, tokens, _ = low.shape
    dtype = context.compute.dtype
    rows = low.reshape(batch * tokens, latent.kv_rank).to(dtype)
    both = _heads(_product(rows, "kv_b", context), batch, one.num_heads)
    shape = (batch, one.num_heads, tokens, one.head_dim)
    keys = into[0] if into else context.scratch.take(*shape, dtype=dtype)
    keys[..., : latent.nope_dim] = both[..., : latent.nope_dim]
    turned = context.turn(rotary, table, first, context.take_like(rotary, tokens))
    keys[..., latent.nope_dim :] = turned
    values = both[..., latent.nope_dim :]
    return keys, into[1].copy_(values) if into else values

"""The attention half of a layer visit: project, attend over KV views, route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from layersweep.families.spec import Norm
from layersweep.kv.arms import Arm
from layersweep.kv.codec import Grouping, grouping
from layersweep.kv.methods import FIRST_BLOCK
from layersweep.kv.store import KvStore
from layersweep.model.maths import linear
from layersweep.sweep.caches import KeptCaches
from layersweep.sweep.context import LayerContext, Table
from layersweep.sweep.heads import (
    Projected,
    Streams,
    project,
    read,
    read_apart,
    rotary_part,
)
from layersweep.sweep.reference import fitted
from layersweep.sweep.running import RunningCaches
from layersweep.sweep.running_attention import attend_running
from layersweep.sweep.sequences import Branch, BranchedSequence, Group, Tile
from layersweep.sweep.state import TileState, attention_batch
from layersweep.sweep.step import attend_step
from layersweep.sweep.watch import Attended

QUERY_CHUNK = 512


def visit_attention(state: TileState, context: LayerContext) -> None:
    """Attention and routing of one tile; the tile's hidden states are updated in place.

    It goes group by group, so that projections are held for a few sequences at a time.
    """
    parts = []
    for group in state.groups:
        with context.scratch.frame():
            _attend_rows(state, group, context)
        if context.layer.feed.router:
            rows = slice(group.start, group.stop)
            normed = None if state.normed is None else state.normed[rows]
            with context.scratch.frame():
                parts.append(_logits(state.hidden[rows], normed, context))
    if parts:
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        del parts
        _route(state, logits, context)


def _attend_rows(state: TileState, group: Group, context: LayerContext) -> None:
    """hidden += out_norm(o_proj(attention(in_norm(hidden)))) for a group's rows."""
    layer, weights, ops = context.layer, context.weights, context.compute.ops
    hidden = state.hidden[group.start : group.stop]
    take, dtype = context.scratch.take, context.compute.dtype
    x = hidden
    if layer.attention_norm:
        x = _normed(hidden, "attention_norm", layer.attention_norm, context)
    projected = project(x, len(group.sequences), context)
    if context.fits:
        context.fit = fitted(projected, context.table(group.rows_each), context)
    out = take(len(hidden), layer.attention.out_width, dtype=dtype)
    if isinstance(context.caches, RunningCaches):
        attend = attend_running
    else:
        attend = attend_step if group.sequences[0].past else attend_group
    attend(state.tile, group, projected, out, context)
    bias = weights.get("o_bias")
    if layer.attention_out_norm is None and bias is None and layer.residual == 1.0:
        ops.add_linear_(hidden, out, weights["o_proj"])
        return
    added = ops.linear(out, weights["o_proj"], take(*hidden.shape, dtype=dtype), bias)
    if layer.attention_out_norm:
        added = _normed(added, "attention_out_norm", layer.attention_out_norm, context)
    hidden.add_(added, alpha=layer.residual)


def _logits(hidden: Tensor, normed: Tensor | None, context: LayerContext) -> Tensor:
    """Router logits [N, E] of a group's rows, before a bias, in the dtype of the router's weight.
    One that is kept in float32 (DeepSeek, GLM) gets rows in float32. `normed`: where the rows that
    experts see are kept."""
    x, weight = hidden, context.weights["router"]
    if context.layer.feed_norm:
        x = _normed(hidden, "feed_norm", context.layer.feed_norm, context, normed)
    if normed is not None and x.data_ptr() != normed.data_ptr():
        normed.copy_(x)
    return linear(x.to(weight.dtype), weight)


def _route(state: TileState, logits: Tensor, context: LayerContext) -> None:
    feed, weights, compute = context.layer.feed, context.weights, context.compute
    assert feed.router is not None
    dtype = torch.float32 if compute.router_float else compute.dtype
    share, experts = compute.ops.choose_experts(
        logits, feed.router, dtype, weights.get("router_bias"), weights.get("router_correction")
    )
    state.routing = compute.ops.sort_by_expert(experts, share, feed.experts)
    if state.looked_at:
        state.router_logits = logits


def _normed(
    rows: Tensor, key: str, norm: Norm, context: LayerContext, memory: Tensor | None = None
) -> Tensor:
    """In `memory`, or in scratch."""
    if memory is None:
        memory = context.scratch.take(*rows.shape, dtype=context.compute.dtype)
    weight = context.weights[key]
    return context.compute.ops.rms_norm(rows, weight, norm.eps, memory, offset=norm.offset)


def attend_group(
    tile: Tile, group: Group, projected: Projected, out: Tensor, context: LayerContext
) -> None:
    """Attention of a group of equal-shaped sequences, into `out` [rows, Q D].

    Each branch attends to its history (the prefix, decoded from the branch's arm) and to itself. A
    layer with a window looks at the end of the prefix alone, which is what its cache holds.
    """
    count, q, streams = len(group.sequences), projected.q, projected.streams
    out = out.view(count, group.rows_each, context.attention.num_heads, -1).transpose(1, 2)
    sequence = group.sequences[0]
    prefix, table = len(sequence.prefix), context.table(_reach(tile, sequence, context))
    rotary = rotary_part(q, context)
    context.turn_branches(rotary, table, sequence, rotary)
    readers = [branch.arm for branch in sequence.branches if not branch.streaming]
    apart = read_apart(streams, sequence, table, context) if readers else None
    if prefix:
        own = slice(0, prefix)
        with context.scratch.frame():
            _attend(q[:, :, own], (), 0, streams, apart, own, table, context, out[:, :, own])
    first = context.plain_streams[0].first_held(prefix)
    past = _some(streams, slice(first, prefix))
    store = _stored(readers, past, context, first=first) if first < prefix else None
    if store:
        _count(tile.name, readers, store, context)
    start, reader = prefix, 0
    for branch in sequence.branches:
        own = slice(start, start + len(branch.ids))
        mine, its_q, its_out = _some(streams, own), q[:, :, own], out[:, :, own]
        with context.scratch.frame():
            if branch.streaming:
                _attend_streaming(tile.name, branch, its_q, mine, table, context, its_out)
            else:
                seen = store.pieces(reader) if store else ()
                _attend(its_q, seen, first, streams, apart, own, table, context, its_out)
                reader += 1
        start = own.stop
    if context.watch is not None and store is not None:
        mine = _some(streams, slice(prefix, prefix + len(sequence.branches[0].ids)))
        context.watch(Attended(group, q, out, mine, past, store, first, table, context))
    if isinstance(context.caches, KeptCaches):
        _keep(tile, group, first, store, streams, apart, table, context)


def _reach(tile: Tile, sequence: BranchedSequence, context: LayerContext) -> int:
    """Tokens that RoPE is made for: all that the sequence will have."""
    kept = context.caches
    return kept.tile(tile).longest if isinstance(kept, KeptCaches) else sequence.longest


def _some(streams: Streams, tokens: slice) -> Streams:
    return tuple(x[:, :, tokens] for x in streams)


def _attend(
    q: Tensor, past: Sequence[Streams], first: int, streams: Streams, apart: Streams | None,
    own: slice, table: Table | None, context: LayerContext, out: Tensor,
) -> None:  # fmt: skip
    """Queries of the tokens `own` over `past`, which begins at position `first`, and themselves.
    `apart`: turned keys and values of all tokens, where they are not joined to a past."""
    before = None
    if apart is None:
        keys, values = read([*past, _some(streams, own)], first, table, context)
    else:
        keys, values = _some(apart, own)
        before = read(past, first, table, context) if past else None
    attention, rule, sinks = context.compute.attention, context.rule, context.sinks
    attention(q, keys, values, rule=rule, sinks=sinks, past=before, out=out)


def _stored(
    arms: Sequence[Arm], streams: Streams, context: LayerContext, *, first: int = 0,
    mean_tokens: int | None = None, whole: bool = False,
) -> KvStore:  # fmt: skip
    """Tokens from position `first` on as each arm keeps them; the `whole` of them, or those that
    the next token can see."""
    of_arms = [(arm, context.streams(arm)) for arm in arms]
    if whole:
        of_arms = [(arm, tuple(replace(one, window=None) for one in own)) for arm, own in of_arms]
    layers = context.decoder.num_hidden_layers
    empty = KvStore.empty(of_arms, context.index, layers, mean_tokens, first=first)
    return empty.appended(streams)


def _count(tile_name: str, arms: Sequence[Arm], store: KvStore, context: LayerContext) -> None:
    for index, arm in enumerate(arms):
        counted = context.cache_bits.setdefault((tile_name, arm.name), [0.0, 0.0])
        counted[0] += store.nbits(index)
        counted[1] += store.elements(index)


def _keep(
    tile: Tile, group: Group, first: int, prefix: KvStore | None, streams: Streams,
    apart: Streams | None, table: Table | None, context: LayerContext,
) -> None:  # fmt: skip
    """Put away what each branch has seen. `apart` as in _attend."""
    assert isinstance(context.caches, KeptCaches)
    before, branches = len(group.sequences[0].prefix), len(group.sequences[0].branches)
    with context.scratch.frame():
        own = _some(apart or streams, slice(before, None))
        pairs: list[Streams] = [*zip(*(x.chunk(branches, dim=2) for x in own), strict=True)]
        if apart is None:
            pairs = [read([part], before, table, context) for part in pairs]
        longest = max(sequence.longest for sequence in tile.sequences)
        at_once = attention_batch(longest, context.decoder.query_width)
        context.caches.layer(tile, context.index).keep(group, first, prefix, pairs, at_once)


@lru_cache(maxsize=64)  # every layer asks alike, and a copy to a device makes the host wait
def _coded_until(arm: Arm, tokens: int, device: torch.device) -> Tensor:
    """Up to where the codec has the past of each of `tokens` tokens."""
    return torch.tensor([arm.coded_until(at + 1) for at in range(tokens)], device=device)


def _attend_streaming(
    tile_name: str, branch: Branch, q: Tensor, streams: Streams, table: Table | None,
    context: LayerContext, out: Tensor,
) -> None:  # fmt: skip
    """Every token reads what a cache holds once it is in, itself included: coded tokens, the newest
    of them with what is `fine`; exactly what has not left the window or filled a block, and keys,
    values or both that a codec has not let go of."""
    tokens, arm = q.shape[2], branch.arm
    roles = context.plain_streams[0].role, context.plain_streams[-1].role
    how_keys, how_values = (
        Grouping() if arm.codec is None else grouping(arm.codec, role) for role in roles
    )
    attention, rule, sinks = context.compute.attention, context.rule, context.sinks
    stored = _stored([arm], streams, context, mean_tokens=FIRST_BLOCK, whole=True)
    first = context.plain_streams[0].first_held(tokens)
    held = stored
    if first:  # all tokens are read here, each by those in whose window it is; a cache holds fewer
        held = _stored([arm], _some(streams, slice(first, tokens)), context, first=first)
    _count(tile_name, [arm], held, context)
    # One of the two is exact in between, where they are not let go of alike.
    between = how_keys != how_values
    near = arm.window > 0 or arm.block > 0 or Grouping() not in (how_keys, how_values)
    parts = 1 + (arm.fine > 0) + between + near
    if parts == 1:
        keys, values = read([stored.decoded(0)], 0, table, context)
        attention(q, keys, values, rule=rule, sinks=sinks, out=out)
        return
    exact = read([streams], 0, table, context)
    if arm.keeps_window(rule.window):
        attention(q, *exact, rule=rule, sinks=sinks, out=out)
        return
    # every token in each of the shapes that it takes as it ages, the last one first
    shapes = (0, tokens) if arm.fine else (0,)
    every = [replace(arm, window=0, block=0, fine=fine) for fine in shapes]
    coded = _stored(every, streams, context, mean_tokens=FIRST_BLOCK, whole=True)
    views = [read([coded.decoded(i)], 0, table, context) for i in range(len(every))]
    coded_keys, coded_values = views[-1]
    keys_wait = how_values == Grouping()
    views += [(exact[0], coded_values) if keys_wait else (coded_keys, exact[1])] * between
    views += [exact] * near
    keys, values = (torch.cat(part, dim=2) for part in zip(*views, strict=True))
    key_at = torch.arange(tokens, device=q.device)
    until = _coded_until(arm, tokens, q.device)
    for first in range(0, tokens, QUERY_CHUNK):
        some = slice(first, first + QUERY_CHUNK)
        at, left = key_at[some, None], until[some, None]
        keys_left, values_left = (
            arm.sink + (left - arm.sink - how.keep).clamp(min=0) // how.group * how.group
            for how in (how_keys, how_values)
        )
        coded_left = torch.minimum(keys_left, values_left)
        borders = [coded_left - arm.fine] * (arm.fine > 0) + [coded_left]
        borders += [torch.maximum(keys_left, values_left)] * between
        before = [key_at < border for border in borders]
        later = [torch.ones_like(before[0])]
        masks = [b & ~a for a, b in zip([~later[0], *before], [*before, *later], strict=True)]
        seen = key_at <= at
        if rule.window is not None:
            seen &= key_at > at - rule.window
        mask = torch.cat(masks[:parts], dim=1) & seen.repeat(1, parts)
        its_q, its_out = q[:, :, some], out[:, :, some]
        attention(its_q, keys, values, mask, rule=rule.masked(), sinks=sinks, out=its_out)

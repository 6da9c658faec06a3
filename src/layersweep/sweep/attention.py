"""The attention half of a layer visit: project, attend over KV views, route."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from layersweep.checkpoint.config import ModelConfig
from layersweep.kv.arms import Arm
from layersweep.kv.cache import CachedStream, Shared, store
from layersweep.kv.stream import Stream
from layersweep.model import maths
from layersweep.stream.blocks import Block
from layersweep.sweep.sequences import Branch, Group, Tile
from layersweep.sweep.state import Routing, TileState

QUERY_CHUNK = 512


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention block, dense in the compute dtype, on the compute device."""

    input_norm: Tensor
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    post_attention_norm: Tensor
    router: Tensor

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype) -> AttentionWeights:
        return cls(**{key: block.dense(key, dtype) for key in block.spec.weights})


@dataclass
class BranchCache:
    """What one layer keeps of one branch between sweeps: the prefix as its arm stores it,
    and the exact keys (before RoPE) and values of the tokens since."""

    prefix: tuple[CachedStream, CachedStream] | None
    tail: tuple[Tensor, Tensor]


@dataclass
class LayerContext:
    """What every group of a layer visit shares."""

    config: ModelConfig
    layer: int
    cos: Tensor
    sin: Tensor
    router_float: bool
    masks: dict[tuple[int, int], Tensor]
    # (tile name, arm) -> [bits stored, elements they stand for]
    cache_bits: dict[tuple[str, str], list[float]]
    # (sequence, branch, layer) -> cache; None in evaluations, which drop a layer's K/V
    caches: dict[tuple[int, int, int], BranchCache] | None = None
    streams: tuple[Stream, Stream] = field(init=False)

    def __post_init__(self) -> None:
        heads, dim = self.config.num_key_value_heads, self.config.head_dim
        self.streams = (
            Stream("k", heads, dim, role="key", rope=True),
            Stream("v", heads, dim, role="value", rope=False),
        )

    def rope(self, x_BHTD: Tensor, first: int) -> Tensor:
        last = first + x_BHTD.shape[2]
        return maths.rope(x_BHTD, self.cos[first:last], self.sin[first:last])

    def mask(self, queries: int, keys: int) -> Tensor | None:
        if queries == keys:
            return None
        if (queries, keys) not in self.masks:
            self.masks[queries, keys] = maths.branch_mask(queries, keys, self.cos.device)
        return self.masks[queries, keys]


def visit_attention(state: TileState, weights: AttentionWeights, context: LayerContext) -> None:
    """Attention and routing of one tile; the tile's hidden states are updated in place.

    It goes group by group, so that projections are held for a few sequences at a time.
    """
    config = context.config
    routed = []
    for group in state.groups:
        rows = slice(group.start, group.stop)
        x = maths.rms_norm(state.hidden[rows], weights.input_norm, config.rms_norm_eps)
        q, k, v = (maths.linear(x, w) for w in (weights.q_proj, weights.k_proj, weights.v_proj))
        del x
        out = torch.empty_like(q)
        attend_group(state.tile, group, q, k, v, out, context)
        del q, k, v
        state.hidden[rows] += maths.linear(out, weights.o_proj)
        x = maths.rms_norm(state.hidden[rows], weights.post_attention_norm, config.rms_norm_eps)
        routed.append(
            maths.route(
                x, weights.router, config.num_experts_per_tok, keep_float=context.router_float
            )
        )
    logits, share, experts = (torch.cat(parts) for parts in zip(*routed, strict=True))
    state.router_logits = logits
    state.routing = Routing.of(experts, share, config.num_local_experts)


def attend_group(
    tile: Tile,
    group: Group,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    context: LayerContext,
) -> None:
    """Attention of a group of equal-shaped sequences.

    q, out [rows, Q*D]; k, v [rows, G*D] before RoPE. Each branch attends to its history (the
    prefix, decoded from the branch's arm) and to itself.
    """
    count, dim = len(group.sequences), context.config.head_dim
    # [B, rows of a sequence, heads, D] -> [B, heads, rows, D]
    q, k, v = (x.view(count, group.rows_each, -1, dim).transpose(1, 2) for x in (q, k, v))
    out = out.view(count, group.rows_each, -1, dim).transpose(1, 2)
    sequence = group.sequences[0]
    prefix = len(sequence.prefix)
    if prefix:
        keys = context.rope(k[:, :, :prefix], 0)
        queries = context.rope(q[:, :, :prefix], 0)
        out[:, :, :prefix] = maths.attend(queries, keys, v[:, :, :prefix], None)
    shared: Shared = {}
    start = prefix
    for index, branch in enumerate(sequence.branches):
        own = slice(start, start + len(branch.ids))
        kv = (k[:, :, own], v[:, :, own])
        if branch.streaming:
            out[:, :, own] = _attend_streaming(tile.name, branch, q[:, :, own], kv, context)
        else:
            past = _history(tile, group, index, (k[:, :, :prefix], v[:, :, :prefix]),
                            shared, context)  # fmt: skip
            k_all, v_all = (torch.cat(pair, dim=2) for pair in zip(past, kv, strict=True))
            first = k_all.shape[2] - len(branch.ids)
            queries, keys = context.rope(q[:, :, own], first), context.rope(k_all, 0)
            mask = context.mask(len(branch.ids), k_all.shape[2])
            out[:, :, own] = maths.attend(queries, keys, v_all, mask)
            if context.caches is not None:
                _keep(tile, group, index, kv, context)
        start = own.stop


def _history(
    tile: Tile,
    group: Group,
    index: int,
    prefix_kv: tuple[Tensor, Tensor],
    shared: Shared,
    context: LayerContext,
) -> tuple[Tensor, Tensor]:
    """Keys (before RoPE) and values that a branch sees before its own: [B, G, S, D] each."""
    sequence = group.sequences[0]
    if sequence.past:
        return _kept_history(tile, group, index, context)
    if not sequence.prefix:
        return prefix_kv
    arm = sequence.branches[index].arm
    stored = _store(tile.name, arm, prefix_kv, shared, context)
    if context.caches is not None:
        for offset, _ in enumerate(group.sequences):
            one = tuple(stream.select(offset) for stream in stored)
            key = (tile.first + group.first + offset, index, context.layer)
            context.caches[key] = BranchCache((one[0], one[1]), prefix_kv)
    return stored[0].decoded(), stored[1].decoded()


def _store(
    tile_name: str,
    arm: Arm,
    kv: tuple[Tensor, Tensor],
    shared: Shared,
    context: LayerContext,
) -> tuple[CachedStream, CachedStream]:
    """Put keys and values through an arm, and count what it stores."""
    batch, _, tokens, _ = kv[0].shape
    positions = torch.arange(tokens, device=kv[0].device).expand(batch, tokens)
    layers = context.config.num_hidden_layers
    stored = [
        store(arm, x, stream, positions, context.layer, layers, shared)
        for x, stream in zip(kv, context.streams, strict=True)
    ]
    counted = context.cache_bits.setdefault((tile_name, arm.name), [0.0, 0.0])
    counted[0] += sum(stream.nbits for stream in stored)
    counted[1] += sum(x.numel() for x in kv)
    return stored[0], stored[1]


def _kept_history(
    tile: Tile, group: Group, index: int, context: LayerContext
) -> tuple[Tensor, Tensor]:
    assert context.caches is not None and len(group.sequences) == 1
    cache = context.caches[tile.first + group.first, index, context.layer]
    if cache.prefix is None:
        return cache.tail
    pairs = zip(cache.prefix, cache.tail, strict=True)
    keys, values = (torch.cat((stream.decoded(), tail), dim=2) for stream, tail in pairs)
    return keys, values


def _keep(
    tile: Tile, group: Group, index: int, kv: tuple[Tensor, Tensor], context: LayerContext
) -> None:
    """Append a branch's own exact keys and values to its kept cache."""
    assert context.caches is not None
    for offset, sequence in enumerate(group.sequences):
        key = (tile.first + group.first + offset, index, context.layer)
        own = tuple(x[offset : offset + 1].clone() for x in kv)
        if sequence.past:
            tail = context.caches[key].tail
            both = tuple(torch.cat(pair, dim=2) for pair in zip(tail, own, strict=True))
            context.caches[key].tail = (both[0], both[1])
        elif key in context.caches:
            context.caches[key].tail = (own[0], own[1])
        else:
            context.caches[key] = BranchCache(None, (own[0], own[1]))


def _attend_streaming(
    tile_name: str, branch: Branch, q: Tensor, kv: tuple[Tensor, Tensor], context: LayerContext
) -> Tensor:
    """Every token reads the decoded K/V of every earlier token and of itself; with
    `@window=W`, the last W tokens (itself included) exactly."""
    tokens, window = q.shape[2], branch.arm.window
    stored = _store(tile_name, branch.arm, kv, {}, context)
    q = context.rope(q, 0)
    if not window:
        keys = context.rope(stored[0].decoded(), 0)
        return maths.attend(q, keys, stored[1].decoded(), None)
    coded = _store("uncounted", replace(branch.arm, window=0), kv, {}, context)
    keys = torch.cat((context.rope(coded[0].decoded(), 0), context.rope(kv[0], 0)), dim=2)
    values = torch.cat((coded[1].decoded(), kv[1]), dim=2)
    key_at = torch.arange(tokens, device=q.device)
    pieces = []
    for first in range(0, tokens, QUERY_CHUNK):
        at = key_at[first : first + QUERY_CHUNK, None]
        far = key_at <= at - window
        near = (key_at > at - window) & (key_at <= at)
        mask = torch.cat((far, near), dim=1)
        pieces.append(maths.attend(q[:, :, first : first + QUERY_CHUNK], keys, values, mask))
    return torch.cat(pieces, dim=2)

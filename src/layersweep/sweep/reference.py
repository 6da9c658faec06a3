"""What a layer makes of the reference text -> coordinates and predictions of its codecs.

The text rides ahead of the other tiles of a sweep. Its keys and values are exact; what its
attention looks at says where errors of keys matter (kv/fit.py).
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from layersweep.kv.fit import Fit, fit, product
from layersweep.model import maths
from layersweep.stream.shapes import fitted_at_once
from layersweep.sweep.context import LayerContext, Table
from layersweep.sweep.heads import Projected

FIRST = 4  # tokens that are left out: a sink's key and value are like no other's
DISTANCES = 24  # most, from which queries look: 0, 1, 2, 3, and further ones in equal ratios
DISTANCES_AT_ONCE = 4  # on a GPU


def fitted(projected: Projected, table: Table | None, context: LayerContext) -> Fit:
    """Of one sequence [1, heads, N, D], before RoPE."""
    (q,), (k, v) = projected.q, (x[0] for x in projected.streams)
    turned_q, turned_k = (
        context.turn(x[None], table, 0, torch.empty_like(x[None]))[0] for x in (q, k)
    )
    heads, distances = _at_once(q, k)
    weight, shares = _looked_at(turned_q, turned_k, context, heads)
    seen = _seen(q, shares, len(k), table, context, distances)
    return fit(k[:, FIRST:], v[:, FIRST:], weight, seen, _of_white(context))


def _at_once(q_QND: Tensor, k_GND: Tensor) -> tuple[int, int]:
    """KV heads and distances that share launches on a GPU."""
    if k_GND.device.type == "cpu":
        return 1, 1
    groups, tokens = k_GND.shape[:2]
    return fitted_at_once(len(q_QND) // groups, tokens, cpu=False), DISTANCES_AT_ONCE


def _looked_at(
    q_QND: Tensor, k_GND: Tensor, context: LayerContext, at_once: int
) -> tuple[Tensor, Tensor]:
    """Of p (1 - p), p the attention: sums over the queries of a KV head [G, N] and, for every
    query, over ranges of distances [Q, N, distances]."""
    groups, tokens, edges = len(k_GND), k_GND.shape[1], _edges(k_GND.shape[1])
    hidden = ~maths.branch_mask(tokens, tokens, k_GND.device, context.attention.window)
    weight, by_distance = [], []
    queries_at_once = at_once * len(q_QND) // groups
    for queries, keys in zip(
        torch.split(q_QND, queries_at_once), torch.split(k_GND, at_once), strict=True
    ):
        attention = _attention(queries, keys, hidden, context)
        moved = (attention * (1 - attention))[..., FIRST:]
        weight.append(moved.view(len(keys), -1, *moved.shape[1:]).sum((1, 2)))
        by_distance.append(_by_distance(moved, edges))
    return torch.cat(weight), torch.cat(by_distance)


def _attention(q_QND: Tensor, k_GND: Tensor, hidden: Tensor, context: LayerContext) -> Tensor:
    """[Q, N, N] of a few KV heads, without what a model has of learned sinks."""
    one, tokens = context.attention, k_GND.shape[1]
    rows = q_QND.reshape(len(k_GND), -1, q_QND.shape[2])
    keys = k_GND.mT
    scores = product(rows[0], keys[0]) if len(keys) == 1 else product(rows, keys)
    scores = scores.view(-1, tokens, tokens) * one.scale
    if one.softcap is not None:
        scores = (scores / one.softcap).tanh_() * one.softcap
    return scores.masked_fill_(hidden, -math.inf).softmax(-1)


def _seen(
    q_QND: Tensor, shares: Tensor, groups: int, table: Table | None, context: LayerContext,
    at_once: int,
) -> Tensor:  # fmt: skip
    """Sums [G, D, D] of q q^T by their shares, q turned by the middle of each range."""
    tokens, dim = q_QND.shape[1:]
    roots, edges = shares.sqrt(), _edges(tokens)
    if table is not None:
        middles = _middles(*edges, device=q_QND.device)
        table = table[0][middles], table[1][middles]
    seen = q_QND.new_zeros(groups, dim, dim, dtype=torch.float32)
    for first in range(0, len(edges) - 1, at_once):
        root = roots[..., first : first + at_once].unsqueeze(3)  # [Q, N, distances, 1]
        every = q_QND.transpose(0, 1).unsqueeze(2).expand(-1, -1, root.shape[2], -1)
        at = context.turn(every, table, first, every.new_empty(every.shape)).transpose(0, 1)
        part = torch.mul(at, root, out=at.new_empty(at.shape)).view(groups, -1, dim)
        seen += product(part.mT, part)
    return seen


def _edges(tokens: int) -> list[int]:
    """Where ranges of distances begin, and the end of the last one."""
    ratio = (tokens / 4) ** (1 / (DISTANCES - 4))
    further = (round(4 * ratio**step) for step in range(DISTANCES - 3))
    return sorted({0, 1, 2, 3, *further, tokens})


def _by_distance(moved_QNS: Tensor, edges: list[int]) -> Tensor:
    """[Q, N, distances]: sums of a query's row over the keys in each range of distances. Query n
    stands `FIRST` keys further than key n of the row."""
    heads, tokens, keys = moved_QNS.shape
    # rows backwards and padded, then each begins one place further: column d holds distance d
    wide = torch.nn.functional.pad(moved_QNS.flip(2), (0, tokens + FIRST))
    width = keys + tokens + FIRST
    by = wide.as_strided((heads, tokens, tokens), (tokens * width, width - 1, 1), keys - 1 + FIRST)
    return _sums(by, edges) if by.device.type == "cpu" else by @ _ranges(*edges, device=by.device)


def _sums(by_QNS: Tensor, edges: list[int]) -> Tensor:
    return torch.stack([by_QNS[..., a:b].sum(2) for a, b in pairwise(edges)], dim=2)


# Every layer asks for these two alike, and a copy to a device makes the host wait.


@cache
def _ranges(*edges: int, device: torch.device) -> Tensor:
    """[N, distances]: 1 where a distance is in a range. A product with it makes all of `_sums` in
    one launch."""
    at, ends = torch.arange(edges[-1]).unsqueeze(1), torch.tensor(edges)
    return ((at >= ends[:-1]) & (at < ends[1:])).float().to(device)


@cache
def _middles(*edges: int, device: torch.device) -> Tensor:
    return torch.tensor([(near + far - 1) // 2 for near, far in pairwise(edges)], device=device)


def _of_white(context: LayerContext) -> Tensor:
    """[G D + G E, H] float32: what makes keys and values of white hidden states, but for biases."""
    weights, one, norm = context.weights, context.attention, context.layer.attention_norm
    k, v = weights["k_proj"].float(), weights["v_proj"].float()
    if one.qk_norm:
        scale = weights["k_norm"].float() + context.inner_norm.offset
        k = k * scale.repeat(len(k) // len(scale)).unsqueeze(1)
    both = torch.cat((k, v))
    return both if norm is None else both * (weights["attention_norm"].float() + norm.offset)

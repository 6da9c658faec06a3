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
from layersweep.sweep.context import LayerContext, Table
from layersweep.sweep.heads import Projected

FIRST = 4  # tokens that are left out: a sink's key and value are like no other's
DISTANCES = 24  # most, from which queries look: 0, 1, 2, 3, and further ones in equal ratios


def fitted(projected: Projected, table: Table | None, context: LayerContext) -> Fit:
    """Of one sequence [1, heads, N, D], before RoPE."""
    (q,), (k, v) = projected.q, (x[0] for x in projected.streams)
    (groups, tokens, dim), edges = k.shape, _edges(k.shape[1])
    turned = [context.turn(x[None], table, 0, torch.empty_like(x[None]))[0] for x in (q, k)]
    hidden = ~maths.branch_mask(tokens, tokens, k.device, context.attention.window)
    weight, by_distance = [], []
    for queries, keys in zip(turned[0].chunk(groups), turned[1], strict=True):
        attention = _attention(queries, keys, hidden, context)
        moved = (attention * (1 - attention))[..., FIRST:]
        weight.append(moved.sum((0, 1)))
        by_distance.append(_by_distance(moved, edges))
    roots = torch.cat(by_distance).sqrt_()  # [Q, N, distances]
    one, seen = q.transpose(0, 1).unsqueeze(2), k.new_zeros(groups, dim, dim, dtype=torch.float32)
    for index, (near, far) in enumerate(pairwise(edges)):
        at = context.turn(one, table, (near + far - 1) // 2, torch.empty_like(one))
        at, shared = at.squeeze(2).transpose(0, 1), q.new_empty(q.shape)
        torch.mul(at, roots[..., index : index + 1], out=shared)
        shared = shared.view(groups, -1, dim)
        seen += product(shared.transpose(1, 2), shared)
    return fit(k[:, FIRST:], v[:, FIRST:], torch.stack(weight), seen, _of_white(context))


def _attention(q_QND: Tensor, k_ND: Tensor, hidden: Tensor, context: LayerContext) -> Tensor:
    """[Q, N, N] of one KV head, without what a model has of learned sinks."""
    one = context.attention
    scores = product(q_QND.flatten(0, 1), k_ND.T).view(*q_QND.shape[:2], -1) * one.scale
    if one.softcap is not None:
        scores = (scores / one.softcap).tanh_() * one.softcap
    return scores.masked_fill_(hidden, -math.inf).softmax(-1)


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


@cache  # every layer asks alike, and a copy to a device makes the host wait
def _ranges(*edges: int, device: torch.device) -> Tensor:
    """[N, distances]: 1 where a distance is in a range. A product with it makes all of `_sums` in
    one launch."""
    sizes = [far - near for near, far in pairwise(edges)]
    return torch.block_diag(*(torch.ones(size, 1) for size in sizes)).to(device)


def _of_white(context: LayerContext) -> Tensor:
    """[G D + G E, H] float32: what makes keys and values of white hidden states, but for biases."""
    weights, one, norm = context.weights, context.attention, context.layer.attention_norm
    k, v = weights["k_proj"].float(), weights["v_proj"].float()
    if one.qk_norm:
        scale = weights["k_norm"].float() + context.inner_norm.offset
        k = k * scale.repeat(len(k) // len(scale)).unsqueeze(1)
    both = torch.cat((k, v))
    return both if norm is None else both * (weights["attention_norm"].float() + norm.offset)

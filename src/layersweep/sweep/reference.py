"""What a layer makes of the reference text -> coordinates and predictions of its codecs.

The text rides ahead of the other tiles of a sweep. Its keys and values are exact; what its
attention looks at says where errors of keys matter (kv/fit.py).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from layersweep.kv.fit import Fit, fit
from layersweep.model import maths
from layersweep.sweep.context import LayerContext, Table
from layersweep.sweep.heads import Projected

FIRST = 4  # tokens that are left out: a sink's key and value are like no other's
DISTANCES = 24  # most, from which queries look: 0, 1, 2, 3, and further ones in equal ratios


def fitted(projected: Projected, table: Table | None, context: LayerContext) -> Fit:
    """Of one sequence [1, heads, N, D], before RoPE."""
    (q,), (k, v) = projected.q, (x[0] for x in projected.streams)
    groups, tokens = k.shape[:2]
    weight, by_distance = [], []
    edges = _edges(tokens)
    turned = [context.turn(x[None], table, 0, torch.empty_like(x[None]))[0].float() for x in (q, k)]
    for queries, keys in zip(turned[0].chunk(groups), turned[1], strict=True):
        attention = _attention(queries, keys, context)
        moved = (attention * (1 - attention))[..., FIRST:]
        weight.append(moved.sum((0, 1)))
        by_distance.append(_by_distance(moved, edges))
    shares = torch.cat(by_distance)  # [Q, N, distances]
    one, seen = q.transpose(0, 1).unsqueeze(2), k.new_zeros(groups, *[k.shape[2]] * 2).float()
    for index, (near, far) in enumerate(pairwise(edges)):
        at = context.turn(one, table, (near + far - 1) // 2, torch.empty_like(one))
        at = at.squeeze(2).transpose(0, 1).float()
        at = (at * shares[..., index : index + 1].sqrt()).reshape(groups, -1, k.shape[2])
        seen += at.transpose(1, 2) @ at
    return fit(k[:, FIRST:], v[:, FIRST:], torch.stack(weight), seen, _of_white(context))


def _attention(q_QND: Tensor, k_ND: Tensor, context: LayerContext) -> Tensor:
    """[Q, N, N] of one KV head, without what a model has of learned sinks."""
    one = context.attention
    scores = q_QND @ k_ND.T * one.scale
    if one.softcap is not None:
        scores = (scores / one.softcap).tanh_() * one.softcap
    seen = maths.branch_mask(len(k_ND), len(k_ND), k_ND.device, one.window)
    return scores.masked_fill_(~seen, -math.inf).softmax(-1)


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
    return torch.stack([by[..., a:b].sum(2) for a, b in pairwise(edges)], dim=2)


def _of_white(context: LayerContext) -> Tensor:
    """[G D + G E, H] float32: what makes keys and values of white hidden states, but for biases."""
    weights, one, norm = context.weights, context.attention, context.layer.attention_norm
    k, v = weights["k_proj"].float(), weights["v_proj"].float()
    if one.qk_norm:
        scale = weights["k_norm"].float() + context.inner_norm.offset
        k = k * scale.repeat(len(k) // len(scale)).unsqueeze(1)
    both = torch.cat((k, v))
    return both if norm is None else both * (weights["attention_norm"].float() + norm.offset)

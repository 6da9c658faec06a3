"""Attention with all that decoders ask of it, in plain torch: the oracle, and the CPU's path.

Shape legend: B sequences, Q query heads, G key/value heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = 512  # whose scores are held at once


def attend(
    q_BQTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    may_look_TS: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_Q: Tensor | None = None,
) -> Tensor:
    """[B, Q, T, D of the values]; softmax in float32.

    `softcap`: scores become cap * tanh(score / cap) (Gemma 2). `sinks_Q`: one more score per head,
    without a value (gpt-oss).
    """
    repeats = q_BQTD.shape[1] // k_BGSD.shape[1]
    if repeats > 1:
        k_BGSD = k_BGSD.repeat_interleave(repeats, dim=1)
        v_BGSD = v_BGSD.repeat_interleave(repeats, dim=1)
    pieces = []
    for first in range(0, q_BQTD.shape[2], QUERIES):
        rows = slice(first, first + QUERIES)
        scores = (q_BQTD[:, :, rows] @ k_BGSD.transpose(2, 3)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~may_look_TS[rows], -torch.inf)
        if sinks_Q is not None:
            sink = sinks_Q.float()[None, :, None, None].expand(*scores.shape[:3], 1)
            chance = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
        else:
            chance = scores.softmax(-1)
        pieces.append(chance.to(v_BGSD.dtype) @ v_BGSD)
    return torch.cat(pieces, dim=2)


def may_look(
    query_at: Tensor, key_at: Tensor, window: int | None, chunk: int | None = None
) -> Tensor:
    """[T, S] True where a token at `query_at` [T] sees one at `key_at` [S]: itself and what came
    before, in its window or in its chunk."""
    query, key = query_at[:, None], key_at[None]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    if chunk is not None:
        seen &= key // chunk == query // chunk
    return seen

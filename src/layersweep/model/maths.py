"""The arithmetic of a Mixtral decoder, on one screen (Jiang et al., 2024, arXiv:2401.04088).

Shape legend: N rows (tokens of a tile), B sequences, T tokens, H hidden, I expert inner,
E experts, K experts per token, Q query heads, G key/value heads, D head_dim, V vocabulary.
Everything works in the dtype of its input except where a line says float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# On the CPU a float32 GEMM of fewer than 12 rows takes other kernels than a larger one, and
# its rows differ in their last bits (seen for M = 1, 2, 3, 5, 6, 7, 9, 10, 11). With at least
# this many rows a token's result does not depend on which other tokens share its GEMM.
MIN_GEMM_ROWS = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32 (Zhang and Sennrich, 2019)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, in] times weight [out, in], transposed; few rows are padded (MIN_GEMM_ROWS)."""
    rows = x.shape[0]
    if x.device.type == "cpu" and 0 < rows < MIN_GEMM_ROWS:
        return F.linear(F.pad(x, (0, 0, 0, MIN_GEMM_ROWS - rows)), weight)[:rows]
    return F.linear(x, weight)


def rope_table(theta: float, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [len(positions), D], float32 (Su et al., 2021; halves, not interleaved)."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angle = positions.float()[:, None] * (1.0 / theta**exponent)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rope(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate query or key heads to their positions."""
    half = x_BHTD.shape[-1] // 2
    turned = torch.cat((-x_BHTD[..., half:], x_BHTD[..., :half]), dim=-1)
    return x_BHTD * cos_TD.to(x_BHTD.dtype) + turned * sin_TD.to(x_BHTD.dtype)


def attend(q_BQTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention of T queries over S keys; mask None means causal with T == S.

    Keys and values are repeated per query head: `enable_gqa` rules out the fused kernels of
    older GPUs. Returns [B, Q, T, D].
    """
    repeats = q_BQTD.shape[1] // k_BGSD.shape[1]
    if repeats > 1:
        k_BGSD = k_BGSD.repeat_interleave(repeats, dim=1)
        v_BGSD = v_BGSD.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(
        q_BQTD, k_BGSD, v_BGSD, attn_mask=mask, is_causal=mask is None
    )


def branch_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """[T, S] True where a branch's query may look: all of the past, and itself causally.

    The last query is aligned with the last key (lower right), which `is_causal` is not.
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def route(x_NH: Tensor, router_EH: Tensor, k: int, *, keep_float: bool) -> tuple[Tensor, ...]:
    """Router logits [N, E] (float32), weights [N, K] that sum to 1, and experts [N, K].

    `keep_float` leaves the weights in float32 (transformers 5), else they take x's dtype.
    """
    logits = linear(x_NH, router_EH).float()
    weights, experts = logits.softmax(-1).topk(k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights if keep_float else weights.to(x_NH.dtype), experts


def swiglu(x_NH: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """w2 (silu(w1 x) * w3 x), with w1 and w3 stacked as w13 [2I, H] and w2 [H, I].

    The product is made in place: a full-size expert's rows would take 1.6 times the memory.
    """
    gate, up = linear(x_NH, w13).chunk(2, dim=-1)
    return linear(F.silu(gate, inplace=True).mul_(up), w2)


def score_branches(logits: list[Tensor], target: Tensor) -> Tensor:
    """[branches, T, 3] float32: loss of the target [T], KL(exact || branch) in nats, and 1 where
    the first guess is that of the exact branch, which comes first. logits [T, V] each."""
    scores = torch.zeros(len(logits), len(target), 3, device=target.device)
    exact = logits[0].log_softmax(-1)
    chance, best = exact.exp(), exact.argmax(-1)
    for row, branch in zip(scores, logits, strict=True):
        found = exact if branch is logits[0] else branch.log_softmax(-1)
        row[:, 0] = -found.gather(1, target[:, None])[:, 0]
        row[:, 1] = (chance * (exact - found)).sum(-1)
        row[:, 2] = found.argmax(-1) == best
    return scores

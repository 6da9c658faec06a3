"""The arithmetic of a decoder in plain torch; routing is in routing.py, tables of RoPE in rope.py.

Shape legend: N rows (tokens of a tile), B sequences, T tokens, H hidden, I expert inner,
E experts, K experts per token, Q query heads, G key/value heads, D head_dim, V vocabulary.
Everything works in the dtype of its input except where a line says float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from layersweep.families.spec import Activation

# On the CPU a float32 GEMM of fewer than 12 rows takes other kernels than a larger one, and
# its rows differ in their last bits (seen for M = 1, 2, 3, 5, 6, 7, 9, 10, 11). With at least
# this many rows a token's result does not depend on which other tokens share its GEMM.
MIN_GEMM_ROWS = 16
SWIGLU_SLOPE = 1.702  # swiglu_clamped: gate * sigmoid(1.702 gate), close to a GELU

# The result may be the argument itself, overwritten.
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32 (Zhang and Sennrich, 2019).

    The result is rounded before the weight multiplies it; with an offset, added to the weight,
    after that (Gemma).
    """
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (y * (offset + weight.float())).to(x.dtype)
    return weight * y.to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, in] times weight [out, in], transposed; few rows are padded (MIN_GEMM_ROWS)."""
    rows = x.shape[0]
    if x.device.type == "cpu" and 0 < rows < MIN_GEMM_ROWS:
        return F.linear(F.pad(x, (0, 0, 0, MIN_GEMM_ROWS - rows)), weight)[:rows]
    return F.linear(x, weight)


def rope(x_BHTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate query or key heads to their positions: the first R coordinates, the rest is kept.

    A pair is coordinates i and i + R / 2, or 2i and 2i + 1 if `interleaved`; its angle is in
    column i of the tables.
    """
    x, width = x_BHTD, cos_TR.shape[-1]
    if width < x.shape[-1]:
        part = rope(x[..., :width], cos_TR, sin_TR, interleaved=interleaved)
        return torch.cat((part, x[..., width:]), dim=-1)
    half = width // 2
    if interleaved:
        cos_TR, sin_TR = (t[..., :half].repeat_interleave(2, dim=-1) for t in (cos_TR, sin_TR))
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos_TR.to(x.dtype) + turned * sin_TR.to(x.dtype)


def attend(
    q_BQTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """Grouped-query attention of T queries over S keys; mask None means causal with T == S.

    `scale` of the scores, 1 / sqrt(D) by default. Keys and values are repeated per query head:
    `enable_gqa` rules out the fused kernels of older GPUs. Returns [B, Q, T, D].
    """
    repeats = q_BQTD.shape[1] // k_BGSD.shape[1]
    if repeats > 1:
        k_BGSD = k_BGSD.repeat_interleave(repeats, dim=1)
        v_BGSD = v_BGSD.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(
        q_BQTD, k_BGSD, v_BGSD, attn_mask=mask, is_causal=mask is None, scale=scale
    )


def attend_by_scores(
    q_BQTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_Q: Tensor | None = None,
) -> Tensor:
    """The same where scores must be seen, see `score_weights`: float32 within, [B, Q, T, D of a
    value]."""
    batch, heads, queries, dim = q_BQTD.shape
    groups, keys = k_BGSD.shape[1:3]
    q, k, v = (x.float() for x in (q_BQTD, k_BGSD, v_BGSD))
    # The query heads that share keys are the rows of one product.
    scores = q.reshape(batch, groups, -1, dim) @ k.mT * scale
    scores = scores.view(batch, heads, queries, keys)
    weights = score_weights(scores, mask, softcap, sinks_Q)
    found = weights.reshape(batch, groups, -1, keys) @ v
    return found.view(batch, heads, queries, -1).to(q_BQTD.dtype)


def score_weights(
    scores_BQTS: Tensor, mask: Tensor, softcap: float | None, sinks_Q: Tensor | None
) -> Tensor:
    """What each key's value counts for, from scaled scores, float32 both.

    `softcap` c turns a score into c tanh(score / c) (Gemma 2, 2024, arXiv:2408.00118, section 2).
    `mask` [..., T, S]: True where a query may look, or what is added. `sinks` are scores that join
    the softmax of their head and have no value (gpt-oss, 2025, arXiv:2508.10925).
    """
    batch, _, queries, keys = scores_BQTS.shape
    scores = scores_BQTS
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, float("-inf"))
    scores = scores + mask
    if sinks_Q is not None:
        sinks = sinks_Q.float()[:, None, None].expand(batch, -1, queries, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    return scores.softmax(-1)[..., :keys]


def branch_mask(queries: int, keys: int, device: torch.device, window: int | None = None) -> Tensor:
    """[T, S] True where a branch's query may look: all of the past, and itself causally; with a
    window W, the newest W keys up to itself.

    The last query is aligned with the last key (lower right), which `is_causal` is not.
    """
    past = keys - queries
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(past)
    return mask if window is None else mask.triu(past - window + 1)


def glu_(
    gate_up_N2I: Tensor, act: Activation = "silu", *, interleaved: bool = False, limit: float = 0.0
) -> Tensor:
    """act(gate) * up over the first I columns, returned as a view [N, I] (Shazeer, 2020,
    arXiv:2002.05202).

    Gate and up are the two halves of a row, or its even and odd columns. In place: a full-size
    expert's rows would take 1.6 times the memory.
    """
    gate, up = gate_up_N2I.chunk(2, dim=-1)
    out = gate
    if interleaved:
        gate, up = gate_up_N2I[:, ::2].contiguous(), gate_up_N2I[:, 1::2].contiguous()
    if act == "swiglu_clamped":
        found = _clamped_swiglu(gate, up, limit)
    else:
        found = ACTIVATIONS[act](gate).mul_(up)
    return found if found.data_ptr() == out.data_ptr() else out.copy_(found)


def _clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """gpt-oss (2025, arXiv:2508.10925): the gate is clamped above, `up` on both sides."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * SWIGLU_SLOPE))


def losses(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    """Loss of each target in nats: [T]."""
    return -logits_TV.log_softmax(-1).gather(1, target_T[:, None])[:, 0]


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

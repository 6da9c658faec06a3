"""Flash attention with capped scores, which torch's kernels do not know, in Triton (sm_80 on).

Its oracle is model.attention.PlainAttention. Scores are never written: each program keeps a running
maximum and sum per query (Dao, 2023, arXiv:2307.08691). Importing this file imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
BIG_SHARED = 200 * 1024  # bytes of shared memory per block: sm_90 has them, sm_80 and sm_89 do not


def attend_capped(
    q_BQTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    scale: float,
    softcap: float,
    window: int | None = None,
    mask_TS: Tensor | None = None,
    sinks_Q: Tensor | None = None,
) -> Tensor:
    """[B, Q, T, D of a value] in q's dtype, float16 or bfloat16, summed in float32.

    Query T - 1 sits at key S - 1 and sees the newest `window` keys up to itself; with a mask
    (True: may look) what that says. Each query must see a key. Any strides, with contiguous heads.
    """
    batch, heads, queries, dim = q_BQTD.shape
    keys, width = k_BGSD.shape[2], v_BGSD.shape[3]
    assert q_BQTD.dtype in (torch.float16, torch.bfloat16) and max(dim, width) <= 256
    assert all(x.stride(3) == 1 and x.dtype == q_BQTD.dtype for x in (q_BQTD, k_BGSD, v_BGSD))
    assert mask_TS is None or (window is None and mask_TS.shape == (queries, keys))
    out = torch.empty(batch, queries, heads, width, dtype=q_BQTD.dtype, device=q_BQTD.device)
    out = out.transpose(1, 2)
    mask = None if mask_TS is None else mask_TS.contiguous().view(torch.uint8)
    block_dim, block_width = (max(16, triton.next_power_of_2(size)) for size in (dim, width))
    block_t, block_s, warps = _tile(max(block_dim, block_width), q_BQTD.device)
    _attend[(triton.cdiv(queries, block_t), batch * heads)](
        q_BQTD, k_BGSD, v_BGSD, out, mask, sinks_Q,
        *q_BQTD.stride()[:3], *k_BGSD.stride()[:3], *v_BGSD.stride()[:3], *out.stride()[:3],
        queries, keys, keys if window is None else window, scale / softcap, softcap,
        heads, heads // k_BGSD.shape[1], dim, width, block_dim, block_width, block_t, block_s,
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    return out


def _tile(width: int, device: torch.device) -> tuple[int, int, int]:
    """Queries and keys of a program, and its warps: what fits two stages of keys and values."""
    if width <= 128:
        return 128, 64, 8 if width == 128 else 4
    big = device.type == "cuda" and _shared_bytes(device) >= BIG_SHARED
    return (128, 64, 8) if big else (64, 32, 4)


def _shared_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def _attend(
    q, k, v, out, mask, sinks,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    v_batch, v_head, v_token, out_batch, out_head, out_token,
    queries, keys, window, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """BLOCK_T queries of one head. `scale` is that of the scores, divided by the cap."""
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T  # long programs first
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // GROUP * k_head
    v += batch * v_batch + head // GROUP * v_head
    out += batch * out_batch + head * out_head
    row, dim, col = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_WIDTH)
    at = start + row  # of the queries, from the first of these; their places are past + at
    past = keys - queries
    real = (at[:, None] < queries) & (dim[None, :] < DIM)
    query = tl.load(q + at[:, None].to(tl.int64) * q_token + dim[None, :], mask=real, other=0.0)

    best = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    found = tl.zeros([BLOCK_T, BLOCK_WIDTH], tl.float32)
    first, last = 0, keys
    if mask is None:
        first = tl.maximum(past + start - window + 1, 0) // BLOCK_S * BLOCK_S
        last = tl.minimum(past + start + BLOCK_T, keys)
    for begin in range(first, last, BLOCK_S):
        place = begin + tl.arange(0, BLOCK_S)
        there = place < keys
        step = place.to(tl.int64)
        key = tl.load(
            k + step[None, :] * k_token + dim[:, None],
            mask=there[None, :] & (dim[:, None] < DIM), other=0.0,
        )  # fmt: skip
        # c tanh(s / c), by an exponential that is exact enough at both ends
        grown = tl.exp2(tl.dot(query, key) * (2 * scale * LOG2_E))
        score = softcap * (1.0 - 2.0 / (grown + 1.0))
        if mask is None:
            behind = past + at[:, None] - place[None, :]
            seen = (behind >= 0) & (behind < window) & there[None, :]
        else:
            spot = mask + at[:, None].to(tl.int64) * keys + place[None, :]
            seen = tl.load(spot, mask=(at[:, None] < queries) & there[None, :], other=0) != 0
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        kept = tl.exp2((best - base) * LOG2_E)
        share = tl.exp2((score - base[:, None]) * LOG2_E)
        value = tl.load(
            v + step[:, None] * v_token + col[None, :],
            mask=there[:, None] & (col[None, :] < WIDTH), other=0.0,
        )  # fmt: skip
        total = total * kept + tl.sum(share, 1)
        found = found * kept[:, None] + tl.dot(share.to(value.dtype), value)
        best = higher
    if sinks is not None:  # as one more key, whose value is 0
        sink = tl.load(sinks + head).to(tl.float32)
        higher = tl.maximum(best, sink)
        kept = tl.exp2((best - higher) * LOG2_E)
        total = total * kept + tl.exp2((sink - higher) * LOG2_E)
        found = found * kept[:, None]
    tl.store(
        out + at[:, None].to(tl.int64) * out_token + col[None, :],
        (found / total[:, None]).to(out.dtype.element_ty),
        mask=(at[:, None] < queries) & (col[None, :] < WIDTH),
    )

"""torch's fused attention kernels, called below its front door: that knows no window, and keeps
the sums to itself which sinks need. All tensors [B, heads, T or S, D]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The causal mask whose last query looks at all keys. `scaled_dot_product_attention` aligns the
# first query with the first key, wrong for a branch. torch.nn.attention.bias calls the kernels that
# are called here, but brings torch's compiler along: 4 seconds of every run.
LOWER_RIGHT = 2
WIDE = 8  # numbers of 16 bits that the memory-efficient kernel loads at once
MASK_ALIGNMENT = 16  # elements between rows of a mask that the memory-efficient kernel takes


def flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, sinks: Tensor | None
) -> Tensor:
    """sm_80 on, 16 bits, D a multiple of 8 up to 256: causal, lower right, fewer key heads."""
    width = v.shape[-1]
    q, k, v, scale = one_width(q, k, v, scale)
    if window is None and sinks is None:
        if q.shape[2] == k.shape[2]:
            found = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        else:
            found = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, is_causal=True, scale=scale
            )[0]
        return found[..., :width]
    found, sums, *_ = torch.ops.aten._flash_attention_forward(
        *(x.transpose(1, 2) for x in (q, k, v)),
        None, None, q.shape[2], k.shape[2], 0.0, True, False,
        scale=scale, window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )  # fmt: skip
    found = found.transpose(1, 2)[..., :width]
    return found if sinks is None else with_sinks(found, sums, sinks)


def memory_efficient(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, sinks: Tensor | None
) -> Tensor:
    """sm_50 on, 16 and 32 bits: causal, lower right, as many key heads as query heads."""
    width = v.shape[-1]
    if width % WIDE:  # loads take whole vectors
        v = F.pad(v, (0, -width % WIDE))
    if window is None and sinks is None and q.shape[2] == k.shape[2]:
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return found[..., :width]
    found, sums, *_ = torch.ops.aten._efficient_attention_forward(
        *(x.transpose(1, 2) for x in (q, k, v)),
        None, None, None, None, None, 0.0, LOWER_RIGHT, sinks is not None,
        scale=scale, window_size=window,
    )  # fmt: skip
    found = found.transpose(1, 2)[..., :width]
    return found if sinks is None else with_sinks(found, sums, sinks)


def masked(
    q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor, scale: float | None, sinks: Tensor | None
) -> Tensor:
    """The memory-efficient kernel with a mask (True: may look) in place of the causal rule."""
    if sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, scale=scale)
    queries, keys = mask_TS.shape
    row = -(-keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
    bias = torch.zeros(queries, row, dtype=q.dtype, device=q.device)[:, :keys]
    bias = bias.masked_fill_(~mask_TS, float("-inf")).expand(*q.shape[:2], -1, -1)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    found, sums, *_ = efficient(q, k, v, bias, True, scale=scale)
    return with_sinks(found, sums, sinks)


def with_sinks(found_BQTD: Tensor, sums_BQT: Tensor, sinks_Q: Tensor) -> Tensor:
    """A sink takes its share of each softmax, in place: the sum of e^score grows by e^sink.

    `sums`: logarithms of those sums, which may be padded behind T.
    """
    sums_BQT = sums_BQT[..., : found_BQTD.shape[2]].float()
    share = torch.sigmoid(sums_BQT - sinks_Q.float()[:, None])
    return found_BQTD.mul_(share[..., None])


def one_width(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """Values as wide as keys, zeros behind them, for kernels that take one head size (MLA: 192 and
    128). Nothing is copied where they are."""
    dim, width = q.shape[-1], v.shape[-1]
    if dim == width:
        return q, k, v, scale
    if width < dim:
        return q, k, F.pad(v, (0, dim - width)), scale
    q, k = (F.pad(x, (0, width - dim)) for x in (q, k))
    return q, k, v, scale or dim**-0.5


def repeated(q_BQTD: Tensor, x_BGSD: Tensor) -> Tensor:
    """Keys or values once per query head."""
    repeats = q_BQTD.shape[1] // x_BGSD.shape[1]
    return x_BGSD.repeat_interleave(repeats, dim=1) if repeats > 1 else x_BGSD

"""Attention kernels: T queries that are the last of S keys, each looking back from its place.

The kernel is chosen once, by capability and dtype. torch's math kernel is forbidden on a GPU:
it would materialize 1 GB of scores per 4096-token prompt. Where no fused kernel runs, torch
raises, and that is an error, never a fallback.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from layersweep.model import maths

# The causal mask whose last query looks at all keys. `scaled_dot_product_attention` aligns the
# first query with the first key, wrong for a branch. torch.nn.attention.bias calls the kernels that
# are called here, but brings torch's compiler along: 4 seconds of every run.
LOWER_RIGHT = 2


class PlainAttention:
    """The oracle, and the CPU's path: a dense mask where there are fewer queries than keys."""

    name = "torch scaled_dot_product_attention"
    backends: tuple[SDPBackend, ...] = ()
    repeats_kv = True

    def __init__(self) -> None:
        self._masks: dict[tuple[int, int, torch.device], Tensor] = {}

    def __call__(
        self, q_BQTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_TS: Tensor | None = None
    ) -> Tensor:
        """[B, Q, T, D]. `mask_TS` (True: may look) replaces the causal rule."""
        queries, keys = q_BQTD.shape[2], k_BGSD.shape[2]
        if mask_TS is None and queries < keys:
            at = (queries, keys, q_BQTD.device)
            if at not in self._masks:
                self._masks[at] = maths.branch_mask(queries, keys, q_BQTD.device)
            mask_TS = self._masks[at]
        return maths.attend(q_BQTD, k_BGSD, v_BGSD, mask_TS)


class FlashAttention:
    """sm_80 and newer, 16 bits: keys and values are read once per group of query heads."""

    name = "flash"
    backends: tuple[SDPBackend, ...] = (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,  # windows of streamed caches need a mask
    )
    repeats_kv = False

    def __call__(
        self, q_BQTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_TS: Tensor | None = None
    ) -> Tensor:
        if mask_TS is not None:
            return _masked(q_BQTD, k_BGSD, v_BGSD, mask_TS)
        queries, keys = q_BQTD.shape[2], k_BGSD.shape[2]
        if queries == keys:
            return F.scaled_dot_product_attention(
                q_BQTD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=True
            )
        flash = torch.ops.aten._scaled_dot_product_flash_attention  # see LOWER_RIGHT
        return flash(q_BQTD, k_BGSD, v_BGSD, is_causal=True)[0]  # type: ignore[no-any-return]


class MemoryEfficientAttention:
    """From sm_50 on, 16 and 32 bits. Keys and values are repeated per query head, since
    `enable_gqa` rules this kernel out; callers bound how many sequences that is for."""

    name = "memory-efficient"
    backends: tuple[SDPBackend, ...] = (SDPBackend.EFFICIENT_ATTENTION,)
    repeats_kv = True

    def __call__(
        self, q_BQTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_TS: Tensor | None = None
    ) -> Tensor:
        if mask_TS is not None:
            return _masked(q_BQTD, k_BGSD, v_BGSD, mask_TS)
        k, v = _repeated(q_BQTD, k_BGSD), _repeated(q_BQTD, v_BGSD)
        if q_BQTD.shape[2] == k.shape[2]:
            return F.scaled_dot_product_attention(q_BQTD, k, v, is_causal=True)
        efficient = torch.ops.aten._efficient_attention_forward
        found = efficient(
            *(x.transpose(1, 2) for x in (q_BQTD, k, v)),
            None, None, None, None, None, 0.0, LOWER_RIGHT,
        )  # fmt: skip
        return found[0].transpose(1, 2)  # type: ignore[no-any-return]


Attention = PlainAttention | FlashAttention | MemoryEfficientAttention


def choose_attention(
    device: torch.device, dtype: torch.dtype, capability: tuple[int, int] | None
) -> Attention:
    """`capability`: (7, 5) and so on; None on the CPU."""
    if device.type == "cpu" or capability is None:
        return PlainAttention()
    if capability >= (8, 0) and dtype != torch.float32:
        return FlashAttention()
    return MemoryEfficientAttention()


def attend_one(q_BQD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, bias_BS: Tensor) -> Tensor:
    """A query for each head, over keys with a bias [B, S] on their scores; [B, Q, D].

    The query heads that share keys are the rows of one product, so nothing is repeated, on any of
    the kernels that take a bias.
    """
    batch, groups, keys, dim = k_BGSD.shape
    q = q_BQD.reshape(batch, groups, -1, dim)
    bias = bias_BS[:, None, None].expand(*q.shape[:3], keys)
    found = F.scaled_dot_product_attention(q, k_BGSD, v_BGSD, attn_mask=bias)
    return found.reshape(q_BQD.shape)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor) -> Tensor:
    k, v = _repeated(q, k), _repeated(q, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS)


def _repeated(q_BQTD: Tensor, x_BGSD: Tensor) -> Tensor:
    repeats = q_BQTD.shape[1] // x_BGSD.shape[1]
    return x_BGSD.repeat_interleave(repeats, dim=1) if repeats > 1 else x_BGSD

"""Attention kernels: T queries that are the last of S keys, each looking back from its place.

The kernel is chosen once, by capability and dtype. torch's math kernel is forbidden on a GPU:
it would materialize 1 GB of scores per 4096-token prompt. Where no fused kernel runs, torch
raises, and that is an error, never a fallback; what is known to be missing says `refusal`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from layersweep.families import spec
from layersweep.kernels import KernelError, load_kernels
from layersweep.kernels.nvrtc import load_nvrtc
from layersweep.model import fused, maths

WIDEST = 256  # head size of flash attention, and of our kernels for capped scores
SCORE_BYTES = 64 << 20  # most scores that the CPU holds at once, where it holds any


@dataclass(frozen=True)
class Rule:
    """How scores become weights.

    `scale` of the scores, None for 1 / sqrt(head size); `window`: the newest keys that a query
    sees, itself included; `softcap` c: scores become c tanh(score / c).
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, attention: spec.Attention) -> Rule:
        usual = attention.head_dim**-0.5
        scale = None if attention.scale == usual else attention.scale
        return cls(scale, attention.window, attention.softcap)

    def masked(self) -> Rule:
        """The rule for calls whose mask or bias already leaves out what the window hides."""
        return replace(self, window=None)

    def over(self, keys: int) -> Rule:
        """The rule for so many keys: a window that holds them all is none."""
        return self.masked() if self.window is not None and self.window >= keys else self


PLAIN = Rule()
Pair = tuple[Tensor, Tensor]  # keys [B, G, S, D], values [B, G, S, D of a value]


class Attention(Protocol):
    """One way to attend.

    `repeats_kv`: it needs keys and values once per query head. `reads_past`: it reads a past
    where it lies; the others copy it and what follows into one, so callers lay them that way.
    """

    name: str
    backends: tuple[SDPBackend, ...]
    repeats_kv: bool
    reads_past: bool

    def __call__(
        self, q_BQTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_TS: Tensor | None = None, *,
        rule: Rule = PLAIN, sinks: Tensor | None = None, past: Pair | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[B, Q, T, D of a value]. `mask_TS` (True: may look) replaces the causal rule, so a window
        must be part of it. `sinks` [Q]: scores that join the softmax and have no value. `past`:
        keys and values of the tokens before; without a mask, and k and v have T tokens or more.
        `out`: where the result goes; torch's kernels make a tensor of their own, which is copied.
        """

    def refusal(self, rule: Rule, head_dim: int) -> str | None:
        """Why it cannot attend by this rule, or None if it can."""


class PlainAttention:
    """The oracle, and the CPU's path: a dense mask where there are fewer queries than keys."""

    name = "torch scaled_dot_product_attention"
    backends: tuple[SDPBackend, ...] = ()
    repeats_kv = True
    reads_past = False

    def __init__(self) -> None:
        self._masks: dict[tuple[int, int, int | None, torch.device], Tensor] = {}

    def refusal(self, rule: Rule, head_dim: int) -> str | None:
        return None

    def __call__(
        self, q_BQTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_TS: Tensor | None = None, *,
        rule: Rule = PLAIN, sinks: Tensor | None = None, past: Pair | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        k_BGSD, v_BGSD = _whole(past, k_BGSD, v_BGSD)
        queries, keys = q_BQTD.shape[2], k_BGSD.shape[2]
        rule = _checked(rule, keys, mask_TS)
        if rule.softcap is not None or sinks is not None:
            return _put(self._by_scores(q_BQTD, k_BGSD, v_BGSD, mask_TS, rule, sinks), out)
        if mask_TS is None and (queries < keys or rule.window is not None):
            mask_TS = self._mask(queries, keys, rule.window, q_BQTD.device)
        q, k, v, scale = fused.one_width(q_BQTD, k_BGSD, v_BGSD, rule.scale)
        return _put(maths.attend(q, k, v, mask_TS, scale)[..., : v_BGSD.shape[-1]], out)

    def _by_scores(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, sinks: Tensor | None
    ) -> Tensor:
        """In chunks of queries, each over the keys that it may see."""
        batch, heads, queries, dim = q.shape
        keys = k.shape[2]
        scale = rule.scale or dim**-0.5
        size = max(1, SCORE_BYTES // (4 * batch * heads * keys))
        out = q.new_empty(batch, heads, queries, v.shape[-1])
        for first in range(0, queries, size):
            rows = slice(first, min(first + size, queries))
            start, end = 0, keys
            if mask is None:
                end = keys - queries + rows.stop
                if rule.window is not None:
                    start = max(0, keys - queries + first - rule.window + 1)
                seen = maths.branch_mask(rows.stop - first, end - start, q.device, rule.window)
            else:
                seen = mask[rows]
            k_seen, v_seen = k[:, :, start:end], v[:, :, start:end]
            out[:, :, rows] = maths.attend_by_scores(
                q[:, :, rows], k_seen, v_seen, seen, scale, rule.softcap, sinks
            )
        return out

    def _mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        at = (queries, keys, window, device)
        if at not in self._masks:
            self._masks[at] = maths.branch_mask(queries, keys, device, window)
        return self._masks[at]


class MemoryEfficientAttention:
    """From sm_50 on, 16 and 32 bits. Keys and values are repeated per query head, since
    `enable_gqa` rules this kernel out; callers bound how many sequences that is for."""

    name = "memory-efficient"
    backends: tuple[SDPBackend, ...] = (SDPBackend.EFFICIENT_ATTENTION,)
    repeats_kv = True
    reads_past = False

    def refusal(self, rule: Rule, head_dim: int) -> str | None:
        if rule.softcap is None:
            return None
        try:
            load_nvrtc()
        except KernelError as error:
            return f"capped scores (softcap) need a kernel that cannot be compiled here: {error}"
        return _too_wide(head_dim, "the kernel for capped scores (softcap)")

    def __call__(
        self, q_BQTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_TS: Tensor | None = None, *,
        rule: Rule = PLAIN, sinks: Tensor | None = None, past: Pair | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        k_BGSD, v_BGSD = _whole(past, k_BGSD, v_BGSD)
        rule = _checked(rule, k_BGSD.shape[2], mask_TS)
        _refuse(self, rule, q_BQTD.shape[-1])
        if rule.softcap is not None:
            found = load_kernels(q_BQTD.device, q_BQTD.dtype).attend_capped(
                q_BQTD, k_BGSD, v_BGSD, scale=rule.scale or q_BQTD.shape[-1] ** -0.5,
                softcap=rule.softcap, window=rule.window, mask_TS=mask_TS, sinks_Q=sinks,
            )  # fmt: skip
            return _put(found, out)
        k, v = fused.repeated(q_BQTD, k_BGSD), fused.repeated(q_BQTD, v_BGSD)
        if mask_TS is not None:
            return _put(fused.masked(q_BQTD, k, v, mask_TS, rule.scale, sinks), out)
        return _put(fused.memory_efficient(q_BQTD, k, v, rule.scale, rule.window, sinks), out)


class FlashAttention:
    """torch's, from sm_80 on, 16 bits: keys and values are read once per group of query heads."""

    name = "flash"
    backends: tuple[SDPBackend, ...] = (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,  # windows of streamed caches need a mask
    )
    repeats_kv = False
    reads_past = False

    def refusal(self, rule: Rule, head_dim: int) -> str | None:
        if rule.softcap is not None and not _has_triton():
            return "capped scores (softcap) need Triton, which is not installed"
        return _too_wide(head_dim, "flash attention")

    def __call__(
        self, q_BQTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_TS: Tensor | None = None, *,
        rule: Rule = PLAIN, sinks: Tensor | None = None, past: Pair | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        k_BGSD, v_BGSD = _whole(past, k_BGSD, v_BGSD)
        rule = _checked(rule, k_BGSD.shape[2], mask_TS)
        _refuse(self, rule, q_BQTD.shape[-1])
        if rule.softcap is not None:
            return _in_triton(q_BQTD, (k_BGSD, v_BGSD), None, mask_TS, rule, sinks, out)
        if mask_TS is not None:
            k, v = fused.repeated(q_BQTD, k_BGSD), fused.repeated(q_BQTD, v_BGSD)
            return _put(fused.masked(q_BQTD, k, v, mask_TS, rule.scale, sinks), out)
        return _put(fused.flash(q_BQTD, k_BGSD, v_BGSD, rule.scale, rule.window, sinks), out)


class TritonAttention:
    """From sm_90 on, 16 bits: our own kernel for a past, a window, sinks, a cap or a mask, and
    torch's flash for as many queries as keys with none of these, where it is faster."""

    name = "flash, in Triton"
    backends = FlashAttention.backends  # of one query over many keys, and of transformers' modules
    repeats_kv = False
    reads_past = True

    def refusal(self, rule: Rule, head_dim: int) -> str | None:
        return _too_wide(head_dim, "flash attention")

    def __call__(
        self, q_BQTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_TS: Tensor | None = None, *,
        rule: Rule = PLAIN, sinks: Tensor | None = None, past: Pair | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        before = past[0].shape[2] if past else 0
        rule = _checked(rule, before + k_BGSD.shape[2], mask_TS)
        _refuse(self, rule, q_BQTD.shape[-1])
        square = past is None and q_BQTD.shape[2] == k_BGSD.shape[2]
        if square and mask_TS is sinks is None and rule.window is rule.softcap is None:
            return _put(fused.flash(q_BQTD, k_BGSD, v_BGSD, rule.scale, None, None), out)
        return _in_triton(q_BQTD, (k_BGSD, v_BGSD), past, mask_TS, rule, sinks, out)


def choose_attention(
    device: torch.device, dtype: torch.dtype, capability: tuple[int, int] | None
) -> Attention:
    """`capability`: (7, 5) and so on; None on the CPU."""
    if device.type == "cpu" or capability is None:
        return PlainAttention()
    if dtype != torch.float32 and capability >= (9, 0):
        return TritonAttention()
    if dtype != torch.float32 and capability >= (8, 0):
        return FlashAttention()
    return MemoryEfficientAttention()


def attend_one(
    q_BQD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    bias_BS: Tensor,
    rule: Rule = PLAIN,
    sinks: Tensor | None = None,
) -> Tensor:
    """A query for each head, over keys with a bias [B, S] on their scores, which also hides what a
    window hides; [B, Q, D of a value].

    The query heads that share keys are the rows of one product, so nothing is repeated, on any of
    the kernels that take a bias. Scores that must be seen are B Q S numbers here.
    """
    assert rule.window is None, "a window must be part of the bias: rule.masked()"
    batch, groups, keys, dim = k_BGSD.shape
    q = q_BQD.reshape(batch, groups, -1, dim)
    if rule.softcap is None and sinks is None:
        bias = bias_BS[:, None, None].expand(*q.shape[:3], keys)
        found = F.scaled_dot_product_attention(q, k_BGSD, v_BGSD, attn_mask=bias, scale=rule.scale)
    else:
        scores = _float_product(q, k_BGSD.mT) * (rule.scale or dim**-0.5)
        scores, bias = scores.view(batch, -1, 1, keys), bias_BS[:, None, None].float()
        weights = maths.score_weights(scores, bias, rule.softcap, sinks)
        found = weights.reshape(batch, groups, -1, keys).to(v_BGSD.dtype) @ v_BGSD
    return found.reshape(*q_BQD.shape[:2], v_BGSD.shape[-1])


def _float_product(a_BGRD: Tensor, b_BGDS: Tensor) -> Tensor:
    """In float32, from operands that a GPU need not copy to it."""
    if a_BGRD.device.type == "cpu" or a_BGRD.dtype == torch.float32:
        return a_BGRD.float() @ b_BGDS.float()
    a, b = a_BGRD.flatten(0, 1), b_BGDS.flatten(0, 1)
    return torch.bmm(a, b, out_dtype=torch.float32).view(*a_BGRD.shape[:3], -1)


def _checked(rule: Rule, keys: int, mask: Tensor | None) -> Rule:
    assert mask is None or rule.window is None, "a window must be part of the mask: rule.masked()"
    return rule.over(keys)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _too_wide(head_dim: int, what: str) -> str | None:
    if head_dim <= WIDEST and head_dim % 8 == 0:
        return None
    return f"{what} takes heads of a multiple of 8 up to {WIDEST} numbers, not {head_dim}"


def _whole(past: Pair | None, k: Tensor, v: Tensor) -> Pair:
    """What came before and what follows, in one; copied where there is a past."""
    return (torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)) if past else (k, v)


def _put(found: Tensor, out: Tensor | None) -> Tensor:
    return found if out is None else out.copy_(found)


def _in_triton(
    q: Tensor, own: Pair, past: Pair | None, mask: Tensor | None, rule: Rule,
    sinks: Tensor | None, out: Tensor | None,
) -> Tensor:  # fmt: skip
    from layersweep.kernels.flash_triton import attend  # brings Triton

    return attend(
        q, own, past, scale=rule.scale or q.shape[-1] ** -0.5, softcap=rule.softcap,
        window=rule.window, mask_TS=mask, sinks_Q=sinks, out=out,
    )  # fmt: skip


def _refuse(attention: Attention, rule: Rule, head_dim: int) -> None:
    """Models are refused when they are loaded; this is for who forgot to ask."""
    why = attention.refusal(rule, head_dim)
    assert why is None, why

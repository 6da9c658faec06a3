"""Attention kernels: T queries that are the last of S keys, each looking back from its place.

The kernel is chosen once, by capability and dtype. torch's math kernel is forbidden on a GPU:
it would materialize 1 GB of scores per 4096-token prompt. Where no fused kernel runs, torch
raises, and that is an error, never a fallback; what is known to be missing says `refusal`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from layersweep.families import spec
from layersweep.model import maths

# The causal mask whose last query looks at all keys. `scaled_dot_product_attention` aligns the
# first query with the first key, wrong for a branch. torch.nn.attention.bias calls the kernels that
# are called here, but brings torch's compiler along: 4 seconds of every run.
LOWER_RIGHT = 2
FLASH_WIDEST = 256  # head size; flash takes multiples of 8
SCORE_BYTES = 64 << 20  # most scores that the CPU holds at once, where it holds any
MASK_ALIGNMENT = 16  # elements between rows of a mask that the memory-efficient kernel takes


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


class Attention(Protocol):
    """One way to attend. `repeats_kv`: it needs keys and values once per query head."""

    name: str
    backends: tuple[SDPBackend, ...]
    repeats_kv: bool

    def __call__(
        self,
        q_BQTD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        mask_TS: Tensor | None = None,
        *,
        rule: Rule = PLAIN,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[B, Q, T, D of a value]. `mask_TS` (True: may look) replaces the causal rule, so a window
        must be part of it. `sinks` [Q]: scores that join the softmax and have no value."""

    def refusal(self, rule: Rule, head_dim: int) -> str | None:
        """Why it cannot attend by this rule, or None if it can."""


class PlainAttention:
    """The oracle, and the CPU's path: a dense mask where there are fewer queries than keys."""

    name = "torch scaled_dot_product_attention"
    backends: tuple[SDPBackend, ...] = ()
    repeats_kv = True

    def __init__(self) -> None:
        self._masks: dict[tuple[int, int, int | None, torch.device], Tensor] = {}

    def refusal(self, rule: Rule, head_dim: int) -> str | None:
        return None

    def __call__(
        self,
        q_BQTD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        mask_TS: Tensor | None = None,
        *,
        rule: Rule = PLAIN,
        sinks: Tensor | None = None,
    ) -> Tensor:
        queries, keys = q_BQTD.shape[2], k_BGSD.shape[2]
        rule = _checked(rule, keys, mask_TS)
        if rule.softcap is not None or sinks is not None:
            return self._by_scores(q_BQTD, k_BGSD, v_BGSD, mask_TS, rule, sinks)
        if mask_TS is None and (queries < keys or rule.window is not None):
            mask_TS = self._mask(queries, keys, rule.window, q_BQTD.device)
        q, k, v, scale = _one_width(q_BQTD, k_BGSD, v_BGSD, rule.scale)
        return maths.attend(q, k, v, mask_TS, scale)[..., : v_BGSD.shape[-1]]

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

    def refusal(self, rule: Rule, head_dim: int) -> str | None:
        if rule.softcap is None:
            return None
        return "capped scores (softcap) need a GPU of sm_80 or newer and 16-bit weights, or the CPU"

    def __call__(
        self,
        q_BQTD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        mask_TS: Tensor | None = None,
        *,
        rule: Rule = PLAIN,
        sinks: Tensor | None = None,
    ) -> Tensor:
        queries, keys = q_BQTD.shape[2], k_BGSD.shape[2]
        rule = _checked(rule, keys, mask_TS)
        _refuse(self, rule, q_BQTD.shape[-1])
        k, v = _repeated(q_BQTD, k_BGSD), _repeated(q_BQTD, v_BGSD)
        if mask_TS is not None:
            return _masked(q_BQTD, k, v, mask_TS, rule.scale, sinks)
        if queries == keys and rule.window is None and sinks is None:
            return F.scaled_dot_product_attention(q_BQTD, k, v, is_causal=True, scale=rule.scale)
        efficient = torch.ops.aten._efficient_attention_forward
        found, lse, *_ = efficient(
            *(x.transpose(1, 2) for x in (q_BQTD, k, v)),
            None, None, None, None, None, 0.0, LOWER_RIGHT, sinks is not None,
            scale=rule.scale, window_size=rule.window,
        )  # fmt: skip
        found = found.transpose(1, 2)
        return found if sinks is None else _with_sinks(found, lse, sinks)


class FlashAttention:
    """sm_80 and newer, 16 bits: keys and values are read once per group of query heads."""

    name = "flash"
    backends: tuple[SDPBackend, ...] = (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,  # windows of streamed caches need a mask
    )
    repeats_kv = False

    def refusal(self, rule: Rule, head_dim: int) -> str | None:
        if head_dim > FLASH_WIDEST:
            return f"heads of {head_dim} numbers are wider than flash attention's {FLASH_WIDEST}"
        if rule.softcap is not None and find_spec("triton") is None:
            return "capped scores (softcap) need Triton, which is not installed"
        return None

    def __call__(
        self,
        q_BQTD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        mask_TS: Tensor | None = None,
        *,
        rule: Rule = PLAIN,
        sinks: Tensor | None = None,
    ) -> Tensor:
        queries, keys = q_BQTD.shape[2], k_BGSD.shape[2]
        rule = _checked(rule, keys, mask_TS)
        _refuse(self, rule, q_BQTD.shape[-1])
        if rule.softcap is not None:
            from layersweep.kernels.softcap import attend_capped  # brings Triton

            return attend_capped(
                q_BQTD, k_BGSD, v_BGSD, scale=rule.scale or q_BQTD.shape[-1] ** -0.5,
                softcap=rule.softcap, window=rule.window, mask_TS=mask_TS, sinks_Q=sinks,
            )  # fmt: skip
        if mask_TS is not None:
            k, v = _repeated(q_BQTD, k_BGSD), _repeated(q_BQTD, v_BGSD)
            return _masked(q_BQTD, k, v, mask_TS, rule.scale, sinks)
        width = v_BGSD.shape[-1]
        q, k, v, scale = _one_width(q_BQTD, k_BGSD, v_BGSD, rule.scale)
        if rule.window is not None or sinks is not None:
            return _flash_with_sums(q, k, v, scale, rule.window, sinks)[..., :width]
        if queries == keys:
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )[..., :width]
        flash = torch.ops.aten._scaled_dot_product_flash_attention  # see LOWER_RIGHT
        found: Tensor = flash(q, k, v, is_causal=True, scale=scale)[0]
        return found[..., :width]


def choose_attention(
    device: torch.device, dtype: torch.dtype, capability: tuple[int, int] | None
) -> Attention:
    """`capability`: (7, 5) and so on; None on the CPU."""
    if device.type == "cpu" or capability is None:
        return PlainAttention()
    if capability >= (8, 0) and dtype != torch.float32:
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


def _refuse(attention: Attention, rule: Rule, head_dim: int) -> None:
    """Models are refused when they are loaded; this is for who forgot to ask."""
    why = attention.refusal(rule, head_dim)
    assert why is None, why


def _flash_with_sums(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, sinks: Tensor | None
) -> Tensor:
    """The kernel below torch's front door, which knows no window and keeps the sums to itself."""
    flash = torch.ops.aten._flash_attention_forward
    found, lse, *_ = flash(
        *(x.transpose(1, 2) for x in (q, k, v)),
        None, None, q.shape[2], k.shape[2], 0.0, True, False,
        scale=scale, window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )  # fmt: skip
    found = found.transpose(1, 2)
    return found if sinks is None else _with_sinks(found, lse, sinks)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor, scale: float | None, sinks: Tensor | None
) -> Tensor:
    if sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, scale=scale)
    queries, keys = mask_TS.shape
    width = -(-keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
    bias = torch.zeros(queries, width, dtype=q.dtype, device=q.device)[:, :keys]
    bias = bias.masked_fill_(~mask_TS, float("-inf")).expand(*q.shape[:2], -1, -1)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    found, lse, *_ = efficient(q, k, v, bias, True, scale=scale)
    return _with_sinks(found, lse, sinks)


def _with_sinks(found_BQTD: Tensor, lse_BQT: Tensor, sinks_Q: Tensor) -> Tensor:
    """A sink takes its share of each softmax: sums of e^score grow by e^sink. `lse` may be padded
    behind T."""
    lse_BQT = lse_BQT[..., : found_BQTD.shape[2]].float()
    share = torch.sigmoid(lse_BQT - sinks_Q.float()[:, None])
    return found_BQTD.mul_(share[..., None])


def _one_width(
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


def _repeated(q_BQTD: Tensor, x_BGSD: Tensor) -> Tensor:
    repeats = q_BQTD.shape[1] // x_BGSD.shape[1]
    return x_BGSD.repeat_interleave(repeats, dim=1) if repeats > 1 else x_BGSD

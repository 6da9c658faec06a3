"""Rotary tables of every kind that transformers knows, equal to its `ROPE_INIT_FUNCTIONS`.

A table depends on the length of the whole sequence for two kinds: "dynamic" (NTK) stretches the
base once a sequence is longer than `original_length`, and "longrope" takes its long factors then.
So a window's table is made for all of its tokens, prefix and branch alike, which is what one
forward pass over them uses. A sequence that grows keeps one table, made for the most tokens that
it can reach: keys that were rotated with another base would not fit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layersweep.families.spec import Rope


def rope_table(rope: Rope, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, dim], float32, of `positions` [T] in a sequence of `length` tokens.

    Columns i and i + dim / 2 hold the angle of pair i, whichever coordinates that pair has.
    """
    angle = positions.float()[:, None] * inverse_frequencies(rope, length, positions.device)
    angle = torch.cat((angle, angle), dim=-1)
    factor = attention_factor(rope)
    return angle.cos() * factor, angle.sin() * factor


def inverse_frequencies(rope: Rope, length: int, device: torch.device | None = None) -> Tensor:
    """Radians per token of each pair: float32 [dim / 2]."""
    if rope.kind == "proportional":
        return _proportional(rope, device)
    if rope.kind == "longrope":
        return _longrope(rope, length, device)
    if rope.kind == "yarn":
        return _yarn(rope, device)
    if rope.kind == "dynamic":
        return 1.0 / _stretched_base(rope, length, device) ** _exponents(rope, device)
    plain = 1.0 / rope.theta ** _exponents(rope, device)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    assert rope.kind == "default", rope.kind
    return plain


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by, so that scores of a stretched context keep their spread.

    YaRN (Peng et al., 2023, arXiv:2309.00071, section 3.4) with DeepSeek's two mscales; LongRoPE
    (Ding et al., 2024, arXiv:2402.13753).
    """
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length))
    if rope.mscale and rope.mscale_all_dim:
        return _spread(rope.factor, rope.mscale) / _spread(rope.factor, rope.mscale_all_dim)
    return _spread(rope.factor, 1.0)


def _spread(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _exponents(rope: Rope, device: torch.device | None) -> Tensor:
    return torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device) / rope.dim


def _proportional(rope: Rope, device: torch.device | None) -> Tensor:
    """Only the first `turning` of dim / 2 pairs turn, with the frequencies of a whole head."""
    turning = int(rope.turning * rope.dim // 2)
    found = torch.zeros(rope.dim // 2, device=device)
    found[:turning] = 1.0 / rope.theta ** _exponents(rope, device)[:turning]
    return found / rope.factor


def _stretched_base(rope: Rope, length: int, device: torch.device | None) -> Tensor:
    """The NTK base: in float64 up to `original_length`, in float32 beyond, as a forward pass of
    transformers has it, where the length is a tensor."""
    power = rope.dim / (rope.dim - 2)
    if length <= rope.original_length:
        stretch = rope.factor * rope.original_length / rope.original_length - (rope.factor - 1)
        return torch.tensor(rope.theta * stretch**power, dtype=torch.float32, device=device)
    tokens = torch.tensor(length, device=device)
    stretched = rope.factor * tokens / rope.original_length - (rope.factor - 1)
    return rope.theta * stretched**power


def _longrope(rope: Rope, length: int, device: torch.device | None) -> Tensor:
    factors = rope.long_factor if length > rope.original_length else rope.short_factor
    stretch = torch.tensor(factors, dtype=torch.float32, device=device)
    return 1.0 / (stretch * rope.theta ** _exponents(rope, device))


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Llama 3.1: long waves are slowed down by `factor`, short ones kept, a ramp in between."""
    wave = 2 * math.pi / plain
    longest = rope.original_length / rope.low_freq_factor
    shortest = rope.original_length / rope.high_freq_factor
    ramp = rope.original_length / wave - rope.low_freq_factor
    ramp = ramp / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - ramp) * plain / rope.factor + ramp * plain
    slowed = torch.where(wave > longest, plain / rope.factor, plain)
    return torch.where((wave >= shortest) & (wave <= longest), between, slowed)


def _yarn(rope: Rope, device: torch.device | None) -> Tensor:
    """Pairs that turn more than `beta_fast` times in the original context are kept, those that
    turn less than `beta_slow` times are slowed down by `factor`, a ramp in between."""
    powers = rope.theta ** _exponents(rope, device)
    low, high = (_pair_that_turns(rope, times) for times in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    pair = torch.arange(rope.dim // 2, dtype=torch.float32, device=device)
    kept = 1 - ((pair - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _pair_that_turns(rope: Rope, times: float) -> float:
    """The pair, as a fraction of pairs, that turns that often in the original context."""
    length = rope.original_length / (times * 2 * math.pi)
    return (rope.dim * math.log(length)) / (2 * math.log(rope.theta))

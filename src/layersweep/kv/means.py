"""Channel means and levels, which codecs take from a sequence before they encode its vectors."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layersweep.kv.codec import Codec, wants_level, wants_mean
from layersweep.kv.rotate import add_rows

if TYPE_CHECKING:
    from layersweep.kernels import Kernels

MOST_COLUMNS = 256  # of the kernels


def mean_kind(codec: Codec) -> tuple[bool, bool]:
    """What `mean_for` gives a codec: a mean, and a level with it."""
    return wants_mean(codec), wants_level(codec)


def mean_for(codec: Codec, x_BHTD: Tensor) -> Tensor | None:
    """Float16 means of x for a codec that wants them: [B, H, D], or with the level [B, H, D + 1].

    Removing the mean costs values nothing (attention weights sum to 1), and of keys it takes the
    channels that stand out. The level is the rms of all numbers around their channels' means; one
    token leaves nothing around its mean, so it is at least 1/16 of the rms of x. Sums are added in
    a fixed tree: they do not depend on the batch.
    """
    if not wants_mean(codec):
        return None
    tokens = x_BHTD.shape[2]
    kernels = _kernels_for(x_BHTD)
    if kernels is None and not wants_level(codec):
        return (add_rows(x_BHTD.float(), dim=2) / tokens).to(torch.float16)
    sums = kernels.column_sums(x_BHTD) if kernels else sums_by_torch(x_BHTD)
    if not wants_level(codec):
        return (sums[0] / tokens).to(torch.float16)
    return (kernels.mean_and_level if kernels else mean_and_level_by_torch)(sums, tokens)


def mean_and_level_by_torch(sums: Tensor, tokens: int) -> Tensor:
    """What `sums_by_torch` gives for `tokens` tokens -> float16 [B, H, D + 1]."""
    mean = sums[0] / tokens
    square, power = add_rows(torch.stack((mean * mean, sums[1])), dim=-1)
    power = power / tokens
    around = torch.maximum(power - square, power / 256)
    level = (around / mean.shape[-1]).sqrt().clamp(min=torch.finfo(torch.float16).tiny)
    return torch.cat((mean, level.unsqueeze(-1)), dim=-1).to(torch.float16)


def sums_by_torch(x_BHTD: Tensor) -> Tensor:
    """Sums of x and of its squares over the tokens, float32 [2, B, H, D]."""
    both = torch.empty(2, *x_BHTD.shape, dtype=torch.float32, device=x_BHTD.device)
    both[0] = x_BHTD
    torch.mul(both[0], both[0], out=both[1])
    return add_rows(both, dim=3)


def _kernels_for(x_BHTD: Tensor) -> Kernels | None:
    # kernels for float32 input are part of every module: one less to compile
    dtype = torch.float16 if x_BHTD.dtype == torch.float32 else x_BHTD.dtype
    fits = x_BHTD.stride(3) == 1 and x_BHTD.shape[3] <= MOST_COLUMNS
    return _kernels(x_BHTD.device, dtype) if fits else None


@cache
def _kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """CUDA kernels, equal to torch bit for bit; None: there are none. The engine says elsewhere
    that they are missing. A refusal is remembered, too."""
    if device.type != "cuda":
        return None
    from layersweep.kernels import KernelError, load_kernels

    try:
        kernels = load_kernels(device, dtype)
        kernels.compile_sums()
    except KernelError:
        return None
    return kernels

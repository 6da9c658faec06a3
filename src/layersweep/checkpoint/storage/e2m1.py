"""Four-bit floats: a sign, two bits of exponent, one of mantissa. Two in a byte, low bits first."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = (*_MAGNITUDES, *(-one for one in _MAGNITUDES))
PIECE = 1 << 20  # elements that are decoded at once on the CPU


def decode_groups(codes: Tensor, scales: Tensor, group: int, out: Tensor) -> None:
    """Fill `out` [...] with levels times scales, in float32 and then rounded once.

    codes uint8 [n / 2], scales float32 [n / group].
    """
    import torch

    codes, flat = codes.reshape(-1), out.view(-1)
    pairs = _pairs(codes.device)
    step = out.numel() if codes.is_cuda else PIECE // group * group
    for start in range(0, out.numel(), step):
        stop = min(start + step, out.numel())
        two = torch.index_select(pairs, 0, codes[start // 2 : stop // 2].int())
        groups = two.view(torch.float32).view(-1, group)
        torch.mul(
            groups, scales[start // group : stop // group, None],
            out=flat[start:stop].view(-1, group),
        )  # fmt: skip


@lru_cache(maxsize=8)
def _pairs(device: torch.device) -> Tensor:
    """int64 [256]: both float32 of a byte as one word."""
    import torch

    byte, levels = torch.arange(256), torch.tensor(LEVELS)
    pairs = torch.stack([levels[byte & 15], levels[byte >> 4]], dim=1)
    return pairs.view(torch.int64).view(-1).to(device)

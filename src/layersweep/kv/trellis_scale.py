"""The byte that `trellis` stores for the size of a vector, relative to a level.

The byte n + 128 stands for level 2^e, e = n / 32 within 2 octaves, then sign(n) (|n| / 32 +
(|n| - 64)^2 / 256): steps grow from 1/32 octave around the level to half of one at 2^+-19. Byte 0
stands for 0, byte 255 for NaN, which the reader of a cache reports: not finite, or too large.

Codes are found by comparing with thresholds: no root and no logarithm, which devices round
differently.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
from torch import Tensor

ZERO, NOT_A_NUMBER = 0, 255


def _octave(n: int) -> float:
    beyond = max(0, abs(n) - 64)
    return math.copysign(abs(n) / 32 + beyond * beyond / 256, n)


@cache
def scale_values(device: torch.device) -> Tensor:
    """What each byte stands for, in levels, float32 [256]."""
    values = [2 ** _octave(byte - 128) for byte in range(256)]
    values[ZERO], values[NOT_A_NUMBER] = 0.0, math.nan
    return torch.tensor(values, dtype=torch.float32, device=device)


def _limits() -> list[float]:
    values = [2 ** _octave(byte - 128) for byte in range(256)]
    return [math.sqrt(one * another) for one, another in itertools.pairwise(values)]


@cache
def scale_thresholds(device: torch.device) -> Tensor:
    """Scale, in levels, from which each byte 1 ... 255 is taken, float32 [255]: the geometric mean
    of the two that it lies between."""
    return torch.tensor(_limits(), dtype=torch.float32, device=device)


@cache
def square_thresholds(gain: float, dim: int, device: torch.device) -> Tensor:
    """Sum of `dim` squares, in squared levels, whose rms times `gain` is at each of the thresholds,
    float32 [255]."""
    squares = [dim * (limit / gain) ** 2 for limit in _limits()]
    return torch.tensor(squares, dtype=torch.float32, device=device)


@cache
def inverse_scales(gain: float, device: torch.device) -> Tensor:
    """`gain` over what each byte stands for, float32 [256]; 0 for the scale 0, NaN for NaN."""
    inverse = gain / scale_values(torch.device("cpu")).double()
    inverse[ZERO] = 0.0
    return inverse.float().to(device)


def reached(size: Tensor, limits: Tensor, reach: Tensor) -> Tensor:
    """How many of the 255 ascending limits, times reach [N], are not above size [N]; int32 [N]."""
    found = torch.zeros_like(size, dtype=torch.int32)
    for bit in (128, 64, 32, 16, 8, 4, 2, 1):  # not "below": NaN goes to the end
        found += bit * ~(size < limits[found + (bit - 1)] * reach)
    return found

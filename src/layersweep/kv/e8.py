"""`e8`: the published method (nexusquant-kv, mode quant_only) as arithmetic. Simulated.

For a head vector, rotated by the plain Hadamard matrix to y of size D, with L = 2^bits:
    u = y / s, s = max|y| / (L / 2); every 8 consecutive coordinates go to the nearer of
    (a) integers, each the nearest; if their sum is odd, the coordinate with the largest rounding
        gap goes to its second-nearest integer instead (v=0.5: the one with the smallest gap)
    (b) half-integers, each the nearest, whatever their sum
    and are then clamped to [-L/2, L/2].
An equal distance takes (a); of equal gaps the first coordinate moves; a gap of 0 moves up.

v=0.6 is the arithmetic of versions 0.6.x, v=0.5 that of 0.5.x, behind the published Mixtral rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.codec import Codec, Packed
from layersweep.kv.identity import Identity
from layersweep.kv.rotate import add_rows, max_rows, rotate, rotate_back
from layersweep.kv.uniform import ROUNDER
from layersweep.kv.vector_codec import Layout, RowCodec

_GROUP = 8
_SCALE_BITS = 16


def group_bits(bits: int) -> float:
    """log2 of the number of points that a group of 8 can be given: its fixed-rate index.

    Integers in [-m, m], m = L/2: (L + 1)^8 tuples. The alternating sum over one coordinate,
    sum of (-1)^k for k in [-m, m], is +-1, so even-sum tuples outnumber odd ones by exactly one.
    Half-integers in [-m, m]: L^8 tuples. Points that only a clamped tie reaches (the largest
    coordinate of a vector lies exactly on m) are left out, in the method's favour: they would
    need an index of 0.07 bit per element more at 2 bits.
    """
    levels = 2**bits
    even_integers = ((levels + 1) ** _GROUP + 1) // 2
    return math.log2(even_integers + levels**_GROUP)


def fixed_rate_bytes(packed: Packed) -> int:
    """An index per group of 8 and an fp16 scale per vector."""
    vectors = packed.codes.shape[:3].numel()
    groups = packed.dim // _GROUP
    return math.ceil(vectors * (groups * group_bits(packed.bits) + _SCALE_BITS) / 8)


@dataclass(frozen=True)
class E8(RowCodec):
    """See the module's text. `v` is "0.6" or "0.5".

    Packed holds doubled coordinates as integers and the scale in float32, as the published
    program computes with it; `nbytes` counts the fixed-rate index and an fp16 scale per vector.
    """

    key_bits: int
    value_bits: int
    v: str = "0.6"

    method = "e8"
    simulated = True

    def layout(self, dim: int, bits: int) -> Layout:
        # Doubled coordinates reach 2^bits: 128 and more do not fit int8.
        return Layout(dim, torch.int8 if bits < 7 else torch.int16, scale=torch.float32)

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        y_DN = rotate(x_ND, randomized=False)
        scale = _scale(y_DN, bits)
        return _doubled_points(y_DN.div_(scale), bits, smallest=self.v == "0.5").t(), scale

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        assert scale is not None
        y_DN = torch.empty(dim, len(codes), device=codes.device)
        y_DN.copy_(codes.float().t()).mul_(0.5).mul_(scale)
        return rotate_back(y_DN, randomized=False)

    def nbytes(self, packed: Packed) -> int:
        return fixed_rate_bytes(packed)

    def identity(self) -> Codec:
        return Identity(of=self.method, randomized=False)


def _scale(y_DN: Tensor, bits: int) -> Tensor:
    """[N]: max|y| / (L / 2), the maximum floored at the smallest normal number."""
    largest = max_rows(y_DN.abs())
    return largest.clamp_(min=torch.finfo(torch.float32).tiny).div_(2 ** (bits - 1))


def _doubled_points(u_DN: Tensor, bits: int, smallest: bool) -> Tensor:
    """Twice the chosen point of every coordinate, [D, N] float32 integers.

    With g the distance to the nearest integer, the half-integer lies 1/2 - g away and the
    second-nearest integer 1 - g. So the squared distances of the two candidates differ by
        (b) - (a) = sum(1/4 - g) - odd * (1 - 2 g_moved) = 2 - sum g - odd * (1 - 2 g_moved)
    over a group: no squares are needed to see which is nearer.
    """
    u = u_DN.view(-1, _GROUP, u_DN.shape[1])
    integer = (u + ROUNDER).sub_(ROUNDER)
    offset = u - integer
    gap = offset.abs()
    half_sum = add_rows(integer, dim=1).mul_(0.5)
    odd = (half_sum != (half_sum + ROUNDER).sub_(ROUNDER)).float()
    moved = -max_rows(-gap, dim=1) if smallest else max_rows(gap, dim=1)
    difference = 2 - add_rows(gap, dim=1) - odd * (1 - 2 * moved)
    torch.eq(gap, moved.unsqueeze(1), out=gap)
    integer.add_(first_of_group(gap, odd).mul_(offset.ge_(0).mul_(2).sub_(1)))
    step = (u - 0.5).add_(ROUNDER).sub_(ROUNDER).add_(0.5).sub_(integer)
    points = integer.add_(step.mul_((difference < 0).float().unsqueeze(1)))
    limit = 2.0 ** (bits - 1)
    return points.clamp_(-limit, limit).mul_(2).view(u_DN.shape)


def first_of_group(marked: Tensor, wanted: Tensor) -> Tensor:
    """Of the 1.0s in `marked` [D/8, 8, N] keep the first of each group whose `wanted` [D/8, N] is
    1.0, in place. Floats, because torch's bool operations are several times as slow."""
    waiting = wanted.clone()
    for coordinate in marked.unbind(1):
        coordinate.mul_(waiting)
        waiting.sub_(coordinate)
    return marked

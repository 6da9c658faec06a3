"""`voronoi`: nested E8 lattice codes with one of 4 scales per 8 numbers (NestQuant).

For a head vector rotated to y, s = rms(y) (fp16), u = y / s, and every 8 consecutive coordinates
of u, with q = 2^bits and each of the 4 constants beta:
    p = nearest point of E8 to u / beta, kept by its 8 integer coordinates modulo q
    p^ = the one point of E8 in the shifted Voronoi region a + q V with the same coordinates
The beta with the smallest |u - beta p^|^2 is taken, 2 bits say which; x^ = rotate_back(s beta p^).
A block that does not fit a small beta (p^ far from p) finds a larger one.
Bits per element: bits + ceil(D / 32) / (D / 8) + 16 / D; at D = 128 that is bits + 0.375.

Source: NestQuant, arXiv 2502.09720; coordinates modulo q: Conway and Sloane, "A fast encoding
method for lattice codes and quantizers", 1983. NestQuant's own scales are found per layer from
data; here they are constants for Gaussians, to which a rotation makes any vector similar.

The betas are the output of `python tools/find_voronoi_betas.py`: the best 4 of a fine grid on
random Gaussian blocks, with the mean squared error that they reach. At 1 bit most points do not
fit any of them: that is a limit of the code, which has 256 points in 8 dimensions there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from layersweep.kv.codec import Codec
from layersweep.kv.e8 import first_of_group
from layersweep.kv.identity import Identity
from layersweep.kv.packing import pack_bits, unpack_bits
from layersweep.kv.rotate import add_rows, max_rows, rotate, rotate_back
from layersweep.kv.uniform import ROUNDER, SMALLEST_HALF
from layersweep.kv.vector_codec import Layout, RowCodec

GROUP = 8
BETAS: dict[int, tuple[float, float, float, float]] = {
    1: (1.639, 2.269, 3.049, 7.623),  # 0.68016
    2: (0.7957, 1.038, 1.355, 1.931),  # 0.08189
    3: (0.4098, 0.5191, 0.6384, 0.9103),  # 0.01839
    4: (0.2049, 0.2596, 0.3288, 0.5122),  # 0.00450
    5: (0.1024, 0.1298, 0.1644, 0.2487),  # 0.00112
    6: (0.05276, 0.06683, 0.08466, 0.1359),  # 0.00028
    8: (0.01281, 0.01622, 0.02055, 0.03108),  # 0.00002
}
_SMALLEST_MEAN_SQUARE = 1e-36


@dataclass(frozen=True)
class Voronoi(RowCodec):
    """See the module's text. Packed: bytes of coordinates, then of indices, and an fp16 scale."""

    key_bits: int
    value_bits: int

    method = "voronoi"

    def layout(self, dim: int, bits: int) -> Layout:
        return Layout(dim * bits // 8 + -(-dim // 32))

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        count, dim = x_ND.shape
        u_DN = rotate(x_ND, randomized=True)
        mean_square = add_rows(u_DN * u_DN).div_(dim)
        inverse_rms = mean_square.clamp(min=_SMALLEST_MEAN_SQUARE).rsqrt_()
        scale = (mean_square * inverse_rms).to(torch.float16)
        u = u_DN.div_(scale.float().clamp_(min=SMALLEST_HALF)).view(-1, GROUP, count)
        point, index, _ = best_points(u, bits, BETAS[bits])
        coordinates = _coordinates(point, bits).view(dim, count)
        return torch.cat([pack_bits(coordinates, bits), _pack_pairs(index)], dim=1), scale

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        assert scale is not None
        coordinates = unpack_bits(codes[:, : dim * bits // 8].contiguous(), bits)
        index = _unpack_pairs(codes[:, dim * bits // 8 :], dim // GROUP)
        point = wrap(_point(coordinates.float().view(-1, GROUP, len(codes))), bits)
        betas = _constants(BETAS[bits], codes.device)
        point.mul_(betas[index.reshape(-1)].view(index.shape).unsqueeze(1))
        return rotate_back(point.view(dim, -1).mul_(scale.float()), randomized=True)

    def identity(self) -> Codec:
        return Identity(of=self.method, randomized=True)


def best_points(u: Tensor, bits: int, betas: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks u [K, 8, N] -> point p^ [K, 8, N] float32, index of its beta [K, N] int32, error."""
    point = torch.zeros_like(u)  # what stays, where nothing is nearest: a block with NaN in it
    index = torch.zeros(u.shape[0], u.shape[2], dtype=torch.int32, device=u.device)
    error = torch.full_like(u[:, 0], torch.inf)
    for number, beta in enumerate(betas):
        candidate = wrap(nearest_point(u / beta), bits)
        difference = (candidate * beta).sub_(u)
        squared = add_rows(difference.mul_(difference), dim=1)
        closer = squared < error
        torch.where(closer.unsqueeze(1), candidate, point, out=point)
        index.masked_fill_(closer, number)
        torch.minimum(error, squared, out=error)
    return point, index, error


def nearest_point(u: Tensor) -> Tensor:
    """Nearest point of E8 = D8 and D8 + 1/2 to blocks u [K, 8, N], a new tensor.

    With g the distance to the nearest integer, the nearest half-integer is 1/2 - g away. Where a
    sum has the wrong parity, the coordinate that is farthest away moves: of the integers the one
    with the largest g, of the half-integers the one with the smallest. So the squared distances of
    the two candidates differ by
        2 - sum g + odd_half * 2 g_min - odd_integer * (1 - 2 g_max)
    """
    point = (u + ROUNDER).sub_(ROUNDER)
    half = (u - 0.5).add_(ROUNDER).sub_(ROUNDER)
    gap = (u - point).abs_()
    odd_integer, odd_half = _odd(add_rows(point, dim=1)), _odd(add_rows(half, dim=1))
    smallest, largest = -max_rows(-gap, dim=1), max_rows(gap, dim=1)
    difference = (2 - add_rows(gap, dim=1)).add_(odd_half * smallest * 2)
    is_half = difference.sub_(odd_integer * (1 - 2 * largest)).lt(0).float()
    point.add_(half.add_(0.5).sub_(point).mul_(is_half.unsqueeze(1)))
    moved = torch.where(is_half > 0, smallest, largest)
    odd = odd_integer.add_((odd_half - odd_integer).mul_(is_half))
    mark = torch.eq(gap, moved.unsqueeze(1), out=torch.empty_like(gap))
    away = (u >= point).float().mul_(2).sub_(1)
    return point.add_(first_of_group(mark, odd).mul_(away))


def _odd(total: Tensor) -> Tensor:
    """1.0 where an integer is odd, else 0.0."""
    half = total * 0.5
    return (half != (half + ROUNDER).sub_(ROUNDER)).float()


def wrap(point: Tensor, bits: int) -> Tensor:
    """The point of a + q V that differs from `point` [K, 8, N] by q times a point of E8.

    Exact in float32, and never a tie: <a, v> is no integer for any of the 240 shortest v of E8.
    So all points with the same coordinates modulo q give the same one.
    """
    shift = _constants(tuple(2.0**i / 2**11 for i in range(GROUP)), point.device).unsqueeze(1)
    step = nearest_point((point - shift).mul_(0.5**bits))
    return point - step.mul_(2.0**bits)


def _coordinates(point: Tensor, bits: int) -> Tensor:
    """Points of E8 [K, 8, N] -> integers [K, 8, N] int32 below 2^bits.

    Basis: 2 e1; e_i - e_(i-1) for i = 2 ... 7; (1/2, ..., 1/2).
    """
    last = point[:, 7:]
    sums = (point - last).flip(1).cumsum(1).flip(1)
    sums[:, 0] *= 0.5
    sums[:, 7:] = last * 2
    return torch.bitwise_and(sums.int(), 2**bits - 1)


def _point(coordinates: Tensor) -> Tensor:
    """Inverse of _coordinates up to q E8, [K, 8, N] float32."""
    point = coordinates.clone()
    point[:, :6] -= coordinates[:, 1:7]
    point[:, 0] += coordinates[:, 0]
    half = coordinates[:, 7:] * 0.5
    point[:, :7] += half
    point[:, 7:] = half
    return point


def _pack_pairs(index: Tensor) -> Tensor:
    """Numbers below 4 [K, N] int32 -> [N, ceil(K / 4)] uint8, the first in the lowest bits."""
    missing = -len(index) % 4
    if missing:
        index = torch.cat([index, index.new_zeros(missing, index.shape[1])])
    first, second, third, fourth = index.view(-1, 4, index.shape[1]).unbind(1)
    return (first | second << 2 | third << 4 | fourth << 6).t().to(torch.uint8)


def _unpack_pairs(packed: Tensor, groups: int) -> Tensor:
    """Inverse of _pack_pairs: [N, ceil(K / 4)] uint8 -> [K, N] int32."""
    bytes_KN = packed.t().int()
    parts = torch.stack([bytes_KN >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)
    return parts.view(-1, packed.shape[0])[:groups]


@cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)

"""`lloyd`: randomized Hadamard rotation, one RMS scale per vector, Lloyd-Max levels, really packed.

For a head vector x of size D, rotated to y:
    u = y / rms(y)              nearly unit Gaussian, whatever x was
    c = nearest level of u      the levels are centroids: on average <u, c> = <c, c> < <u, u>
    s = rms(y) * D / <u, c>     the stored scale (fp16), so that <x, x^> = <x, x>
    x^ = rotate_back(s * c)
Centroids shrink a vector by 1 - distortion. In a sum of values that bias does not average out,
and in scores it flattens the softmax; the factor D / <u, c> removes it, at the price of a mean
squared error of d / (1 - d) instead of d.

Limits, all of the fp16 scale: a vector whose rms is above about 65,000 gets the scale inf and
decodes non-finite, which the reader reports; below rms 6e-5 the scale loses digits (subnormal),
below 3e-8 the vector decodes to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layersweep.kv.codec import Codec, Packed
from layersweep.kv.identity import Identity
from layersweep.kv.lloyd_tables import POSITIVE_LEVELS
from layersweep.kv.packing import pack_bits, unpack_bits
from layersweep.kv.rotate import add_rows, rotate, rotate_back, rotation_weights
from layersweep.kv.vector_codec import Layout, RowCodec

if TYPE_CHECKING:
    from layersweep.kernels import Kernels

# Up to this many levels, comparing with every boundary beats a binary search (at 8: 4x, measured).
_FEW = 16
_SMALLEST_MEAN_SQUARE = 1e-36
_SMALLEST_DOT = 1e-3  # <u, c> of a vector with rms 1 is above 0.01 at every number of bits


@cache
def boundaries(bits: int, device: torch.device) -> Tensor:
    """Magnitudes at which the next level becomes the nearer one, [2^(bits-1) - 1] float32."""
    levels = POSITIVE_LEVELS[bits]
    middles = [(low + high) / 2 for low, high in pairwise(levels)]
    return torch.tensor(middles, dtype=torch.float32, device=device)


@cache
def signed_levels(bits: int, device: torch.device) -> Tensor:
    """Level of every code, [2^bits] float32: low bits the magnitude, top bit the sign."""
    positive = POSITIVE_LEVELS[bits]
    values = [*positive, *(-level for level in positive)]
    return torch.tensor(values, dtype=torch.float32, device=device)


@cache
def nearest_values(bits: int, device: torch.device) -> Tensor:
    """Value that nearest_levels gives for every index, [2^(bits-1)] float32."""
    levels = POSITIVE_LEVELS[bits]
    if len(levels) > _FEW:
        return signed_levels(bits, device)[: len(levels)].contiguous()
    values = [torch.tensor(levels[0], dtype=torch.float32)]
    for low, high in pairwise(levels):
        values.append(values[-1] + (high - low))  # rounded at each step, as there
    return torch.stack(values).to(device)


def look_up(levels: Tensor, codes: Tensor) -> Tensor:
    """levels[codes], for int32 codes; a flat index_select is 4 times as fast on a CPU."""
    return torch.index_select(levels, 0, codes.view(-1)).view(codes.shape)


def nearest_levels(magnitude: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Index (int32) and value of the nearest positive level. NaN may give any of them."""
    levels = POSITIVE_LEVELS[bits]
    if len(levels) > _FEW:
        edges = boundaries(bits, magnitude.device)
        index = torch.bucketize(magnitude, edges, out_int32=True)
        return index, look_up(signed_levels(bits, magnitude.device), index)
    count = torch.zeros_like(magnitude)
    nearest = torch.full_like(magnitude, levels[0])
    beyond = torch.empty_like(magnitude)  # 0.0 or 1.0: comparing into bool is 4 times as slow
    for low, high in pairwise(levels):
        torch.gt(magnitude, (low + high) / 2, out=beyond)
        count += beyond
        nearest.add_(beyond, alpha=high - low)
    return count.int(), nearest


@dataclass(frozen=True)
class Lloyd(RowCodec):
    """See the module's text. Packed: D x bits / 8 bytes of codes and an fp16 scale per vector."""

    key_bits: int
    value_bits: int

    method = "lloyd"

    def layout(self, dim: int, bits: int) -> Layout:
        return Layout(dim * bits // 8)

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        u_DN, mean_square, inverse_rms = unit_rows(x_ND)
        magnitude = u_DN.abs()
        index, nearest = nearest_levels(magnitude, bits)
        dot = add_rows(nearest.mul_(magnitude))
        scale = mean_square * inverse_rms * (x_ND.shape[1] / dot.clamp_(min=_SMALLEST_DOT))
        return pack_bits(with_signs(index, u_DN, bits), bits), scale.to(torch.float16)

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        assert scale is not None
        y_DN = look_up(signed_levels(bits, codes.device), unpack_bits(codes, bits))
        return rotate_back(y_DN.mul_(scale.float()), randomized=True)

    def encode_all(
        self, x_BHTD: Tensor, bits: int, mean: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dim, device = x_BHTD.shape[3], x_BHTD.device
        kernels = _kernels(device, x_BHTD.dtype, dim)
        if kernels is None:
            return super().encode_all(x_BHTD, bits, mean)
        weights = rotation_weights(dim, True, device).view(-1)
        tables = boundaries(bits, device), nearest_values(bits, device)
        flat = x_BHTD.reshape(-1, dim).contiguous()
        return kernels.lloyd_encode(flat, bits, weights, *tables)

    def decode_all(self, packed: Packed) -> Tensor:
        dim, bits, device = packed.dim, packed.bits, packed.codes.device
        kernels = _kernels(device, torch.float16, dim)  # any T will do: the output is float32
        if kernels is None:
            return super().decode_all(packed)
        codes, scale = packed.rows()
        assert scale is not None
        weights = rotation_weights(dim, True, device).view(-1)
        out = torch.empty(len(codes), dim, dtype=torch.float32, device=device)
        contiguous = codes.contiguous(), scale.contiguous()
        kernels.lloyd_decode(*contiguous, bits, weights, signed_levels(bits, device), out)
        return out

    def identity(self) -> Codec:
        return Identity(of=self.method, randomized=True)


def unit_rows(x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D] -> rotated, u [D, N] of rms 1; its mean square before that [N], and 1 / rms [N]."""
    u_DN = rotate(x_ND, randomized=True)
    mean_square = add_rows(u_DN * u_DN).div_(x_ND.shape[1])
    # Not sqrt: torch's wakes all threads for any size, 7 ms on a busy machine for 10 us of work.
    inverse_rms = mean_square.clamp(min=_SMALLEST_MEAN_SQUARE).rsqrt_()
    return u_DN.mul_(inverse_rms), mean_square, inverse_rms


def with_signs(index_DN: Tensor, u_DN: Tensor, bits: int) -> Tensor:
    """Codes: the sign bit of the float, spread over the word, becomes the top bit of `index`."""
    return index_DN.bitwise_or_((u_DN.view(torch.int32) >> 31) & (1 << (bits - 1)))


@cache
def _kernels(device: torch.device, dtype: torch.dtype, dim: int) -> Kernels | None:
    """CUDA kernels for head vectors of `dim`, equal to torch bit for bit; None: there are none.

    The engine says elsewhere that they are missing. A refusal is remembered, too.
    """
    if device.type != "cuda":
        return None
    from layersweep.kernels import KernelError, load_kernels

    try:
        kernels = load_kernels(device, dtype)
        kernels.compile_vectors("lloyd", dim)
    except KernelError:
        return None
    return kernels

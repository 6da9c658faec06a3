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

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from layersweep.kv.codec import Codec, Packed, check_input, join_tokens, role_bits
from layersweep.kv.identity import Identity
from layersweep.kv.lloyd_tables import POSITIVE_LEVELS
from layersweep.kv.packing import pack_bits, unpack_bits
from layersweep.kv.rotate import add_rows, rotate, rotate_back, row_chunks
from layersweep.kv.stream import Stream

# Below this many boundaries, comparing with each beats a binary search (measured: 4x at 7).
_FEW = 15
_SMALLEST_RMS = 1e-30
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


def look_up(levels: Tensor, codes: Tensor) -> Tensor:
    """levels[codes], for int32 codes; a flat index_select is 4 times as fast on a CPU."""
    return torch.index_select(levels, 0, codes.view(-1)).view(codes.shape)


def nearest_magnitudes(magnitude: Tensor, bits: int) -> Tensor:
    """Index of the nearest positive level, uint8 of the same shape. NaN may give any index."""
    if 2 ** (bits - 1) - 1 > _FEW:
        edges = boundaries(bits, magnitude.device)
        return torch.bucketize(magnitude, edges, out_int32=True).to(torch.uint8)
    index = torch.zeros_like(magnitude, dtype=torch.uint8)
    levels, beyond = POSITIVE_LEVELS[bits], torch.empty_like(index, dtype=torch.bool)
    for low, high in pairwise(levels):
        torch.gt(magnitude, (low + high) / 2, out=beyond)
        index += beyond.view(torch.uint8)
    return index


@dataclass(frozen=True)
class Lloyd:
    """See the module's text. Packed: D x bits / 8 bytes of codes and an fp16 scale per vector."""

    key_bits: int
    value_bits: int

    method = "lloyd"
    version = "1"
    simulated = False
    encoder = "torch"

    def encode(
        self, x: Tensor, stream: Stream, positions: Tensor, mean: Tensor | None = None
    ) -> Packed:
        check_input(self, x, stream, mean)
        return _encode(x, role_bits(self, stream))

    def append(self, packed: Packed, x: Tensor, positions: Tensor) -> Packed:
        return join_tokens([packed, _encode(x, packed.bits)])

    def decode(self, packed: Packed, positions: Tensor) -> Tensor:
        batch, heads, tokens, width = packed.codes.shape
        codes = packed.codes.reshape(-1, width)
        assert packed.scale is not None
        scale = packed.scale.reshape(-1)
        levels = signed_levels(packed.bits, codes.device)
        out = torch.empty(len(codes), packed.dim, dtype=torch.float32, device=codes.device)
        for rows in row_chunks(len(codes), packed.dim, codes.device):
            y_DN = look_up(levels, unpack_bits(codes[rows], packed.bits))
            out[rows] = rotate_back(y_DN.mul_(scale[rows].float()), randomized=True)
        return out.view(batch, heads, tokens, packed.dim)

    def nbytes(self, packed: Packed) -> int:
        assert packed.scale is not None
        return packed.codes.numel() + 2 * packed.scale.numel()

    def sharing_key(self, stream: Stream) -> Hashable:
        return (self.method, role_bits(self, stream))

    def identity(self) -> Codec:
        return Identity(of=self.method, randomized=True)


def _encode(x: Tensor, bits: int) -> Packed:
    batch, heads, tokens, dim = x.shape
    flat = x.reshape(-1, dim)
    codes = torch.empty(len(flat), dim * bits // 8, dtype=torch.uint8, device=x.device)
    scale = torch.empty(len(flat), dtype=torch.float16, device=x.device)
    for rows in row_chunks(len(flat), dim, x.device):
        codes[rows], scale[rows] = _encode_rows(flat[rows], bits)
    return Packed(bits, dim, codes.view(batch, heads, tokens, -1), scale.view(batch, heads, tokens))


def _encode_rows(x_ND: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x [N, D] -> codes [N, D bits / 8] uint8, scale [N] float16."""
    dim = x_ND.shape[1]
    u_DN = rotate(x_ND, randomized=True)
    rms = add_rows(u_DN * u_DN).div_(dim).sqrt_()
    u_DN.div_(rms.clamp(min=_SMALLEST_RMS))
    negative = torch.signbit(u_DN)
    magnitude = u_DN.abs_()
    index = nearest_magnitudes(magnitude, bits)
    levels = signed_levels(bits, x_ND.device)
    dot = add_rows(look_up(levels, index.int()).mul_(magnitude))
    index += negative.view(torch.uint8) << (bits - 1)
    scale = rms * (dim / dot.clamp_(min=_SMALLEST_DOT))
    return pack_bits(index, bits), scale.to(torch.float16)

"""`q8_0`, `q5_0`, `q4_0`: ggml's block formats, byte for byte. `@rotate=1` is llama.cpp's rotation.

Blocks of 32 consecutive channels, each an fp16 scale d followed by its codes:
    q8_0   d = max|x| / 127, code = x / d rounded, halves away from 0, int8;    x^ = d * code
    q4_0   d = m / -8, m the first number of the largest magnitude, sign kept;
           code = trunc(x / d + 8.5), at most 15;  byte j holds codes j (low) and j + 16 (high);
           x^ = d * (code - 8)
    q5_0   the same with d = m / -16, code = trunc(x / d + 16.5), at most 31; the fifth bits of the
           32 codes stand in 4 bytes between the scale and the low ones;  x^ = d * (code - 16)
The scale in use is the one before fp16 rounding, by its reciprocal. Bits per element: 8.5, 5.5 and
4.5.

rotate=1: the Sylvester Hadamard matrix over its square root goes over consecutive channels, keys in
blocks of the largest power of two that divides the head size, values in blocks of 64. llama.cpp
does so by default, in models whose head size is a multiple of 64; others are refused here.

Source: quantize_row_q8_0_ref, _q5_0_ref and _q4_0_ref of ggml-quants.c; build_input_k_rot and
build_input_v_rot of llama-kv-cache.cpp (pull request 21038). llama.cpp's cache holds keys after
RoPE, here they come before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layersweep.kv.codec import Codec
from layersweep.kv.identity import Identity, Untransformed
from layersweep.kv.packing import pack_bits, unpack_bits
from layersweep.kv.rotate import max_rows, rotate, rotate_back
from layersweep.kv.stream import Role, Stream
from layersweep.kv.uniform import ROUNDER, check_groups, halves
from layersweep.kv.vector_codec import Layout, RowCodec, VectorCodec

BLOCK = 32
ROTATED = 64  # channels that a rotation mixes at least; of values, no more
_LARGEST_FLOAT = 3e38  # the reciprocal of 0 or of a subnormal scale; ggml has 0 for 0: same codes


@dataclass(frozen=True)
class Ggml(RowCodec):
    """See the module's text. Packed holds blocks of 34, 22 or 18 bytes, scales included."""

    key_bits: int
    value_bits: int
    rotate: str = "0"
    most_mixed: int | None = None  # channels of a rotation, None for all that fit

    @property
    def method(self) -> str:
        return f"q{self.key_bits}_0"

    def check(self, stream: Stream) -> None:
        size, hint = BLOCK, "fp8 takes every multiple of 8"
        if self._rotates:
            size, hint = ROTATED, f"{self.method} without @rotate=1 takes multiples of {BLOCK}"
        check_groups(self, stream, size, hint)

    def for_role(self, role: Role) -> VectorCodec:
        values = self._rotates and role == "value"
        return replace(self, most_mixed=ROTATED) if values else self

    def layout(self, dim: int, bits: int) -> Layout:
        return Layout(dim // BLOCK * (2 + BLOCK * bits // 8), scale=None)

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, None]:
        turned = x_ND
        if self._rotates:
            turned = rotate(x_ND.reshape(-1, self._mixed(x_ND.shape[1])), randomized=False).t()
        x_SN = turned.float().reshape(-1, BLOCK).t().contiguous()
        scale, block = _q8_0(x_SN) if bits == 8 else _of_largest(x_SN, bits)
        scale_bytes = scale.to(torch.float16).view(torch.uint8).view(-1, 2)
        return torch.cat([scale_bytes, block.t()], dim=1).view(len(x_ND), -1), None

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        blocks = codes.reshape(-1, codes.shape[1] * BLOCK // dim)
        factor, block = halves(blocks[:, :2]).float(), blocks[:, 2:]
        if bits == 8:
            integers = block.view(torch.int8).float()
        else:
            low = block[:, 4:] if bits == 5 else block
            integers = torch.cat([low & 15, low >> 4], dim=1).float()
            if bits == 5:
                integers += unpack_bits(block[:, :4], 1).t() * 16
            integers -= 2 ** (bits - 1)
        x_ND = integers.mul_(factor.unsqueeze(1)).view(-1, dim)
        if not self._rotates:
            return x_ND
        turned = x_ND.view(-1, self._mixed(dim)).t().contiguous()
        return rotate_back(turned, randomized=False).reshape(-1, dim)

    def identity(self) -> Codec:
        if self._rotates:
            return Identity(of=self.method, randomized=False)
        return Untransformed(of=self.method)

    def _mixed(self, dim: int) -> int:
        """Channels that a rotation mixes, a power of two."""
        return self.most_mixed or dim & -dim

    @property
    def _rotates(self) -> bool:
        return self.rotate == "1"


def _q8_0(x_SN: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks in columns, x [32, N] float32 -> scale [N] float32, bytes [32, N] uint8."""
    magnitude = x_SN.abs()
    scale = max_rows(magnitude) / 127
    magnitude.mul_(scale.reciprocal().clamp_(max=_LARGEST_FLOAT))
    nearest = (magnitude + ROUNDER).sub_(ROUNDER)
    nearest.add_((magnitude - nearest == 0.5).float())  # ROUNDER took halves to even
    integers = nearest.mul_((x_SN < 0).float().mul_(-2).add_(1)).clamp_(-127, 127)
    return scale, integers.to(torch.int8).view(torch.uint8)


def _of_largest(x_SN: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Blocks in columns, x [32, N] float32 -> scale [N] float32, bytes [16, N] uint8 of 4 bits,
    [20, N] of 5."""
    # Zero times the maximum is 0, or NaN for a block with anything non-finite in it.
    poison = max_rows(x_SN.abs()).mul_(0)
    zero = 2 ** (bits - 1)
    scale = ((_first_largest(x_SN) + 0.0) / -zero).mul_(poison.add_(1))
    inverse = scale.reciprocal().clamp_(-_LARGEST_FLOAT, _LARGEST_FLOAT)
    codes = (x_SN * inverse).add_(zero + 0.5).clamp_(0, 2 * zero - 0.5).to(torch.uint8)  # truncates
    first, second = (codes & 15).view(2, BLOCK // 2, -1).unbind(0)
    block = first | (second << 4)
    return scale, block if bits == 4 else torch.cat([pack_bits(codes >> 4, 1).t(), block])


def _first_largest(x_SN: Tensor) -> Tensor:
    """The number of the largest magnitude of every column, the first of equals. [N]"""
    while len(x_SN) > 1:
        earlier, later = x_SN[0::2], x_SN[1::2]
        x_SN = torch.where(later.abs() > earlier.abs(), later, earlier)
    return x_SN[0]

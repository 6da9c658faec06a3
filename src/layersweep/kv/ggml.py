"""`q8_0`, `q4_0`: ggml's block formats, byte for byte. `@rotate=1` rotates head vectors first.

Blocks of 32 consecutive channels, each an fp16 scale d followed by its codes:
    q8_0   d = max|x| / 127, code = x / d rounded, halves away from 0, int8;    x^ = d * code
    q4_0   d = m / -8, m the first number of the largest magnitude, sign kept;
           code = trunc(x / d + 8.5), at most 15;  byte j holds codes j (low) and j + 16 (high);
           x^ = d * (code - 8)
The scale in use is the one before fp16 rounding, by its reciprocal. Bits per element: 8.5, 4.5.

Source: quantize_row_q8_0_ref and quantize_row_q4_0_ref of ggml-quants.c. llama.cpp's cache holds
keys after RoPE, here they come before it. rotate=1 is the randomized Hadamard matrix of `lloyd`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.codec import Codec
from layersweep.kv.identity import Identity, Untransformed
from layersweep.kv.rotate import max_rows, rotate, rotate_back
from layersweep.kv.stream import Stream
from layersweep.kv.uniform import ROUNDER, check_groups, halves
from layersweep.kv.vector_codec import Layout, RowCodec

BLOCK = 32
_LARGEST_FLOAT = 3e38  # the reciprocal of 0 or of a subnormal scale; ggml has 0 for 0: same codes


@dataclass(frozen=True)
class Ggml(RowCodec):
    """See the module's text. Packed holds blocks of 34 or 18 bytes, scales included."""

    key_bits: int
    value_bits: int
    rotate: str = "0"

    @property
    def method(self) -> str:
        return f"q{self.key_bits}_0"

    def check(self, stream: Stream) -> None:
        check_groups(self, stream, BLOCK, "fp8 takes every multiple of 8")

    def layout(self, dim: int, bits: int) -> Layout:
        return Layout(dim // BLOCK * (2 + BLOCK * bits // 8), scale=None)

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, None]:
        turned = rotate(x_ND, randomized=True).t() if self._rotates else x_ND
        x_SN = turned.float().reshape(-1, BLOCK).t().contiguous()
        scale, block = _q8_0(x_SN) if bits == 8 else _q4_0(x_SN)
        scale_bytes = scale.to(torch.float16).view(torch.uint8).view(-1, 2)
        return torch.cat([scale_bytes, block.t()], dim=1).view(len(x_ND), -1), None

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        blocks = codes.reshape(-1, codes.shape[1] * BLOCK // dim)
        factor, block = halves(blocks[:, :2]).float(), blocks[:, 2:]
        if bits == 8:
            integers = block.view(torch.int8).float()
        else:
            integers = torch.cat([block & 15, block >> 4], dim=1).float().sub_(8)
        x_ND = integers.mul_(factor.unsqueeze(1)).view(-1, dim)
        return rotate_back(x_ND.t().contiguous(), randomized=True) if self._rotates else x_ND

    def identity(self) -> Codec:
        if self._rotates:
            return Identity(of=self.method, randomized=True)
        return Untransformed(of=self.method)

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


def _q4_0(x_SN: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks in columns, x [32, N] float32 -> scale [N] float32, bytes [16, N] uint8."""
    # Zero times the maximum is 0, or NaN for a block with anything non-finite in it.
    poison = max_rows(x_SN.abs()).mul_(0)
    scale = ((_first_largest(x_SN) + 0.0) / -8).mul_(poison.add_(1))
    inverse = scale.reciprocal().clamp_(-_LARGEST_FLOAT, _LARGEST_FLOAT)
    codes = (x_SN * inverse).add_(8.5).clamp_(0, 15.5).to(torch.uint8)  # truncates
    low, high = codes.view(2, BLOCK // 2, -1).unbind(0)
    return scale, low | (high << 4)


def _first_largest(x_SN: Tensor) -> Tensor:
    """The number of the largest magnitude of every column, the first of equals. [N]"""
    while len(x_SN) > 1:
        earlier, later = x_SN[0::2], x_SN[1::2]
        x_SN = torch.where(later.abs() > earlier.abs(), later, earlier)
    return x_SN[0]

"""`int4`, `int2`: the arithmetic of transformers' QuantizedCache with the quanto backend.

For every group of consecutive channels of a head vector (64 by default), with L = 2^bits - 1:
    zero = min(x), scale = (max(x) - min(x)) / L        both fp16
    code = round((x - zero) / scale), kept within 0 ... L
    x^ = scale * code + zero
Bits per element: bits + 32 / group. At group 64: int4 4.5, int2 2.5.

Source: MaxOptimizer and quantize_affine of optimum-quanto 0.2.7 with a floating shift (-zero), as
QuantoQuantizedLayer of transformers 5.24 calls them (axis 0, q_group_size 64): affine, groups of
consecutive numbers of the flat [B,H,T,D] tensor. What differs: quanto computes in the model's
dtype, here float32 with fp16 scale and zero; its groups may run on into the next token, here a
group that does not divide the head size is refused; QuantizedCache keeps up to 128 recent tokens
exact (write @window=128) and quantizes everything again when they are full, here once; it gets
keys after RoPE, here they come before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv.codec import Codec
from layersweep.kv.identity import Untransformed
from layersweep.kv.methods import METHODS
from layersweep.kv.packing import pack_bits, unpack_bits
from layersweep.kv.rotate import max_rows
from layersweep.kv.stream import Stream
from layersweep.kv.vector_codec import Layout, RowCodec

GROUPS = dict(METHODS["int4"].options)["group"]
# Adding and subtracting it rounds a float32 below 2^22 to the nearest integer, halves to even;
# torch.round does the same and wakes all of torch's threads for any size: 7 ms on a busy machine
# for work of 10 us.
ROUNDER = 1.5 * 2**23
SMALLEST_HALF = 2.0**-24  # divides where a scale has become 0; the vector then decodes to 0 or zero


@dataclass(frozen=True)
class Uniform(RowCodec):
    """See the module's text. Packed holds, per vector: codes, then fp16 scales, then fp16 zeros."""

    key_bits: int
    value_bits: int
    group: str = "64"

    @property
    def method(self) -> str:
        return f"int{self.key_bits}"

    def check(self, stream: Stream) -> None:
        check_groups(self, stream, int(self.group), group_hint(stream.dim))

    def layout(self, dim: int, bits: int) -> Layout:
        return group_layout(dim, bits, int(self.group))

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, None]:
        return encode_vectors(x_ND, bits, int(self.group)), None

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        return decode_vectors(codes, dim, bits, int(self.group))

    def identity(self) -> Codec:
        return Untransformed(of=self.method)


def group_hint(dim: int) -> str:
    """What to ask for instead, where a group does not divide head size `dim`."""
    fitting = [size for size in GROUPS if dim % int(size) == 0]
    return f"@group={fitting[0]}" if fitting else "trellis:K4V4 and fp8 take this head size"


def check_groups(codec: Codec, stream: Stream, size: int, hint: str) -> None:
    """Raise InputError unless groups of `size` channels fill a head vector of the stream."""
    if stream.dim % size:
        raise InputError(
            f"{codec.method}: stream '{stream.name}' has head size {stream.dim}, needed a "
            f"multiple of {size}",
            hint=hint,
        )


def group_layout(dim: int, bits: int, size: int) -> Layout:
    """Codes, and an fp16 scale and zero for each group of `size` channels."""
    return Layout(dim * bits // 8 + 4 * (dim // size), scale=None)


def encode_vectors(x_ND: Tensor, bits: int, size: int) -> Tensor:
    """x [N, D] -> bytes [N, width] of group_layout."""
    parts = encode_groups(x_ND.reshape(-1, size).t(), bits)
    return torch.cat([part.view(torch.uint8).view(len(x_ND), -1) for part in parts], dim=1)


def decode_vectors(vectors: Tensor, dim: int, bits: int, size: int) -> Tensor:
    """Inverse of encode_vectors: x^ [N, D] float32."""
    halves_bytes = 2 * (dim // size)
    codes, scale, zero = torch.split(vectors, [dim * bits // 8, halves_bytes, halves_bytes], dim=1)
    x_SN = decode_groups(codes.reshape(-1, size * bits // 8), halves(scale), halves(zero), bits)
    return x_SN.t().reshape(-1, dim)


def halves(two_bytes: Tensor) -> Tensor:
    """uint8 bytes of fp16 numbers, of any shape -> the numbers [N]."""
    return two_bytes.reshape(-1).clone().view(torch.float16)


def encode_groups(x_SN: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups in columns, x [S, N] -> codes [N, S bits / 8] uint8, scale [N], zero [N] float16.

    Codes are made for the rounded scale and zero that a reader has. NaN and infinity end in scale
    or zero: max_rows keeps them.
    """
    x = torch.empty(x_SN.shape, dtype=torch.float32, device=x_SN.device).copy_(x_SN)
    low, high, last = -max_rows(-x), max_rows(x), 2**bits - 1
    scale, zero = ((high - low) / last).to(torch.float16), low.to(torch.float16)
    x.sub_(zero.float()).div_(scale.float().clamp_(min=SMALLEST_HALF))
    codes = x.add_(ROUNDER).sub_(ROUNDER).clamp_(0, last).int()
    return pack_bits(codes, bits), scale, zero


def decode_groups(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Inverse of encode_groups, x^ [S, N] float32."""
    return unpack_bits(codes, bits).float().mul_(scale.float()).add_(zero.float())

"""`turbo`: random rotation, one RMS scale per vector, Lloyd-Max levels. `lloyd` without its gain.

For a head vector x of size D, rotated to y:
    u = y / rms(y);   c = nearest level of u;   s = rms(y) (fp16);   x^ = rotate_back(s * c)
This is the smaller mean squared error of the two, and it shrinks vectors: <x, x^> = (1 - d) <x, x>
on average, d the distortion. Bits per element: bits + 16 / D.

Source: TurboQuant, arXiv 2504.19874, the variant for mean squared error, with the levels of the
Gaussian (its limit for large D) and a randomized Hadamard matrix for the rotation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.codec import Packed, check_input, join_tokens, pack_rows, role_bits
from layersweep.kv.lloyd import Lloyd, nearest_levels
from layersweep.kv.packing import pack_bits
from layersweep.kv.rotate import add_rows, rotate
from layersweep.kv.stream import Stream

_SMALLEST_MEAN_SQUARE = 1e-36


@dataclass(frozen=True)
class Turbo(Lloyd):
    """See the module's text. Packed, decoding and size are those of `lloyd`."""

    method = "turbo"
    version = "1"

    def encode(
        self, x: Tensor, stream: Stream, positions: Tensor, mean: Tensor | None = None
    ) -> Packed:
        check_input(self, x, stream, mean)
        return _encode(x, role_bits(self, stream))

    def append(self, packed: Packed, x: Tensor, positions: Tensor) -> Packed:
        return join_tokens([packed, _encode(x, packed.bits)])


def _encode(x: Tensor, bits: int) -> Packed:
    return pack_rows(x, bits, x.shape[3] * bits // 8, lambda x_ND: _encode_rows(x_ND, bits))


def _encode_rows(x_ND: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x [N, D] -> codes [N, D bits / 8] uint8, scale [N] float16."""
    u_DN = rotate(x_ND, randomized=True)
    mean_square = add_rows(u_DN * u_DN).div_(x_ND.shape[1])
    inverse_rms = mean_square.clamp(min=_SMALLEST_MEAN_SQUARE).rsqrt_()
    u_DN.mul_(inverse_rms)
    index, _ = nearest_levels(u_DN.abs(), bits)
    # The sign bit of the float, spread over the word, becomes the top bit of the code.
    index |= (u_DN.view(torch.int32) >> 31) & (1 << (bits - 1))
    return pack_bits(index, bits), (mean_square * inverse_rms).to(torch.float16)

"""`turbo`: random rotation, one RMS scale per vector, Lloyd-Max levels. `lloyd` without its gain.

For a head vector x of size D, rotated to y:
    u = y / rms(y);   c = nearest level of u;   s = rms(y) (fp16);   x^ = rotate_back(s * c)
This is the smaller mean squared error of the two, and it shrinks vectors: <x, x^> = (1 - d) <x, x>
on average, d the distortion. Bits per element: bits + 16 / D.

Source: TurboQuant, arXiv 2504.19874, the variant for mean squared error, with the levels of the
Gaussian (its limit for large D) and a randomized Hadamard matrix for the rotation. `turboquant` is
what vLLM ships under that name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.lloyd import Lloyd, nearest_levels, unit_rows, with_signs
from layersweep.kv.packing import pack_bits
from layersweep.kv.vector_codec import RowCodec


@dataclass(frozen=True)
class Turbo(Lloyd):
    """See the module's text. Packed, decoding and size are those of `lloyd`."""

    method = "turbo"
    encode_all = RowCodec.encode_all  # the kernels' scale has the gain

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        u_DN, mean_square, inverse_rms = unit_rows(x_ND)
        index, _ = nearest_levels(u_DN.abs(), bits)
        scale = (mean_square * inverse_rms).to(torch.float16)
        return pack_bits(with_signs(index, u_DN, bits), bits), scale

"""`fp8`: e4m3 numbers with one fp16 scale per head vector.

    scale = max|x| / 448 (fp16), code = e4m3(x / scale), x^ = scale * code
448 is the largest e4m3fn number. Bits per element: 8 + 16 / D.

Source: the arithmetic of Fp8QuantizedLayer of transformers 5.24, which has one scale per tensor,
frozen after the first call; here every vector has its own. Keys come before RoPE, there after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.codec import Codec
from layersweep.kv.identity import Untransformed
from layersweep.kv.rotate import max_rows
from layersweep.kv.uniform import SMALLEST_HALF
from layersweep.kv.vector_codec import Layout, RowCodec

_LARGEST = 448.0


@dataclass(frozen=True)
class Fp8(RowCodec):
    """See the module's text. Packed holds the e4m3 bytes and an fp16 scale per vector."""

    key_bits: int = 8
    value_bits: int = 8

    method = "fp8"

    def layout(self, dim: int, bits: int) -> Layout:
        return Layout(dim)

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        x_ND = x_ND.float()
        scale = (max_rows(x_ND.abs(), dim=1) / _LARGEST).to(torch.float16)
        divisor = scale.float().clamp_(min=SMALLEST_HALF).unsqueeze(1)
        # Beyond 464 the conversion gives NaN, and a scale that was rounded down gets there.
        ratio = (x_ND / divisor).clamp_(-_LARGEST, _LARGEST)
        return ratio.to(torch.float8_e4m3fn).view(torch.uint8), scale

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        assert scale is not None
        return codes.view(torch.float8_e4m3fn).float().mul_(scale.float().unsqueeze(1))

    def identity(self) -> Codec:
        return Untransformed(of=self.method)

"""`fp8`: e4m3 numbers with one fp16 scale per head vector.

    scale = max|x| / 448 (fp16), code = e4m3(x / scale), x^ = scale * code
448 is the largest e4m3fn number. Bits per element: 8 + 16 / D.

Source: the arithmetic of Fp8QuantizedLayer of transformers 5.24, which has one scale per tensor,
frozen after the first call; here every vector has its own. Keys come before RoPE, there after it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.codec import Codec, Packed, check_input, join_tokens, role_bits
from layersweep.kv.rotate import max_rows, row_chunks
from layersweep.kv.stream import Stream
from layersweep.kv.uniform import SMALLEST_HALF, Untransformed

_LARGEST = 448.0


@dataclass(frozen=True)
class Fp8:
    """See the module's text. Packed holds the e4m3 bytes and an fp16 scale per vector."""

    key_bits: int = 8
    value_bits: int = 8

    method = "fp8"
    version = "1"
    simulated = False
    encoder = "torch"

    def encode(
        self, x: Tensor, stream: Stream, positions: Tensor, mean: Tensor | None = None
    ) -> Packed:
        check_input(self, x, stream, mean)
        return self._encode(x)

    def append(self, packed: Packed, x: Tensor, positions: Tensor) -> Packed:
        return join_tokens([packed, self._encode(x)])

    def _encode(self, x: Tensor) -> Packed:
        dim = x.shape[3]
        flat = x.reshape(-1, dim)
        codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
        scale = torch.empty(len(flat), dtype=torch.float16, device=x.device)
        for rows in row_chunks(len(flat), dim, x.device):
            x_ND = flat[rows].float()
            scale[rows] = (max_rows(x_ND.abs(), dim=1) / _LARGEST).to(torch.float16)
            divisor = scale[rows].float().clamp_(min=SMALLEST_HALF).unsqueeze(1)
            # Beyond 464 the conversion gives NaN, and a scale that was rounded down gets there.
            ratio = (x_ND / divisor).clamp_(-_LARGEST, _LARGEST)
            codes[rows] = ratio.to(torch.float8_e4m3fn).view(torch.uint8)
        return Packed(8, dim, codes.view(x.shape), scale.view(x.shape[:3]))

    def decode(self, packed: Packed, positions: Tensor) -> Tensor:
        assert packed.scale is not None
        codes = packed.codes.reshape(-1, packed.dim).view(torch.float8_e4m3fn)
        scale = packed.scale.reshape(-1, 1)
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows in row_chunks(len(codes), packed.dim, codes.device):
            out[rows] = codes[rows].float().mul_(scale[rows].float())
        return out.view(packed.codes.shape)

    def nbytes(self, packed: Packed) -> int:
        assert packed.scale is not None
        return packed.codes.numel() + 2 * packed.scale.numel()

    def sharing_key(self, stream: Stream) -> Hashable:
        return (self.method, role_bits(self, stream))

    def identity(self) -> Codec:
        return Untransformed(of=self.method)

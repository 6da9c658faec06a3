"""`identity`: a codec's transforms without its quantization, the noise floor of the transforms."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.codec import Codec, Packed, check_input, join_tokens
from layersweep.kv.rotate import rotate, rotate_back, row_chunks
from layersweep.kv.stream import Stream


@dataclass(frozen=True)
class Identity:
    """Rotates, keeps the rotated vector in float32, rotates back. Counted as 16 bits."""

    of: str
    randomized: bool
    wants_basis: bool = False

    method = "identity"
    version = "1"
    simulated = True
    encoder = "torch"
    key_bits = 16
    value_bits = 16

    def encode(
        self, x: Tensor, stream: Stream, positions: Tensor, mean: Tensor | None = None
    ) -> Packed:
        check_input(self, x, stream, mean)
        return self._encode(x)

    def append(self, packed: Packed, x: Tensor, positions: Tensor) -> Packed:
        return join_tokens([packed, self._encode(x)])

    def _encode(self, x: Tensor) -> Packed:
        flat = x.reshape(-1, x.shape[3])
        out = torch.empty(flat.shape, dtype=torch.float32, device=x.device)
        for rows in row_chunks(len(flat), x.shape[3], x.device):
            out[rows] = rotate(flat[rows], self.randomized).t()
        return Packed(bits=16, dim=x.shape[3], codes=out.view(x.shape), scale=None)

    def decode(self, packed: Packed, positions: Tensor) -> Tensor:
        flat = packed.codes.reshape(-1, packed.dim)
        out = torch.empty_like(flat)
        for rows in row_chunks(len(flat), packed.dim, flat.device):
            # A transposed copy of its own: rotate_back overwrites what it is given.
            y_DN = flat[rows].t().clone(memory_format=torch.contiguous_format)
            out[rows] = rotate_back(y_DN, self.randomized)
        return out.view(packed.codes.shape)

    def nbytes(self, packed: Packed) -> int:
        return 2 * packed.codes.numel()

    def sharing_key(self, stream: Stream) -> Hashable:
        return (self.method, self.of)

    def identity(self) -> Codec:
        return self

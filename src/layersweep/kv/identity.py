"""`identity`: a codec's transforms without its quantization, the noise floor of the transforms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.codec import Codec, Packed
from layersweep.kv.rotate import rotate, rotate_back
from layersweep.kv.stream import Role
from layersweep.kv.vector_codec import Layout, RowCodec


@dataclass(frozen=True)
class Identity(RowCodec):
    """Rotates, keeps the rotated vector in float32, rotates back. Counted as 16 bits."""

    of: str
    randomized: bool
    wants_basis: bool = False

    method = "identity"
    simulated = True
    key_bits = 16
    value_bits = 16

    def layout(self, dim: int, bits: int) -> Layout:
        return Layout(dim, torch.float32, scale=None)

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, None]:
        return rotate(x_ND, self.randomized).t(), None

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        # A transposed copy of its own: rotate_back overwrites what it is given.
        y_DN = codes.t().clone(memory_format=torch.contiguous_format)
        return rotate_back(y_DN, self.randomized)

    def nbytes(self, packed: Packed) -> int:
        return 2 * packed.codes.numel()

    def identity(self) -> Codec:
        return self


@dataclass(frozen=True)
class Untransformed(Identity):
    """The identity of a codec that transforms nothing: its noise floor is 0."""

    randomized: bool = False

    def pack(self, x: Tensor, bits: int, mean: Tensor | None, role: Role) -> Packed:
        codes = x.to(torch.float32, copy=True)
        return Packed(bits, x.shape[3], codes, scale=None, role=role)

    def unpack(self, packed: Packed) -> Tensor:
        return packed.codes

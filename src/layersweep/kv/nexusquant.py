"""`nexusquant`: the published package nexusquant-kv itself, mode quant_only. Simulated.

Its own `E8Lattice.quantize_perhead` on vectors rotated by the Hadamard matrix, rotated back and
kept in fp16, as `NexusQuantQuantOnly.compress` of version 0.6.3 does with keys (RoPE undone) and
values. What differs: the rotation is this package's, sums in a fixed order, where the published
one multiplies by a matrix, whose rounding depends on the number of vectors.
The package is not a dependency of this one: pip install nexusquant-kv.
Bits per element, as for `e8`: log2 of its alphabet / 8 + 16 / D.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv.codec import Codec, Packed
from layersweep.kv.e8 import fixed_rate_bytes
from layersweep.kv.identity import Identity
from layersweep.kv.rotate import rotate, rotate_back
from layersweep.kv.stream import Stream
from layersweep.kv.vector_codec import Layout, RowCodec


@dataclass(frozen=True)
class NexusQuant(RowCodec):
    """See the module's text. Packed holds the decoded vectors in fp16."""

    key_bits: int
    value_bits: int

    method = "nexusquant"
    simulated = True

    @property
    def version(self) -> str:
        return importlib.metadata.version("nexusquant-kv")

    def check(self, stream: Stream) -> None:
        if stream.dim & (stream.dim - 1):
            raise InputError(
                f"{self.method}: stream '{stream.name}' has head size {stream.dim}, needed a "
                "power of two",
                hint="e8 is the same arithmetic for every multiple of 8",
            )

    def layout(self, dim: int, bits: int) -> Layout:
        return Layout(dim, torch.float16, scale=None)

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, None]:
        y_ND = rotate(x_ND, randomized=False).t().contiguous()
        y_ND = _quantizer().quantize_perhead(y_ND, levels=2**bits)
        return rotate_back(y_ND.t().contiguous(), randomized=False), None

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        return codes

    def nbytes(self, packed: Packed) -> int:
        return fixed_rate_bytes(packed)

    def identity(self) -> Codec:
        return Identity(of=self.method, randomized=False)


def _quantizer() -> Any:
    try:
        from nexusquant.core.e8_lattice import E8Lattice
    except ImportError as failure:  # of something that it needs itself
        raise InputError(
            f"nexusquant: found that the package cannot be imported: {failure}",
            hint="pip install nexusquant-kv",
        ) from failure
    return E8Lattice

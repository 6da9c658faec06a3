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
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv.codec import Codec, Packed, check_input, join_tokens, role_bits
from layersweep.kv.e8 import fixed_rate_bytes
from layersweep.kv.identity import Identity
from layersweep.kv.rotate import rotate, rotate_back, row_chunks
from layersweep.kv.stream import Stream


@dataclass(frozen=True)
class NexusQuant:
    """See the module's text. Packed holds the decoded vectors in fp16."""

    key_bits: int
    value_bits: int

    method = "nexusquant"
    simulated = True
    encoder = "torch"

    @property
    def version(self) -> str:
        return importlib.metadata.version("nexusquant-kv")

    def encode(
        self, x: Tensor, stream: Stream, positions: Tensor, mean: Tensor | None = None
    ) -> Packed:
        check_input(self, x, stream, mean)
        if stream.dim & (stream.dim - 1):
            raise InputError(
                f"{self.method}: stream '{stream.name}' has head size {stream.dim}, needed a "
                "power of two",
                hint="e8 is the same arithmetic for every multiple of 8",
            )
        return self._encode(x, role_bits(self, stream))

    def append(self, packed: Packed, x: Tensor, positions: Tensor) -> Packed:
        return join_tokens([packed, self._encode(x, packed.bits)])

    def _encode(self, x: Tensor, bits: int) -> Packed:
        quantizer = _quantizer()
        flat = x.reshape(-1, x.shape[3])
        out = torch.empty(flat.shape, dtype=torch.float16, device=x.device)
        for rows in row_chunks(len(flat), x.shape[3], x.device):
            y_ND = rotate(flat[rows], randomized=False).t().contiguous()
            y_ND = quantizer.quantize_perhead(y_ND, levels=2**bits)
            out[rows] = rotate_back(y_ND.t().contiguous(), randomized=False).to(torch.float16)
        return Packed(bits, x.shape[3], out.view(x.shape), scale=None)

    def decode(self, packed: Packed, positions: Tensor) -> Tensor:
        return packed.codes.float()

    def nbytes(self, packed: Packed) -> int:
        return fixed_rate_bytes(packed)

    def sharing_key(self, stream: Stream) -> Hashable:
        return (self.method, role_bits(self, stream))

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

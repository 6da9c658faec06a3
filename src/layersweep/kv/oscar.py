"""`oscar`: rotated, clipped at a share of each vector's magnitudes, then min and max.

For a head vector, y = H x with H the Sylvester Hadamard matrix over sqrt(D):
    t = the magnitude of y at place floor(c D) in ascending order, counted from 0; c = 0.96 for keys
        and 0.92 for values;   y kept within -t ... t
    then for every 128 channels, or all D where 128 does not divide D, with L = 2^bits - 1:
    zero = min(y), scale = (max(y) - min(y)) / L, both fp16;   code = round((y - zero) / scale)
    x^ = H (scale * code + zero)
Bits per element: bits + 32 / 128, or bits + 32 / D. The published cache is K2V2@window=256@sink=64.

Source: OSCAR, arXiv 2605.17757, and its code (FutureMLS-Lab/OSCAR, compute_kv_rotation.py and
oscar_rotation_clip_int2_kv.py). What differs: keys come before RoPE, there after it. The published
rotation is U H P. U are the eigenvectors of a covariance that 30,000 tokens of calibration text
give for every layer: for keys that of queries, for values that of values weighted by the scores of
their keys. P is a permutation, which changes nothing within a group. Here U is left out, as by the
program's own `--method hadamard`; `tools/measure_covariance.py` measures what it would gain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layersweep.kv.codec import Codec
from layersweep.kv.identity import Identity
from layersweep.kv.rotate import rotate, rotate_back
from layersweep.kv.stream import Role
from layersweep.kv.uniform import decode_vectors, encode_vectors, group_layout
from layersweep.kv.vector_codec import Layout, RowCodec, VectorCodec

GROUP = 128
KEYS_WITHIN, VALUES_WITHIN = 0.96, 0.92


@dataclass(frozen=True)
class Oscar(RowCodec):
    """See the module's text. `within`: the share of magnitudes that are not clipped."""

    key_bits: int
    value_bits: int
    within: float = KEYS_WITHIN

    method = "oscar"

    def for_role(self, role: Role) -> VectorCodec:
        return replace(self, within=VALUES_WITHIN) if role == "value" else self

    def layout(self, dim: int, bits: int) -> Layout:
        return group_layout(dim, bits, _group(dim))

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, None]:
        dim = x_ND.shape[1]
        y_ND = rotate(x_ND, randomized=False).t().contiguous()
        limit = y_ND.abs().sort(dim=1).values[:, int(self.within * dim), None]
        y_ND = torch.minimum(torch.maximum(y_ND, -limit), limit)
        return encode_vectors(y_ND, bits, _group(dim)), None

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        y_ND = decode_vectors(codes, dim, bits, _group(dim))
        return rotate_back(y_ND.t().contiguous(), randomized=False)

    def identity(self) -> Codec:
        return Identity(of=self.method, randomized=False)


def _group(dim: int) -> int:
    """Channels with a scale and a zero of their own."""
    return dim if dim % GROUP else GROUP

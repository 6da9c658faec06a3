"""`oscar`: rotated, clipped at a share of each vector's magnitudes, then min and max.

For a head vector, y = H x with H the Sylvester Hadamard matrix over sqrt(D):
    t = the magnitude of y at place floor(c D) in ascending order, c = 0.96 for keys, 0.92 for values
    y kept within -t ... t; then for every 128 channels, with L = 2^bits - 1:
    zero = min(y), scale = (max(y) - min(y)) / L, both fp16;   code = round((y - zero) / scale)
    x^ = H (scale * code + zero)
Bits per element: bits + 32 / min(D, 128). The published cache is K2V2@window=256@sink=64.

Source: OSCAR, arXiv 2605.17757, and its code (FutureMLS-Lab/OSCAR: rotation/compute_kv_rotation.py and
QuantKernel/oscar_rotation_clip_int2_kv.py). What differs: keys come before RoPE, there after it. The
published rotation is U H P, U the eigenvectors of a covariance that 30,000 tokens of calibration
text give for every layer (of keys: that of queries; of values: of values weighted by the scores of
their keys), P a permutation, which changes nothing within a group. Here U is left out, as in the
program's own `--method hadamard`: docs/codecs.md says what it would gain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layersweep.kv.codec import Codec
from layersweep.kv.identity import Identity
from layersweep.kv.rotate import rotate, rotate_back
from layersweep.kv.stream import Role, Stream
from layersweep.kv.uniform import check_groups, decode_vectors, encode_vectors, group_layout
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

    def check(self, stream: Stream) -> None:
        if stream.dim > GROUP:
            check_groups(self, stream, GROUP, "kvarn takes every multiple of 8")

    def layout(self, dim: int, bits: int) -> Layout:
        return group_layout(dim, bits, min(dim, GROUP))

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, None]:
        dim = x_ND.shape[1]
        y_ND = rotate(x_ND, randomized=False).t().contiguous()
        limit = y_ND.abs().sort(dim=1).values[:, int(self.within * dim), None]
        y_ND = torch.minimum(torch.maximum(y_ND, -limit), limit)
        return encode_vectors(y_ND, bits, min(dim, GROUP)), None

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        y_ND = decode_vectors(codes, dim, bits, min(dim, GROUP))
        return rotate_back(y_ND.t().contiguous(), randomized=False)

    def identity(self) -> Codec:
        return Identity(of=self.method, randomized=False)

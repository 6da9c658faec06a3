"""`kivi`: keys per channel over 32 tokens, values per token over 32 channels, min and max.

Every group of 32 numbers, with L = 2^bits - 1, is
    zero = min(x), scale = (max(x) - min(x)) / L        both fp16
    code = round((x - zero) / scale), kept within 0 ... L;   x^ = scale * code + zero
Key tokens after the last full group of 32 stay exact and count 16 bits an element; so in streaming,
too, a key is read exactly until its group is full. Bits per element: values bits + 1; keys
    (floor(T / 32) * 32 * (bits + 1) + (T mod 32) * 16) / T

`@residual=R` is the published program with its `residual_length` of R: keys are encoded R tokens at
a time, still in groups of 32, so that up to R - 1 of them are exact; of the values the last R are.
The paper's figures are those of R = 128.

Source: KIVI, arXiv 2402.02750, and its code (jy-yuan/KIVI, models/llama_kivi.py), which quantizes
keys AFTER RoPE. Here keys are quantized BEFORE it, as every codec of this package does: channels
then keep their offsets, which RoPE would turn into waves along the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.codec import Codec, Grouping
from layersweep.kv.groups import GroupCodec
from layersweep.kv.identity import Untransformed
from layersweep.kv.stream import Role, Stream
from layersweep.kv.uniform import (
    check_groups,
    decode_groups,
    decode_vectors,
    encode_groups,
    encode_vectors,
    group_layout,
    halves,
)
from layersweep.kv.vector_codec import VectorCodec

GROUP = 32


@dataclass(frozen=True)
class Kivi(GroupCodec):
    """See the module's text. This codec is that of the keys; a latent, being key and value, is kept
    like keys. A tile holds codes, then fp16 scales, then fp16 zeros."""

    key_bits: int
    value_bits: int
    residual: str = "0"

    method = "kivi"

    @property
    def how(self) -> Grouping:
        return Grouping(max(int(self.residual), GROUP))

    def for_role(self, role: Role) -> VectorCodec:
        if role != "value":
            return self
        return KiviValues(self.key_bits, self.value_bits, int(self.residual))

    def width(self, dim: int, bits: int) -> int:
        return dim * (self.how.group * bits // 8 + 4 * (self.how.group // GROUP))

    def encode_tiles(self, x_NSD: Tensor, bits: int) -> Tensor:
        columns = x_NSD.reshape(-1, GROUP, x_NSD.shape[2]).transpose(0, 1).reshape(GROUP, -1)
        parts = encode_groups(columns, bits)
        return torch.cat([part.view(torch.uint8).view(len(x_NSD), -1) for part in parts], dim=1)

    def decode_tiles(self, codes: Tensor, dim: int, bits: int) -> Tensor:
        groups = self.how.group // GROUP
        sizes = [dim * groups * GROUP * bits // 8, *[2 * dim * groups] * 2]
        packed, scale, zero = torch.split(codes, sizes, dim=1)
        columns = packed.reshape(-1, GROUP * bits // 8)
        x_SN = decode_groups(columns, halves(scale), halves(zero), bits)
        return x_SN.view(GROUP, -1, dim).transpose(0, 1).reshape(len(codes), -1, dim)

    def identity(self) -> Codec:
        return Untransformed(of=self.method)


@dataclass(frozen=True)
class KiviValues(GroupCodec):
    """Values, each on its own, but for the last `residual`, which stay exact."""

    key_bits: int
    value_bits: int
    residual: int

    method = "kivi"

    @property
    def how(self) -> Grouping:
        return Grouping(keep=self.residual)

    def check(self, stream: Stream) -> None:
        check_groups(self, stream, GROUP, "keys alone can be of other sizes: kivi:K2V16")

    def width(self, dim: int, bits: int) -> int:
        return group_layout(dim, bits, GROUP).width

    def encode_tiles(self, x_NSD: Tensor, bits: int) -> Tensor:
        return encode_vectors(x_NSD.flatten(0, 1), bits, GROUP)

    def decode_tiles(self, codes: Tensor, dim: int, bits: int) -> Tensor:
        return decode_vectors(codes, dim, bits, GROUP).unsqueeze(1)

    def identity(self) -> Codec:
        return Untransformed(of=self.method)

"""`kivi`: keys per channel over 32 tokens, values per token over 32 channels, min and max.

Every group of 32 numbers, with L = 2^bits - 1, is
    zero = min(x), scale = (max(x) - min(x)) / L        both fp16
    code = round((x - zero) / scale), kept within 0 ... L;   x^ = scale * code + zero
Key tokens after the last full group of 32 stay exact, in the dtype that they came in, and count
16 bits an element; so in streaming, too, a key is read exactly until its group is full. Bits per
element: values bits + 1; keys
    (floor(T / 32) * 32 * (bits + 1) + (T mod 32) * 16) / T

Source: KIVI, arXiv 2402.02750, and its code (jy-yuan/KIVI, models/llama_kivi.py), which quantizes
keys AFTER RoPE. Here keys are quantized BEFORE it, as every codec of this package does: channels
then keep their offsets, which RoPE would turn into waves along the tokens. The published program
also keeps up to 128 recent tokens exact, keys and values: write @window=128.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv.codec import Codec, Packed, check_input, role_bits
from layersweep.kv.identity import Untransformed
from layersweep.kv.rotate import row_chunks
from layersweep.kv.stream import Stream
from layersweep.kv.uniform import (
    check_groups,
    decode_groups,
    decode_vectors,
    encode_groups,
    encode_vectors,
    group_layout,
)
from layersweep.kv.vector_codec import Layout, RowCodec

GROUP = 32


@dataclass(frozen=True, kw_only=True)
class KeyGroups(Packed):
    """Keys in full groups of 32 tokens and the exact tokens after them.

    codes [B, H, G, 4 D bits] uint8; scale, zero [B, H, G, D] float16; rest [B, H, R, D], R < 32.
    A slice keeps every group that it touches: `first` tokens of the first one are hidden, `count`
    are shown.
    """

    zero: Tensor
    rest: Tensor
    count: int
    first: int = 0

    @property
    def tokens(self) -> int:
        return self.count

    @property
    def elements(self) -> int:
        return self.codes.shape[:2].numel() * self.count * self.dim

    @property
    def held_bytes(self) -> int:
        return super().held_bytes + self.zero.nbytes + self.rest.nbytes

    def slice_tokens(self, start: int, stop: int) -> KeyGroups:
        """Tokens [start, stop) of every sequence, as views."""
        start, stop = max(start, 0), max(min(stop, self.count), start)
        begin, end = self.first + start, self.first + stop
        groups = self.codes.shape[2]
        low, high = min(begin // GROUP, groups), min(-(-end // GROUP), groups)
        filled = groups * GROUP
        return self._with(
            *(part[:, :, low:high] for part in self._groups()),
            self.rest[:, :, max(begin - filled, 0) : max(end - filled, 0)],
            count=stop - start,
            first=begin - low * GROUP if low < groups else 0,
        )

    def slice_batch(self, start: int, stop: int) -> KeyGroups:
        """Sequences [start, stop), as views."""
        parts = (part[start:stop] for part in (*self._groups(), self.rest))
        return self._with(*parts, count=self.count, first=self.first)

    def moved(self, move: Callable[[Tensor], Tensor]) -> KeyGroups:
        parts = (move(part) for part in (*self._groups(), self.rest))
        return self._with(*parts, count=self.count, first=self.first)

    def _groups(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.scale is not None
        return self.codes, self.scale, self.zero

    def _with(self, *parts: Tensor, count: int, first: int) -> KeyGroups:
        codes, scale, zero, rest = parts
        return replace(
            self, codes=codes, scale=scale, zero=zero, rest=rest, count=count, first=first
        )

    def followed_by(self, x: Tensor) -> KeyGroups:
        """The tokens of x [B,H,T,D] after these: full groups stay, the exact rest is grouped."""
        if self.first or self.count != self.codes.shape[2] * GROUP + self.rest.shape[2]:
            raise InputError(
                "kivi: keys were to be appended to a slice that cuts a group of 32 tokens, needed "
                "whole groups",
                hint="append before slicing, or slice at multiples of 32",
            )
        new = encode_keys(torch.cat([self.rest, x], dim=2), self.bits)
        pairs = zip(self._groups(), new._groups(), strict=True)
        parts = (torch.cat(pair, dim=2) for pair in pairs)
        return self._with(*parts, new.rest, count=self.count + x.shape[2], first=0)


@dataclass(frozen=True)
class Kivi(RowCodec):
    """See the module's text. Values are stored vector by vector, keys in groups of tokens. A
    latent, being key and value, is kept like keys."""

    key_bits: int
    value_bits: int

    method = "kivi"
    key_group = GROUP

    def check(self, stream: Stream) -> None:
        check_groups(self, stream, GROUP, "keys alone can be of other sizes: kivi:K2V16")

    def layout(self, dim: int, bits: int) -> Layout:
        return group_layout(dim, bits, GROUP)

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, None]:
        return encode_vectors(x_ND, bits, GROUP), None

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        return decode_vectors(codes, dim, bits, GROUP)

    def encode(
        self, x: Tensor, stream: Stream, positions: Tensor, mean: Tensor | None = None
    ) -> Packed:
        if stream.role == "value":
            return super().encode(x, stream, positions, mean)
        check_input(self, x, stream, mean)
        return encode_keys(x, role_bits(self, stream))

    def append(self, packed: Packed, x: Tensor, positions: Tensor) -> Packed:
        if isinstance(packed, KeyGroups):
            return packed.followed_by(x)
        return super().append(packed, x, positions)

    def decode(self, packed: Packed, positions: Tensor) -> Tensor:
        if isinstance(packed, KeyGroups):
            return decode_keys(packed)
        return super().decode(packed, positions)

    def nbytes(self, packed: Packed) -> int:
        """An exact element counts 2 bytes, whatever dtype it came in."""
        if not isinstance(packed, KeyGroups):
            return super().nbytes(packed)
        assert packed.scale is not None
        halves = packed.scale.numel() + packed.zero.numel() + packed.rest.numel()
        return packed.codes.numel() + 2 * halves

    def sharing_key(self, stream: Stream) -> Hashable:
        return (super().sharing_key(stream), stream.role == "value")

    def identity(self) -> Codec:
        return Untransformed(of=self.method)


def encode_keys(x: Tensor, bits: int) -> KeyGroups:
    """x [B,H,T,D] -> full groups along the tokens, and the rest as it is."""
    batch, heads, tokens, dim = x.shape
    groups = tokens // GROUP
    flat = x[:, :, : groups * GROUP].reshape(-1, GROUP, dim)
    codes = torch.empty(len(flat), dim * GROUP * bits // 8, dtype=torch.uint8, device=x.device)
    scale = torch.empty(len(flat), dim, dtype=torch.float16, device=x.device)
    zero = torch.empty_like(scale)
    for rows in row_chunks(len(flat), GROUP * dim, x.device):
        columns = flat[rows].transpose(0, 1).reshape(GROUP, -1)
        packed, *numbers = encode_groups(columns, bits)
        codes[rows] = packed.view(-1, codes.shape[1])
        scale[rows], zero[rows] = (part.view(-1, dim) for part in numbers)
    return KeyGroups(
        bits,
        dim,
        codes.view(batch, heads, groups, codes.shape[1]),
        scale.view(batch, heads, groups, dim),
        zero=zero.view(batch, heads, groups, dim),
        rest=x[:, :, groups * GROUP :].clone(),
        count=tokens,
    )


def decode_keys(packed: KeyGroups) -> Tensor:
    """The tokens that `packed` shows, [B,H,T,D] float32."""
    assert packed.scale is not None
    batch, heads, groups, width = packed.codes.shape
    codes = packed.codes.reshape(-1, width)
    scale, zero = (part.reshape(-1, packed.dim) for part in (packed.scale, packed.zero))
    out = torch.empty(
        len(codes), GROUP, packed.dim, dtype=torch.float32, device=packed.codes.device
    )
    for rows in row_chunks(len(codes), GROUP * packed.dim, codes.device):
        columns = codes[rows].reshape(-1, width // packed.dim)
        x_SN = decode_groups(columns, scale[rows].reshape(-1), zero[rows].reshape(-1), packed.bits)
        out[rows] = x_SN.view(GROUP, -1, packed.dim).transpose(0, 1)
    full = out.view(batch, heads, groups * GROUP, packed.dim)
    both = torch.cat([full, packed.rest.float()], dim=2)
    return both[:, :, packed.first : packed.first + packed.count]

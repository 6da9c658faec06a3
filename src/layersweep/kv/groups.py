"""The frame of the codecs that encode tokens together, in tiles of a few tokens of one head.

Such a method is a GroupCodec, a VectorCodec with
    how                                  the tokens of a tile, and how many recent ones stay exact
    width(dim, bits)                     bytes of a tile
    encode_tiles(x [N, S, D], bits)      -> codes [N, width] uint8, scales included
    decode_tiles(codes, dim, bits)       -> x^ [N, S, D]
Tokens wait exactly, in the dtype that they came in, until their tile is full. They count 16 bits an
element, whatever that dtype is. A tile knows neither its batch nor other tiles.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv.codec import Grouping, Packed
from layersweep.kv.rotate import row_chunks
from layersweep.kv.stream import Role
from layersweep.kv.vector_codec import VectorCodec


@dataclass(frozen=True, kw_only=True)
class TokenGroups(Packed):
    """Tokens in full groups, and the exact ones after them.

    codes [B, H, G, width] uint8, a row per group; rest [B, H, R, D]. A slice keeps every group that
    it touches: `first` tokens of the first one are hidden, `count` are shown.
    """

    rest: Tensor
    count: int
    group: int
    first: int = 0

    @property
    def tokens(self) -> int:
        return self.count

    @property
    def elements(self) -> int:
        return self.codes.shape[:2].numel() * self.count * self.dim

    @property
    def held_bytes(self) -> int:
        return super().held_bytes + self.rest.nbytes

    def slice_tokens(self, start: int, stop: int) -> TokenGroups:
        """Tokens [start, stop) of every sequence, as views."""
        start, stop = max(start, 0), max(min(stop, self.count), start)
        begin, end = self.first + start, self.first + stop
        groups = self.codes.shape[2]
        low, high = min(begin // self.group, groups), min(-(-end // self.group), groups)
        filled = groups * self.group
        return replace(
            self,
            codes=self.codes[:, :, low:high],
            rest=self.rest[:, :, max(begin - filled, 0) : max(end - filled, 0)],
            count=stop - start,
            first=begin - low * self.group if low < groups else 0,
        )

    def slice_batch(self, start: int, stop: int) -> TokenGroups:
        """Sequences [start, stop), as views."""
        return replace(self, codes=self.codes[start:stop], rest=self.rest[start:stop])

    def moved(self, move: Callable[[Tensor], Tensor]) -> TokenGroups:
        return replace(self, codes=move(self.codes), rest=move(self.rest))

    @property
    def is_whole(self) -> bool:
        """Whether it hides and lacks no token of its groups, so that tokens can follow."""
        filled = self.codes.shape[2] * self.group
        return not self.first and self.count == filled + self.rest.shape[2]


class GroupCodec(VectorCodec):
    """See the module's text."""

    @property
    @abstractmethod
    def how(self) -> Grouping:
        """Tokens of a tile, and how many recent ones stay exact."""

    @abstractmethod
    def width(self, dim: int, bits: int) -> int:
        """Bytes of a tile of vectors of `dim` numbers at `bits` an element."""

    @abstractmethod
    def encode_tiles(self, x_NSD: Tensor, bits: int) -> Tensor:
        """x [N, S, D] floating -> codes [N, width] uint8."""

    @abstractmethod
    def decode_tiles(self, codes: Tensor, dim: int, bits: int) -> Tensor:
        """Inverse of encode_tiles: x^ [N, S, D] float32."""

    def grouping(self, role: Role) -> Grouping:
        codec = self.for_role(role)
        return codec.how if isinstance(codec, GroupCodec) else Grouping()

    def nbytes(self, packed: Packed) -> int:
        """An exact element counts 2 bytes, whatever dtype it came in."""
        if not isinstance(packed, TokenGroups):
            return packed.held_bytes
        return packed.codes.nbytes + 2 * packed.rest.numel()

    def pack(self, x: Tensor, bits: int, mean: Tensor | None, role: Role) -> TokenGroups:
        batch, heads, tokens, dim = x.shape
        coded = self.how.coded(tokens)
        codes, _ = self.encode_all(x[:, :, :coded], bits, None)
        return TokenGroups(
            bits, dim, codes.view(batch, heads, -1, codes.shape[1]), None, role=role,
            rest=x[:, :, coded:].clone(), count=tokens, group=self.how.group,
        )  # fmt: skip

    def extend(self, packed: Packed, x: Tensor) -> TokenGroups:
        """Full groups stay, the exact rest is grouped with what follows."""
        assert isinstance(packed, TokenGroups)
        if not packed.is_whole:
            raise InputError(
                f"{self.method}: tokens were to be appended to a slice that cuts a group of "
                f"{packed.group} tokens, needed whole groups",
                hint=f"append before slicing, or slice at multiples of {packed.group}",
            )
        new = self.pack(torch.cat([packed.rest, x], dim=2), packed.bits, None, packed.role)
        codes, count = torch.cat([packed.codes, new.codes], dim=2), packed.count + x.shape[2]
        return replace(new, codes=codes, count=count)

    def unpack(self, packed: Packed) -> Tensor:
        assert isinstance(packed, TokenGroups)
        coded = self.decode_all(packed).view(*packed.codes.shape[:2], -1, packed.dim)
        both = torch.cat([coded, packed.rest.float()], dim=2)
        return both[:, :, packed.first : packed.first + packed.count]

    def encode_all(self, x_BHTD: Tensor, bits: int, mean: Tensor | None) -> tuple[Tensor, None]:
        """Codes [B H T / S, width] of whole groups."""
        group, dim = self.how.group, x_BHTD.shape[3]
        tiles = x_BHTD.reshape(-1, group, dim)
        codes = torch.empty(
            len(tiles), self.width(dim, bits), dtype=torch.uint8, device=x_BHTD.device
        )
        for rows in row_chunks(len(tiles), group * dim, tiles.device):
            codes[rows] = self.encode_tiles(tiles[rows], bits)
        return codes, None

    def decode_all(self, packed: Packed) -> Tensor:
        """x^ [B H T / S, S, D] float32 of whole groups."""
        group, dim = self.how.group, packed.dim
        codes, _ = packed.rows()
        out = torch.empty(len(codes), group, dim, dtype=torch.float32, device=codes.device)
        for rows in row_chunks(len(codes), group * dim, codes.device):
            out[rows] = self.decode_tiles(codes[rows], dim, packed.bits)
        return out

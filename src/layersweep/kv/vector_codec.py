"""The frame of the codecs that store every head vector on its own: rows in, codes out, and back.

Such a method is a RowCodec, a frozen dataclass of its hyper-parameters with
    layout(dim, bits)                  what a vector takes
    encode_rows(x [N, D], bits)        -> codes [N, width], scale [N] or None
    decode_rows(codes, scale, dim, bits) -> x^ [N, D]
and perhaps `check`, for streams that it cannot take, and `for_role`, where values are not stored as
keys are. The frame cuts [B, H, T, D] into rows, a few at a time, so it keeps the promises of
`kv.codec.Codec`: a vector knows neither its batch nor the tokens before it. A method that can only
do all rows at once (trellis) is a VectorCodec, one that encodes tokens together a GroupCodec
(kv/groups.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.codec import Codec, Grouping, Packed, check_input, join_tokens, role_bits
from layersweep.kv.rotate import row_chunks
from layersweep.kv.stream import Role, Stream


@dataclass(frozen=True)
class Layout:
    """What a vector takes: `width` numbers of type `codes`, and a `scale` unless that is None."""

    width: int
    codes: torch.dtype = torch.uint8
    scale: torch.dtype | None = torch.float16

    def empty(self, count: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Memory for the codes [N, width] and scales [N] of `count` vectors."""
        codes = torch.empty(count, self.width, dtype=self.codes, device=device)
        if self.scale is None:
            return codes, None
        return codes, torch.empty(count, dtype=self.scale, device=device)


class VectorCodec(ABC):
    """What all vectors of a stream become at once, by `encode_all` and `decode_all`; kv.codec.Codec
    says what each attribute promises."""

    key_bits: int
    value_bits: int
    simulated = False

    @property
    @abstractmethod
    def method(self) -> str: ...

    @property
    def version(self) -> str:
        return "1"

    @property
    def encoder(self) -> str:
        return "torch"

    @abstractmethod
    def identity(self) -> Codec: ...

    def check(self, stream: Stream) -> None:  # noqa: B027 (most methods take every stream)
        """Raise InputError for a stream whose shape or bits the method cannot take."""

    def for_role(self, role: Role) -> VectorCodec:
        """What encodes and decodes such streams: this codec, unless keys and values differ."""
        return self

    def grouping(self, role: Role) -> Grouping:
        """How the method lets go of exact tokens."""
        return Grouping()

    def encode(
        self, x: Tensor, stream: Stream, positions: Tensor, mean: Tensor | None = None
    ) -> Packed:
        check_input(self, x, stream, mean)
        codec = self.for_role(stream.role)
        codec.check(stream)
        return codec.pack(x, role_bits(self, stream), mean, stream.role)

    def append(self, packed: Packed, x: Tensor, positions: Tensor) -> Packed:
        return self.for_role(packed.role).extend(packed, x)

    def decode(self, packed: Packed, positions: Tensor) -> Tensor:
        return self.for_role(packed.role).unpack(packed)

    def nbytes(self, packed: Packed) -> int:
        return packed.held_bytes

    def sharing_key(self, stream: Stream) -> Hashable:
        """Method, the bits of the stream's role, and all options of what encodes it."""
        codec = self.for_role(stream.role)
        options = (v for name, v in vars(codec).items() if name not in ("key_bits", "value_bits"))
        return (self.method, type(codec), role_bits(self, stream), *options)

    @abstractmethod
    def encode_all(
        self, x_BHTD: Tensor, bits: int, mean: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Codes [B H T, width] and scale [B H T]. A method with a mean subtracts it here."""

    @abstractmethod
    def decode_all(self, packed: Packed) -> Tensor:
        """x^ [B H T, D] float32."""

    def pack(self, x: Tensor, bits: int, mean: Tensor | None, role: Role) -> Packed:
        """x [B,H,T,D] of a stream of that role, encoded."""
        shape, dim = x.shape[:3], x.shape[3]
        codes, scale = self.encode_all(x, bits, mean)
        codes = codes.view(*shape, codes.shape[1])
        return Packed(bits, dim, codes, None if scale is None else scale.view(shape), mean, role)

    def extend(self, packed: Packed, x: Tensor) -> Packed:
        """The tokens of x [B,H,T,D] after those of `packed`."""
        return join_tokens([packed, self.pack(x, packed.bits, packed.mean, packed.role)])

    def unpack(self, packed: Packed) -> Tensor:
        """x^ [B,H,T,D] float32."""
        return self.decode_all(packed).view(*packed.codes.shape[:3], packed.dim)


class RowCodec(VectorCodec):
    """See the module's text. Kernels, which do all rows at once, override `encode_all`."""

    @abstractmethod
    def layout(self, dim: int, bits: int) -> Layout:
        """What a vector of `dim` numbers takes at `bits` an element."""

    @abstractmethod
    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
        """x [N, D] floating -> codes [N, width] and scale [N], which are cast to the layout."""

    @abstractmethod
    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        """Inverse of encode_rows: x^ [N, D], which is cast to float32."""

    def encode_all(
        self, x_BHTD: Tensor, bits: int, mean: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        flat = x_BHTD.reshape(-1, x_BHTD.shape[3])
        count, dim = flat.shape
        codes, scale = self.layout(dim, bits).empty(count, flat.device)
        for rows in row_chunks(count, dim, flat.device):
            codes[rows], own = self.encode_rows(flat[rows], bits)
            if scale is not None and own is not None:
                scale[rows] = own
        return codes, scale

    def decode_all(self, packed: Packed) -> Tensor:
        codes, scale = packed.rows()
        out = torch.empty(len(codes), packed.dim, dtype=torch.float32, device=codes.device)
        for rows in row_chunks(len(codes), packed.dim, codes.device):
            own = None if scale is None else scale[rows]
            out[rows] = self.decode_rows(codes[rows], own, packed.dim, packed.bits)
        return out

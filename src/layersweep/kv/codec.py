"""The contract of a KV codec, and the packed form that the codecs of this package share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from layersweep.errors import InputError
from layersweep.kv.stream import Role, Stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from layersweep.kv.basis import Basis


@dataclass(frozen=True)
class Packed:
    """Encoded vectors of one stream. Every vector stands alone, so batch and tokens slice freely.

    codes  [batch, heads, tokens, width]  what is stored per vector (uint8 where really packed)
    scale  [batch, heads, tokens]         one number per vector, None where the codec has none
    mean   [batch, heads, dim] float16    subtracted from every vector before encoding, or None;
                                          one column more where the codec has a level
    role   of the stream that they come from
    """

    bits: int
    dim: int
    codes: Tensor
    scale: Tensor | None
    mean: Tensor | None = None
    role: Role = "key"

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    @property
    def elements(self) -> int:
        """Numbers that the uncompressed stream has."""
        return self.codes.shape[:3].numel() * self.dim

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """codes [batch x heads x tokens, width] and scale, likewise."""
        scale = None if self.scale is None else self.scale.reshape(-1)
        return self.codes.reshape(-1, self.codes.shape[3]), scale

    def slice_tokens(self, start: int, stop: int) -> Packed:
        """Tokens [start, stop) of every sequence, as views."""
        scale = None if self.scale is None else self.scale[:, :, start:stop]
        return replace(self, codes=self.codes[:, :, start:stop], scale=scale)

    def slice_batch(self, start: int, stop: int) -> Packed:
        """Sequences [start, stop), as views."""
        scale, mean = (
            None if part is None else part[start:stop] for part in (self.scale, self.mean)
        )
        return replace(self, codes=self.codes[start:stop], scale=scale, mean=mean)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Packed:
        """The same bytes elsewhere."""
        scale, mean = (None if part is None else move(part) for part in (self.scale, self.mean))
        return replace(self, codes=move(self.codes), scale=scale, mean=mean)

    @property
    def held_bytes(self) -> int:
        """Bytes of its tensors, which may be more than what a simulated method would store."""
        parts = (self.codes, self.scale, self.mean)
        return sum(part.nbytes for part in parts if part is not None)


def join_tokens(parts: Sequence[Packed]) -> Packed:
    """The parts one after the other along the tokens; same bits, dim, batch and heads."""
    import torch

    scales = [part.scale for part in parts if part.scale is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts], dim=2),
        scale=torch.cat(scales, dim=2) if scales else None,
    )


def join_batches(parts: Sequence[Packed]) -> Packed | None:
    """The sequences of all parts, as one batch padded to the longest with vectors that decode to
    something finite; None where the packed form is a codec's own. Same bits, dim and heads."""
    import torch

    if any(type(part) is not Packed for part in parts):
        return None
    scales = [part.scale for part in parts if part.scale is not None]
    means = [part.mean for part in parts if part.mean is not None]
    return replace(
        parts[0],
        codes=pad_tokens([part.codes for part in parts]),
        scale=pad_tokens(scales) if scales else None,
        mean=torch.cat(means) if means else None,
    )


def pad_tokens(parts: Sequence[Tensor]) -> Tensor:
    """[B, H, T, ...] of several T as one batch, zeros after the shorter ones."""
    longest = max(part.shape[2] for part in parts)
    batch = sum(len(part) for part in parts)
    found = parts[0].new_zeros(batch, parts[0].shape[1], longest, *parts[0].shape[3:])
    first = 0
    for part in parts:
        found[first : first + len(part), :, : part.shape[2]] = part
        first += len(part)
    return found


class Codec(Protocol):
    """Turns one stream of a layer, its keys, values or latent, into bytes and back.

        layer's projection                                attention
             |                                                ^
             |  x [B,H,T,D], keys BEFORE RoPE                 |  RoPE(x^), float32
             v                                                |
          encode(x, stream, positions) --> Packed --> decode(packed, positions) --> x^ [B,H,T,D]
                                            |   ^
                        nbytes(packed) <----'   '---- append(packed, x, positions)

    B sequences, T tokens, H heads and D numbers as the stream says; positions [B, T] are absolute
    token positions, for codecs that need them. What every codec promises:

    - decode sees the packed form alone; nothing is carried beside it.
    - encoding a batch is encoding each sequence alone, and append is encoding at once, bit for
      bit: results must not depend on who else was in the batch.
    - a non-finite input decodes to something non-finite, without a device synchronisation:
      the reader of the cache finds it; nothing is clamped into plausible numbers.
    - nbytes counts all that a reader needs except tables shipped with the package. A codec whose
      packed form is larger than its method's (`simulated`) counts the method's fixed-rate size.
    - `mean` [B, H, D] float16 is subtracted and stored by codecs with `wants_mean`; append uses the
      stored one. Others raise InputError. With `wants_level`, too, a column D + 1 holds the rms
      around the means, to which stored scales are relative.
    - codecs with `found` "1" are given sinks around their mean by their caller (kv.encoded).
    - codecs with `wants_basis` are given x in the coordinates of stream.basis, where there is one,
      by their caller, who turns back what they decode; likewise values less what stream.prediction
      makes of the decoded keys.
    """

    @property
    def method(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def simulated(self) -> bool: ...
    @property
    def encoder(self) -> str: ...
    @property
    def key_bits(self) -> int: ...
    @property
    def value_bits(self) -> int: ...

    def encode(
        self, x: Tensor, stream: Stream, positions: Tensor, mean: Tensor | None = None
    ) -> Packed:
        """x [B,H,T,D] floating -> Packed. Raises InputError for shapes that it cannot take."""

    def decode(self, packed: Packed, positions: Tensor) -> Tensor:
        """Packed -> [B,H,T,D] float32."""

    def append(self, packed: Packed, x: Tensor, positions: Tensor) -> Packed:
        """`packed` followed by x [B,H,T,D] at `positions`."""

    def nbytes(self, packed: Packed) -> float:
        """Bytes of the packed form, rounded up once per tensor; NaN where nobody can say."""

    def sharing_key(self, stream: Stream) -> Hashable:
        """Equal keys promise equal encodings of equal input: K3V2 and K4V2 share their values."""

    def identity(self) -> Codec:
        """This codec's transforms without the quantization: the noise that they bring alone."""


def wants_mean(codec: Codec) -> bool:
    """Whether a codec subtracts a channel mean that its caller measures; most do not."""
    return bool(getattr(codec, "wants_mean", False))


def wants_level(codec: Codec) -> bool:
    """Whether a codec with a channel mean takes the size of what is left, as one more column."""
    return bool(getattr(codec, "wants_level", False))


def wants_basis(codec: Codec) -> bool:
    """Whether a codec spreads its error evenly, so that coordinates decide where it goes."""
    return bool(getattr(codec, "wants_basis", False))


def finds_sinks(codec: Codec) -> bool:
    """Whether a codec with a channel mean has tokens that look like the first one coded as a
    difference from it (kv.encoded), by its caller."""
    return getattr(codec, "found", "0") == "1"


@dataclass(frozen=True)
class Grouping:
    """How a codec lets go of exact tokens: the last `keep` of them never, the others in groups of
    `group` that are encoded together, once the last of a group is there."""

    group: int = 1
    keep: int = 0

    def coded(self, tokens: int) -> int:
        """How many of the first `tokens` are encoded."""
        return max(tokens - self.keep, 0) // self.group * self.group


def grouping(codec: Codec, role: Role) -> Grouping:
    """How `codec` encodes the tokens of such streams: each at once, for most codecs."""
    asked = getattr(codec, "grouping", None)
    found: Grouping = asked(role) if asked else Grouping()
    return found


def basis_for(codec: Codec, stream: Stream) -> Basis | None:
    """Coordinates in which `codec` wants this stream, None for those that it comes in."""
    return stream.basis if wants_basis(codec) else None


def role_bits(codec: Codec, stream: Stream) -> int:
    """Bits that `codec` spends on a stream: value bits on values, key bits on keys, a latent, which
    serves as key and value, and its rotary part."""
    return codec.value_bits if stream.role == "value" else codec.key_bits


def check_input(codec: Codec, x: Tensor, stream: Stream, mean: Tensor | None) -> None:
    """Raise InputError unless x is [B, stream.heads, T, stream.dim] with dim a multiple of 8, and
    for a mean that the codec does not want."""
    if x.ndim != 4 or x.shape[1] != stream.heads or x.shape[3] != stream.dim:
        raise InputError(
            f"{codec.method}: stream '{stream.name}' found shape {list(x.shape)}, needed "
            f"[batch, {stream.heads}, tokens, {stream.dim}]"
        )
    if stream.dim % 8:
        raise InputError(
            f"{codec.method}: stream '{stream.name}' has head size {stream.dim}, needed a "
            "multiple of 8",
            hint="only the exact cache can serve this model",
        )
    if mean is not None and not wants_mean(codec):
        raise InputError(f"{codec.method}: a channel mean was given, this method keeps none")


def check_stream(codec: Codec, stream: Stream, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError unless `codec` takes the stream, before anything is run: one zero goes
    through it, there and back. On a GPU that compiles the kernels, which a sweep would wait for.
    A stream with 16 bits stays exact and never gets there. Whatever else one's own codec raises
    is a refusal, too."""
    import torch

    from layersweep.kv.custom import FAILURES, CustomCodec
    from layersweep.kv.means import mean_for
    from layersweep.kv.sinks import Found

    if role_bits(codec, stream) == 16:
        return
    x = torch.zeros(1, stream.heads, 1, stream.dim, dtype=dtype, device=device)
    mean = mean_for(codec, x)
    if mean is not None and finds_sinks(codec):
        Found.of(x.float(), x.to(torch.float16), mean)
    at = torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        codec.decode(codec.encode(x, stream, at, mean), at)
    except FAILURES as failure:
        if isinstance(failure, InputError) or not isinstance(codec, CustomCodec):
            raise
        raise InputError(
            f"{codec.method}: found {type(failure).__name__}: {failure}, needed it to take stream "
            f"'{stream.name}' of role {stream.role} and head size {stream.dim}",
            hint="`layersweep codec check` names what it does not keep",
        ) from failure

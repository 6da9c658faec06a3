"""One stream of one layer as an arm keeps it: exact tokens around a packed middle.

tokens   0 ......... sink ................... T - window ......... T
         |  exact     |  codec                 |  exact            |
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layersweep.kv.arms import Arm
from layersweep.kv.basis import Basis
from layersweep.kv.codec import (
    Codec,
    Packed,
    basis_for,
    join_batches,
    pad_tokens,
    role_bits,
)
from layersweep.kv.means import mean_for, mean_kind
from layersweep.kv.methods import EXACT_BITS
from layersweep.kv.stream import Stream

# Exact tokens are counted as fp16 storage, whatever dtype the computation runs in.
_EXACT_ELEMENT_BITS = 16


@dataclass
class Encoded:
    """A packed range of tokens, decoded at most once."""

    codec: Codec
    packed: Packed
    positions: Tensor
    basis: Basis | None = None
    _decoded: Tensor | None = field(default=None, repr=False)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        if self._decoded is None:
            decoded = self.codec.decode(self.packed, self.positions)
            self._decoded = (self.basis.leave(decoded) if self.basis else decoded).to(dtype)
        return self._decoded

    def moved(self, move: Callable[[Tensor], Tensor]) -> Encoded:
        """Elsewhere, not decoded. Positions and basis stay where their layer is computed."""
        return Encoded(self.codec, self.packed.moved(move), self.positions, self.basis)

    def joined(self, others: Sequence[Encoded]) -> Encoded | None:
        """This one and `others` of other sequences as one batch; None where that cannot be."""
        packed = join_batches([self.packed, *(other.packed for other in others)])
        if packed is None:
            return None
        at = torch.arange(packed.tokens, device=self.positions.device) + self.positions[0, 0]
        positions = at.expand(len(packed.codes), packed.tokens)
        return Encoded(self.codec, packed, positions, self.basis)


Moved = dict[int, Encoded]  # by the id of what was moved
Joined = dict[int, Encoded | None]  # by the id of the first of what was joined


@dataclass
class Shared:
    """What arms have in common of one layer and some sequences, for which it starts empty.

    encoded    whole encodings (K3V2 and K4V2: the values)
    prepared   by stream, what the last codec encoded (K3V2 and K4V2: the keys), with its means
    """

    encoded: dict[Hashable, Encoded] = field(default_factory=dict)
    prepared: dict[str, Prepared] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """Tokens in a codec's coordinates, and their channel means if it wants them."""

    of: Hashable
    x: Tensor
    mean: Tensor | None


@dataclass(frozen=True)
class CachedStream:
    """What `store` kept. `head` and `tail` [B,H,*,D] are views of the exact tokens."""

    dtype: torch.dtype
    head: Tensor | None
    middle: Encoded | None
    tail: Tensor | None

    def decoded(self) -> Tensor:
        """What attention reads, [B,H,T,D] in the stored dtype; keys still before RoPE.

        An exact stream returns the very tensor that was stored. Do not write into the result:
        arms share it.
        """
        middle = None if self.middle is None else self.middle.decoded(self.dtype)
        parts = [part for part in (self.head, middle, self.tail) if part is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def moved(self, move: Callable[[Tensor], Tensor], shared: Moved) -> CachedStream:
        """Every tensor put elsewhere by `move`; not decoded, even where it stays. What several
        streams share is moved once, by `shared`, which starts empty for them."""
        head, tail = (None if part is None else move(part) for part in (self.head, self.tail))
        middle = self.middle
        if middle is not None:
            at = id(middle)
            if at not in shared:
                shared[at] = middle.moved(move)
            middle = shared[at]
        return CachedStream(self.dtype, head, middle, tail)

    @staticmethod
    def joined(streams: Sequence[CachedStream], shared: Joined) -> CachedStream | None:
        """Streams of an arm, of sequences of other lengths each, as one batch padded to the
        longest; None where exact tokens end them, which would not be in place, or where the
        packed form is a codec's own. `shared` as in `moved`."""
        first = streams[0]
        if len(streams) == 1:
            return first
        if any(stream.tail is not None for stream in streams):
            return None
        middles = [stream.middle for stream in streams if stream.middle is not None]
        heads = [stream.head for stream in streams if stream.head is not None]
        if not middles:
            return CachedStream(first.dtype, pad_tokens(heads), None, None)
        if len(middles) < len(streams):  # some have no more tokens than the sink
            return None
        if id(middles[0]) not in shared:
            shared[id(middles[0])] = middles[0].joined(middles[1:])
        middle = shared[id(middles[0])]
        head = torch.cat(heads) if heads else None
        return None if middle is None else CachedStream(first.dtype, head, middle, None)

    @property
    def held_bytes(self) -> int:
        """Bytes of its tensors."""
        exact = sum(part.nbytes for part in (self.head, self.tail) if part is not None)
        return exact + (0 if self.middle is None else self.middle.packed.held_bytes)

    @property
    def nbits(self) -> float:
        """Measured size: the codec's bytes of the middle, 16 bits per exact element. NaN where
        somebody's own codec does not say."""
        exact = sum(part.numel() for part in (self.head, self.tail) if part is not None)
        packed: float = 0 if self.middle is None else self.middle.codec.nbytes(self.middle.packed)
        return exact * _EXACT_ELEMENT_BITS + 8 * packed

    @property
    def nbytes(self) -> float:
        return self.nbits / 8

    @property
    def elements(self) -> int:
        """Numbers that the uncompressed stream has: batch x heads x tokens x dim."""
        exact = sum(part.numel() for part in (self.head, self.tail) if part is not None)
        if self.middle is None:
            return exact
        return exact + self.middle.packed.elements


def store(
    arm: Arm,
    x: Tensor,
    stream: Stream,
    positions: Tensor,
    layer: int,
    num_layers: int,
    shared: Shared,
    mean_tokens: int | None = None,
) -> CachedStream:
    """Keep x [B,H,T,D] (keys before RoPE) at `positions` [B,T] as `arm` keeps this layer.

    `shared` is handed on from arm to arm and from stream to stream: what two arms encode alike is
    encoded and decoded once. A codec's channel mean comes from its first `mean_tokens` tokens, from
    all of them by default. Raises InputError for a stream that the codec cannot take.
    """
    tokens = x.shape[2]
    start, stop = min(arm.sink, tokens), max(tokens - arm.window, 0)
    codec = arm.codec
    if codec is None or keeps_exact(arm, stream, layer, num_layers) or start >= stop:
        return CachedStream(x.dtype, head=x, middle=None, tail=None)
    key = (codec.sharing_key(stream), stream.name, start, stop)
    if key not in shared.encoded:
        at, basis = positions[:, start:stop], basis_for(codec, stream)
        of = (start, stop, mean_tokens, basis is None, *mean_kind(codec))
        ready = shared.prepared.get(stream.name)
        if ready is None or ready.of != of:
            middle = x[:, :, start:stop] if basis is None else basis.enter(x[:, :, start:stop])
            ready = Prepared(of, middle, mean_for(codec, middle[:, :, :mean_tokens]))
            shared.prepared[stream.name] = ready
        packed = codec.encode(ready.x, stream, at, ready.mean)
        shared.encoded[key] = Encoded(codec, packed, at, basis)
    return CachedStream(
        x.dtype,
        head=x[:, :, :start] if start else None,
        middle=shared.encoded[key],
        tail=x[:, :, stop:] if stop < tokens else None,
    )


def keeps_exact(arm: Arm, stream: Stream, layer: int, num_layers: int) -> bool:
    """Whether a layer keeps a stream as it is: a protected layer, or 16 bits (except where the
    transforms themselves are the arm)."""
    if arm.codec is None or arm.is_exact_layer(layer, num_layers):
        return True
    return arm.method != "identity" and role_bits(arm.codec, stream) == EXACT_BITS


def bits_per_element(nbits: float, elements: float) -> float:
    """Average over whatever was summed: layers, keys and values, windows. 16 is uncompressed."""
    return nbits / elements

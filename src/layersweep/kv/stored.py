"""One stream of one layer as an arm keeps it: exact tokens around a packed middle.

tokens   first ..... sink ................... T - window ......... T
         |  head      |  middle, by the codec  |  tail             |

Numbers are positions in the text. Tokens are appended in any number of pieces, and each is encoded
once, when it leaves the arm's window. Until one does, all of them are the head. `first` is 0 where
a layer can look at all tokens; otherwise it moves on, and with it goes a sink that nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from layersweep.kv.arms import Arm
from layersweep.kv.basis import Basis
from layersweep.kv.codec import (
    Codec,
    Packed,
    basis_for,
    join_batches,
    key_group,
    pad_tokens,
    role_bits,
)
from layersweep.kv.means import mean_for, mean_kind
from layersweep.kv.methods import EXACT_BITS
from layersweep.kv.stream import Rotation, Stream

# Exact tokens are counted as fp16 storage, whatever dtype the computation runs in.
EXACT_ELEMENT_BITS = 16

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Encoded:
    """A packed range of tokens at `positions` [B, T], of `dtype` before and after. Arms share it:
    it is never changed, and it is itself the key to what has been made of it."""

    codec: Codec
    packed: Packed
    positions: Tensor
    basis: Basis | None
    rotation: Rotation | None
    dtype: torch.dtype

    def decoded(self) -> Tensor:
        x = self.codec.decode(self.packed, self.positions)
        x = self.basis.leave(x) if self.basis else x
        return (self.rotation.redo(x, self.positions) if self.rotation else x).to(self.dtype)

    def without(self, tokens: int) -> Encoded:
        """Less its first `tokens`, as views."""
        packed = self.packed.slice_tokens(tokens, self.packed.tokens)
        return replace(self, packed=packed, positions=self.positions[:, tokens:])

    @property
    def can_be_cut(self) -> bool:
        """Not where the packed form is that of somebody's own codec."""
        return isinstance(self.packed, Packed)

    def nbytes(self, hidden: int) -> float:
        """Measured size, its first `hidden` tokens left out; by their share where they cannot be
        cut off."""
        if not hidden:
            return self.codec.nbytes(self.packed)
        if self.can_be_cut:
            return self.codec.nbytes(self.packed.slice_tokens(hidden, self.packed.tokens))
        return self.codec.nbytes(self.packed) * (1 - hidden / self.packed.tokens)

    def moved(self, move: Move) -> Encoded:
        """The bytes elsewhere. Positions and basis stay where their layer is computed."""
        return replace(self, packed=self.packed.moved(move))

    def joined(self, others: Sequence[Encoded]) -> Encoded | None:
        """This one and `others` of other sequences as one batch; None where that cannot be."""
        packed = join_batches([self.packed, *(other.packed for other in others)])
        if packed is None:
            return None
        starts = torch.cat([one.positions[:, :1] for one in (self, *others)])
        at = torch.arange(packed.tokens, device=starts.device)
        return replace(self, packed=packed, positions=starts + at)


@dataclass(frozen=True)
class Prepared:
    """Tokens in a codec's coordinates, and their channel means if it wants them."""

    of: Hashable
    x: Tensor
    mean: Tensor | None


@dataclass
class Shared:
    """What streams have in common while the same tokens are appended to them under several arms,
    for which it starts empty.

    encoded    whole encodings (K3V2 and K4V2: the values)
    prepared   by stream, what the last codec encoded (K3V2 and K4V2: the keys), with its means
    """

    encoded: dict[Hashable, Encoded] = field(default_factory=dict)
    prepared: dict[str, Prepared] = field(default_factory=dict)
    _positions: Tensor | None = None

    def positions(self, batch: int, start: int, stop: int, device: torch.device) -> Tensor:
        """start, start + 1, ... stop - 1 for each of `batch` sequences."""
        known = self._positions
        if known is None or len(known) < stop:
            known = self._positions = torch.arange(stop, device=device)
        return known[start:stop].expand(batch, -1)


@dataclass(frozen=True)
class StoredStream:
    """See the module's text. `head` and `tail` [B,H,*,D] may be views of what was appended.

    `codec` is None for a stream that stays exact. Its channel means come from the first
    `mean_tokens` tokens that it encodes at once, all of them by default, and are frozen. The first
    `hidden` tokens of the middle are before `first`: held, because a codec cannot let go of them
    yet, but neither decoded nor counted.
    """

    stream: Stream
    codec: Codec | None
    sink: int = 0
    window: int = 0
    mean_tokens: int | None = None
    first: int = 0
    hidden: int = 0
    head: Tensor | None = None
    middle: Encoded | None = None
    tail: Tensor | None = None

    @classmethod
    def empty(
        cls,
        arm: Arm,
        stream: Stream,
        layer: int = 0,
        num_layers: int = 1,
        mean_tokens: int | None = None,
        first: int = 0,
    ) -> StoredStream:
        """As `arm` keeps `stream` in a layer, from position `first` on: exactly where the layer is
        protected, or has 16 bits for it (except where the transforms themselves are the arm)."""
        codec = arm.in_layer(layer, num_layers).codec
        if codec and arm.method != "identity" and role_bits(codec, stream) == EXACT_BITS:
            codec = None
        return cls(stream, codec, arm.sink, arm.window, mean_tokens, first)

    def appended(self, x_BHTD: Tensor, shared: Shared | None = None) -> StoredStream:
        """With these tokens after those before, keys before RoPE. What another arm has encoded
        alike is found in `shared`. Raises InputError for a stream that the codec cannot take."""
        if self.middle is None:
            exact, kept = _after(self.head, x_BHTD), max(self.sink - self.first, 0)
            head, waiting = _some(exact[:, :, :kept]), exact[:, :, kept:]
            if self.codec is None or waiting.shape[2] <= self.window:
                return replace(self, head=exact)
        else:
            head, waiting = self.head, _after(self.tail, x_BHTD)
        middle, leaving = self.middle, max(waiting.shape[2] - self.window, 0)
        if leaving:
            middle = self._encoded(waiting[:, :, :leaving], shared or Shared())
        return replace(self, head=head, middle=middle, tail=_some(waiting[:, :, leaving:]))

    def _encoded(self, x_BHTD: Tensor, shared: Shared) -> Encoded:
        """The middle with these tokens after it."""
        assert self.codec is not None
        codec, stream, before = self.codec, self.stream, self.middle
        begin = max(self.first, self.sink) - self.hidden
        start = begin + (before.packed.tokens if before else 0)
        stop = start + x_BHTD.shape[2]
        key = (codec.sharing_key(stream), stream.name, before, start, stop)
        if key not in shared.encoded:
            positions = shared.positions(len(x_BHTD), begin, stop, x_BHTD.device)
            own = positions[:, start - begin :]
            ready = self._prepared(x_BHTD, own, start, shared)
            if before is None:
                packed = codec.encode(ready.x, stream, own, ready.mean)
            else:
                packed = codec.append(before.packed, ready.x, own)
            coordinates = basis_for(codec, stream), stream.rotation
            shared.encoded[key] = Encoded(codec, packed, positions, *coordinates, x_BHTD.dtype)
        return shared.encoded[key]

    def _prepared(self, x_BHTD: Tensor, positions: Tensor, start: int, shared: Shared) -> Prepared:
        assert self.codec is not None
        codec, basis = self.codec, basis_for(self.codec, self.stream)
        of = (start, x_BHTD.shape[2], self.middle, basis is None, *mean_kind(codec))
        ready = shared.prepared.get(self.stream.name)
        if ready is None or ready.of != of:
            rotation = self.stream.rotation
            x = rotation.undo(x_BHTD.float(), positions) if rotation else x_BHTD
            x = basis.enter(x) if basis else x
            mean = None if self.middle else mean_for(codec, x[:, :, : self.mean_tokens])
            ready = shared.prepared[self.stream.name] = Prepared(of, x, mean)
        return ready

    def decoded(self, read: Callable[[Encoded], Tensor] = Encoded.decoded) -> Tensor:
        """What attention reads, [B,H,T,D] in the dtype that came; keys still before RoPE.

        An exact stream returns the very tensor that was appended. Do not write into the result:
        arms share it.
        """
        middle = None if self.middle is None else read(self.middle)
        if middle is not None and self.hidden:
            middle = middle[:, :, self.hidden :]
        parts = [part for part in (self.head, middle, self.tail) if part is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def since(self, first: int, shared: dict[Hashable, Encoded]) -> StoredStream:
        """Without the tokens before position `first`, not beyond `end`. What several streams share
        is cut once, by `shared`, which starts empty for them."""
        gone, head = first - self.first, self.head
        if gone <= 0:
            return self
        exact = head.shape[2] if head is not None else 0
        if head is not None and (self.middle is None or gone < exact):
            return replace(self, first=first, head=_some(head[:, :, gone:]))
        middle, unseen = self.middle, gone - exact + self.hidden
        assert middle is not None and first <= self.end
        if unseen >= middle.packed.tokens:  # all that is seen is in the tail, now and from now on
            tail = None if self.tail is None else self.tail[:, :, unseen - middle.packed.tokens :]
            return replace(self, first=first, hidden=0, head=tail, middle=None, tail=None)
        group = 1 if self.stream.role == "value" else key_group(middle.codec)
        whole = unseen // group * group if middle.can_be_cut else 0
        if whole:
            key = (middle, whole)
            if key not in shared:
                shared[key] = middle.without(whole)
            middle = shared[key]
        return replace(self, first=first, hidden=unseen - whole, head=None, middle=middle)

    def moved(self, move: Move, shared: dict[Encoded, Encoded]) -> StoredStream:
        """Every tensor put elsewhere by `move`, nothing decoded. What several streams share is
        moved once, by `shared`, which starts empty for them."""
        head, tail = (None if part is None else move(part) for part in (self.head, self.tail))
        middle = self.middle
        if middle is not None:
            if middle not in shared:
                shared[middle] = middle.moved(move)
            middle = shared[middle]
        return replace(self, head=head, middle=middle, tail=tail)

    @staticmethod
    def joined(
        streams: Sequence[StoredStream], shared: dict[Encoded, Encoded | None]
    ) -> StoredStream | None:
        """Streams of an arm, of sequences of other lengths each, as one batch padded to the
        longest; None where exact tokens end them, which would not be in place, where they begin
        with unlike numbers of exact or hidden tokens, or where the packed form is a codec's own.
        `shared` as in `moved`, by the first of what is joined. To the batch nothing can be
        appended, and its `first` is that of its first."""
        first = streams[0]
        if len(streams) == 1:
            return first
        if any(stream.tail is not None for stream in streams):
            return None
        middles = [stream.middle for stream in streams if stream.middle is not None]
        heads = [stream.head for stream in streams if stream.head is not None]
        if not middles:
            return replace(first, head=pad_tokens(heads))
        starts = {(s.hidden, 0 if s.head is None else s.head.shape[2]) for s in streams}
        if len(middles) < len(streams) or len(starts) > 1:  # some may have nothing but the sink
            return None
        if middles[0] not in shared:
            shared[middles[0]] = middles[0].joined(middles[1:])
        middle = shared[middles[0]]
        head = torch.cat(heads) if heads else None
        return None if middle is None else replace(first, head=head, middle=middle)

    @property
    def tokens(self) -> int:
        """How many are seen."""
        exact = sum(part.shape[2] for part in self._exact)
        return exact + (self.middle.packed.tokens - self.hidden if self.middle else 0)

    @property
    def end(self) -> int:
        """Position of the token that comes next."""
        return self.first + self.tokens

    @property
    def elements(self) -> int:
        """Numbers that the uncompressed stream has: batch x heads x tokens x dim."""
        exact = sum(part.numel() for part in self._exact)
        if self.middle is None:
            return exact
        packed = self.middle.packed
        return exact + packed.elements // packed.tokens * (packed.tokens - self.hidden)

    @property
    def nbits(self) -> float:
        """Measured size: the codec's bytes of the middle, 16 bits per exact element. NaN where
        somebody's own codec does not say."""
        exact = sum(part.numel() for part in self._exact)
        packed = self.middle.nbytes(self.hidden) if self.middle else 0
        return exact * EXACT_ELEMENT_BITS + 8 * packed

    @property
    def held_bytes(self) -> int:
        """Bytes of its tensors."""
        exact = sum(part.nbytes for part in self._exact)
        return exact + (self.middle.packed.held_bytes if self.middle else 0)

    @property
    def _exact(self) -> list[Tensor]:
        return [part for part in (self.head, self.tail) if part is not None]


def _after(before: Tensor | None, x_BHTD: Tensor) -> Tensor:
    return x_BHTD if before is None else torch.cat((before, x_BHTD), dim=2)


def _some(x_BHTD: Tensor) -> Tensor | None:
    """None where there are no tokens."""
    return x_BHTD if x_BHTD.shape[2] else None

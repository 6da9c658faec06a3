"""One stream of one layer as an arm keeps it: exact tokens around a packed middle.

tokens   first ..... sink ................... T - window ......... T
         |  head      |  middle, by the codec  |  tail             |

Numbers are positions in the text. Tokens are appended in any number of pieces, and each is encoded
once, when it leaves the arm's window, perhaps with a block of others. Until one does, all of them
are the head. `first` is 0 where a layer can look at all tokens; otherwise it moves on, and with it
goes a sink that nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layersweep.kv.arms import EXACT, Arm
from layersweep.kv.codec import (
    Codec,
    basis_for,
    finds_sinks,
    grouping,
    pad_tokens,
    role_bits,
)
from layersweep.kv.encoded import Encoded
from layersweep.kv.means import mean_for, mean_kind
from layersweep.kv.methods import EXACT_BITS
from layersweep.kv.shared import Prepared, Shared
from layersweep.kv.sinks import FLAGS, Found, Move
from layersweep.kv.stream import Stream

# Exact tokens are counted as fp16 storage, whatever dtype the computation runs in.
EXACT_ELEMENT_BITS = 16


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
    arm: Arm = EXACT
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
        protected or its window too short for blocks, or has 16 bits for it (except where the
        transforms themselves are the arm)."""
        arm = arm.in_layer(layer, num_layers)
        codec = None if arm.keeps_window(stream.window) else arm.codec
        if codec and arm.method != "identity" and role_bits(codec, stream) == EXACT_BITS:
            codec = None
        return cls(stream, codec, arm, mean_tokens, first)

    def appended(
        self, x_BHTD: Tensor, shared: Shared | None = None, keys: StoredStream | None = None
    ) -> StoredStream:
        """With these tokens after those before, keys before RoPE. What another arm has encoded
        alike is found in `shared`. `keys`: with these tokens, for a stream that is predicted from
        them. Raises InputError for a stream that the codec cannot take."""
        end, head = self.end + x_BHTD.shape[2], self.head
        if self.middle is None:
            exact, kept = _after(head, x_BHTD), max(self.arm.sink - self.first, 0)
            head, waiting = _some(exact[:, :, :kept]), exact[:, :, kept:]
        else:
            exact, waiting = None, _after(self.tail, x_BHTD)
        leaving = max(self.arm.coded_until(end) - (end - waiting.shape[2]), 0)
        if exact is not None and (self.codec is None or not leaving):
            return replace(self, head=exact)
        middle = self.middle
        if leaving:
            told = keys if self.stream.prediction else None
            middle = self._encoded(waiting[:, :, :leaving], head, shared or Shared(), told)
        return replace(self, head=head, middle=middle, tail=_some(waiting[:, :, leaving:]))

    def _encoded(
        self, x_BHTD: Tensor, head: Tensor | None, shared: Shared, keys: StoredStream | None
    ) -> Encoded:
        """The middle with these tokens after it, and `head` before it."""
        assert self.codec is not None
        codec, stream, before = self.codec, self.stream, self.middle
        begin = max(self.first, self.arm.sink) - self.hidden
        start = begin + (before.packed.tokens if before else 0)
        stop = start + x_BHTD.shape[2]
        key = (codec.sharing_key(stream), stream.name, before, start, stop, keys and keys.middle)
        if key not in shared.encoded:
            positions = shared.positions(len(x_BHTD), begin, stop, x_BHTD.device)
            shared.encoded[key] = self._coded(x_BHTD, head, positions, start, shared, keys)
        if not self.arm.fine:
            return shared.encoded[key]
        fine = (*key, self.arm.fine)
        if fine not in shared.encoded:
            own = shared.positions(len(x_BHTD), start, stop, x_BHTD.device)
            exact = self._prepared(x_BHTD, head, own, start, shared, keys).exact
            assert exact is not None
            shared.encoded[fine] = shared.encoded[key].refined(
                exact, self.arm, stream, before.fine if before else None, self.mean_tokens
            )
        return shared.encoded[fine]

    def _coded(
        self, x_BHTD: Tensor, head: Tensor | None, positions: Tensor, start: int, shared: Shared,
        keys: StoredStream | None,
    ) -> Encoded:  # fmt: skip
        """`_encoded` without what is fine. `positions`: of the middle and of these tokens, the
        first of which is at `start`."""
        assert self.codec is not None
        codec, stream, before = self.codec, self.stream, self.middle
        already = before.packed.tokens if before else 0
        own = positions[:, already:]
        ready = self._prepared(x_BHTD, head, own, start, shared, keys)
        x, found = ready.x, ready.found
        if before is None:
            packed = codec.encode(x, stream, own, ready.mean)
        else:
            packed = codec.append(before.packed, x, own)
            if found and before.found:
                found = before.found.followed(already, found, x.shape[2])
        coordinates = basis_for(codec, stream), stream.rotation
        return Encoded(codec, packed, positions, *coordinates, x_BHTD.dtype, found)

    def _first_token(
        self, head: Tensor | None, like: Tensor, shared: Shared, keys: StoredStream | None
    ) -> Tensor:
        """The text's first token in the codec's coordinates, float16 [B,H,1,D]; zero where it is
        coded itself, or has left the layer's window."""
        if head is None or self.first:
            return like.new_zeros(*like.shape[:2], 1, like.shape[3], dtype=torch.float16)
        at = shared.positions(len(head), 0, 1, head.device)
        told = None if keys is None or keys.head is None else keys.head[:, :, :1]
        return self._entered(head[:, :, :1], at, told).to(torch.float16).contiguous()

    def _entered(self, x_BHTD: Tensor, positions: Tensor, keys_BHTD: Tensor | None) -> Tensor:
        """In the codec's coordinates, less what these keys say of it."""
        assert self.codec is not None
        basis, rotation = basis_for(self.codec, self.stream), self.stream.rotation
        x = rotation.undo(x_BHTD.float(), positions) if rotation else x_BHTD
        if self.stream.prediction and keys_BHTD is not None:
            x = self.stream.prediction.left(x, keys_BHTD)
        return basis.enter(x) if basis else x

    def _prepared(
        self, x_BHTD: Tensor, head: Tensor | None, positions: Tensor, start: int, shared: Shared,
        keys: StoredStream | None,
    ) -> Prepared:  # fmt: skip
        assert self.codec is not None
        codec, before = self.codec, self.middle
        tokens, told = x_BHTD.shape[2], keys and (keys.stream, keys.middle)
        kind = (*mean_kind(codec), finds_sinks(codec), self.arm.fine > 0)
        of = (start, tokens, before, basis_for(codec, self.stream), told, *kind)
        ready = shared.prepared.get(self.stream.name)
        if ready is None or ready.of != of:
            said = keys.newest(start, tokens, shared) if keys else None
            x = self._entered(x_BHTD, positions, said)
            mean = None if before else mean_for(codec, x[:, :, : self.mean_tokens])
            exact, found = x if self.arm.fine else None, None
            if finds_sinks(codec):
                around = before.packed.mean if before else mean
                assert around is not None
                found = before.found if before else None
                center = found.center if found else self._first_token(head, x, shared, keys)
                found = Found.of(x, center, around)
                x = x.to(torch.float32, copy=x is x_BHTD or x is exact)
                x = found.shift(x, around, 1)
            ready = shared.prepared[self.stream.name] = Prepared(of, x, mean, found, exact)
        return ready

    def newest(self, start: int, tokens: int, shared: Shared) -> Tensor:
        """What stays of the newest coded tokens, which begin at `start`; exact where all are."""
        if self.middle is None:
            assert self.head is not None
            return self.head[:, :, start - self.first :][:, :, :tokens]
        return shared.coarse_of(self.middle, self.middle.packed.tokens - tokens)

    def pieces(
        self,
        read: Callable[[Encoded], Tensor] = Encoded.decoded,
        keys: tuple[StoredStream, Sequence[Tensor]] | None = None,
    ) -> list[Tensor]:
        """What attention reads, [B,H,T,D] each in the dtype that came, one after the other; keys
        still before RoPE. `keys`, and what attention reads of them, for a stream that is predicted
        from them.

        Exact tokens are the very tensors that were appended. Do not write into the result: arms
        share it.
        """
        middle = None
        if self.middle is not None and keys and self.stream.prediction:
            told = self._told(*keys, self.middle.packed.tokens - self.hidden)
            middle = self.middle.decoded(self.stream.prediction.values(told))
        elif self.middle is not None:
            middle = read(self.middle)
            middle = middle[:, :, self.hidden :] if self.hidden else middle
        return [part for part in (self.head, middle, self.tail) if part is not None]

    def decoded(self) -> Tensor:
        """`pieces` as one."""
        return joined_pieces(self.pieces())

    def _told(self, keys: StoredStream, pieces: Sequence[Tensor], tokens: int) -> Tensor:
        """Keys of the middle as it was predicted from them: without what is fine."""
        if keys.middle is None:
            exact = 0 if self.head is None else self.head.shape[2]
            return pieces[0][:, :, exact : exact + tokens]
        if keys.middle.fine:
            return keys.middle.coarse(keys.hidden)
        return pieces[keys.head is not None]

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
        group = grouping(middle.codec, self.stream.role).group
        group = max(group, FLAGS) if middle.found else group
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


def joined_pieces(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=2)


def _after(before: Tensor | None, x_BHTD: Tensor) -> Tensor:
    return x_BHTD if before is None else torch.cat((before, x_BHTD), dim=2)


def _some(x_BHTD: Tensor) -> Tensor | None:
    """None where there are no tokens."""
    return x_BHTD if x_BHTD.shape[2] else None

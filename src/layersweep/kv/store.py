"""What a layer keeps of some sequences under several arms, and where that waits between visits.

An evaluation makes a KvStore per layer and drops it as it leaves the layer. Generation keeps them,
moved to where they wait. A transformers cache appends to one as it grows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from layersweep.kv.arms import Arm
from layersweep.kv.encoded import Encoded
from layersweep.kv.shared import Shared
from layersweep.kv.sinks import Move
from layersweep.kv.stored import StoredStream, joined_pieces
from layersweep.kv.stream import Stream

ALIGNMENT = 64

Streams = tuple[StoredStream, ...]  # of a layer under one arm: keys and values, or a latent


class KvStore:
    """The streams of one layer under each arm; all arms hold the same tokens.

    What several arms encode alike is encoded, decoded, moved and joined once: K3V2 and K4V2 share
    their values.
    """

    def __init__(
        self, arms: Iterable[Streams], decoded: Mapping[Encoded, Tensor] = MappingProxyType({})
    ) -> None:
        self.arms: list[Streams] = list(arms)
        held = Counter(stream.middle for streams in self.arms for stream in streams)
        self._shared = {middle for middle, count in held.items() if count > 1}
        self._decoded = dict(decoded)

    @classmethod
    def empty(
        cls,
        arms: Iterable[tuple[Arm, Sequence[Stream]]],
        layer: int,
        num_layers: int,
        mean_tokens: int | None = None,
        first: int = 0,
    ) -> KvStore:
        """Each arm with the streams of the layer as its codec wants them; see StoredStream. What
        is appended starts at position `first` of the text: a layer with a window needs no more
        than Stream.first_held."""
        return cls(
            tuple(
                StoredStream.empty(arm, own, layer, num_layers, mean_tokens, first)
                for own in streams
            )
            for arm, streams in arms
        )

    def appended(self, tensors: Sequence[Tensor]) -> KvStore:
        """With more tokens in every arm: a tensor [B,H,T,D] per stream, keys before RoPE. Raises
        InputError for a stream that a codec cannot take."""
        shared, arms = Shared(), []
        for streams in self.arms:
            found: list[StoredStream] = []
            for own, x in zip(streams, tensors, strict=True):
                found.append(own.appended(x, shared, found[0] if found else None))
            arms.append(tuple(found))
        return KvStore(arms, shared.read())

    def since(self, first: int) -> KvStore:
        """Without the tokens before position `first`, at which nobody looks any more. They are
        neither decoded nor counted; a codec that encodes keys in groups holds them until their
        group is out of sight, and one's own codec that cannot be sliced holds them all."""
        shared: dict[Hashable, Encoded] = {}
        return KvStore(
            tuple(stream.since(first, shared) for stream in streams) for streams in self.arms
        )

    def decoded(self, arm: int) -> tuple[Tensor, ...]:
        """What the arm's attention reads, a tensor per stream. Do not write into them: what arms
        share stays as long as this store."""
        return tuple(map(joined_pieces, self._read_pieces(arm)))

    def pieces(self, arm: int) -> list[tuple[Tensor, ...]]:
        """The same in one or several parts, one after the other: nothing is copied to join them."""
        every = self._read_pieces(arm)
        lengths = {tuple(piece.shape[2] for piece in pieces) for pieces in every}
        if len(lengths) > 1:
            return [tuple(map(joined_pieces, every))]
        return list(zip(*every, strict=True))

    def _read_pieces(self, arm: int) -> list[list[Tensor]]:
        first, *others = self.arms[arm]
        keys = first.pieces(self._read)
        return [keys, *(stream.pieces(self._read, (first, keys)) for stream in others)]

    def _read(self, encoded: Encoded) -> Tensor:
        if encoded in self._decoded:
            return self._decoded[encoded]
        x = encoded.decoded()
        if encoded in self._shared:
            self._decoded[encoded] = x
        return x

    def moved(self, move: Move, arms: slice = slice(None)) -> KvStore:
        """Some arms, every tensor put elsewhere by `move`; nothing decoded goes with them."""
        moved: dict[Encoded, Encoded] = {}
        return KvStore(
            tuple(stream.moved(move, moved) for stream in streams) for streams in self.arms[arms]
        )

    @staticmethod
    def joined(stores: Sequence[KvStore]) -> KvStore | None:
        """The sequences of all stores as one batch; None where a stream cannot be joined."""
        joined: dict[Encoded, Encoded | None] = {}
        arms: list[Streams] = []
        for of_arm in zip(*(store.arms for store in stores), strict=True):
            found = [StoredStream.joined(of, joined) for of in zip(*of_arm, strict=True)]
            streams = tuple(stream for stream in found if stream is not None)
            if len(streams) < len(found):
                return None
            arms.append(streams)
        return KvStore(arms)

    @property
    def tokens(self) -> int:
        """How many are held for a reader."""
        return self.arms[0][0].tokens

    @property
    def end(self) -> int:
        """Position of the token that comes next."""
        return self.arms[0][0].end

    def nbits(self, arm: int) -> float:
        """Measured size under an arm, see StoredStream."""
        return sum(stream.nbits for stream in self.arms[arm])

    def elements(self, arm: int) -> int:
        """Numbers that its uncompressed streams have."""
        return sum(stream.elements for stream in self.arms[arm])


class Waiting:
    """Where what is kept waits between visits: on its device, or in host memory.

    `host` uint8 [N], whatever it holds, pinned for a GPU if it can be; None leaves all on the
    device. What does not fit any more is pageable. `moved_bytes`: what has gone to a device.
    """

    def __init__(self, host: Tensor | None = None) -> None:
        self.moved_bytes = 0
        self._host, self._used = host, 0

    def zeros(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory that is kept, of the kind of `like`."""
        if self._host is None:
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self._take(torch.Size(shape), like.dtype).zero_()

    def put(self, x: Tensor) -> Tensor:
        """A tensor that nobody else has, where it is kept. The host does not wait for a device, and
        must not look: what is read of it later follows on the same stream."""
        if self._host is None:
            return x
        return self._take(x.shape, x.dtype).copy_(x, non_blocking=True)

    def on(self, device: torch.device, x: Tensor) -> Tensor:
        """What is kept, where it is computed with."""
        if x.device != device:
            self.moved_bytes += x.nbytes
        return x.to(device, non_blocking=True)

    def _take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Some of `host`; memory of its own where that is full."""
        assert self._host is not None
        start = self._used
        stop = start + shape.numel() * dtype.itemsize
        if stop > self._host.numel():
            return torch.empty(shape, dtype=dtype)
        self._used = -(-stop // ALIGNMENT) * ALIGNMENT
        return self._host[start:stop].view(dtype).view(shape)

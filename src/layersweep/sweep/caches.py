"""Keys and values that generation keeps between sweeps.

A tile's are kept together, layer by layer, and laid out in the columns that its next tokens attend
to; prefixes as their arms store them, what follows exactly:

    columns:  [ prefix, padded | question, padded | tokens generated so far ]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from layersweep.errors import Fallback
from layersweep.kv.cache import CachedStream, Joined, Moved
from layersweep.stream.pinned import HostBuffer
from layersweep.sweep.sequences import Group, Tile
from layersweep.sweep.state import kept_columns
from layersweep.units import format_bytes

Pair = tuple[Tensor, Tensor]  # keys, values
Streams = tuple[CachedStream, CachedStream]
ALIGNMENT = 64


def cache_memory(
    nbytes: int, *, pin: bool = False, say: Callable[[Fallback], None] = lambda fallback: None
) -> HostBuffer:
    """Host memory where caches wait, pinned for a GPU if it can be. Close it."""
    memory = HostBuffer(nbytes)
    if pin:
        memory.touch()
        if not memory.pin():
            why = "the system pins no more; copies take about 5 times as long"
            wanted = f"{format_bytes(nbytes)} pinned"
            say(Fallback("kept caches", wanted, "pageable memory", why))
    return memory


class KeptCaches:
    """Caches of the tiles that are generated together, up to `new_tokens` tokens of each branch.

    `memory`: they wait there, and visit the device with their layer; None leaves them on it. What
    does not fit any more is pageable. `moved_bytes`: what has gone to a device for that.
    """

    def __init__(self, new_tokens: int, memory: HostBuffer | None = None) -> None:
        self.new_tokens, self.moved_bytes = new_tokens, 0
        self._tiles: dict[int, KeptTile] = {}
        self._layers: dict[tuple[int, int], KeptLayer] = {}
        self._memory, self._used = memory, 0

    def tile(self, tile: Tile) -> KeptTile:
        """Lengths of a tile's caches, those of its first sweep."""
        if tile.first not in self._tiles:
            self._tiles[tile.first] = KeptTile.of(tile, self.new_tokens)
        return self._tiles[tile.first]

    def layer(self, tile: Tile, layer: int) -> KeptLayer:
        """What is kept of a tile in one layer."""
        at = tile.first, layer
        if at not in self._layers:
            self._layers[at] = KeptLayer(self.tile(tile), self)
        return self._layers[at]

    def zeros(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory that is kept, of the kind of `like`."""
        if not self._memory:
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self._take(torch.Size(shape), like.dtype).zero_()

    def put(self, x: Tensor) -> Tensor:
        """A tensor that nobody else has, where it is kept. The host does not wait for a device, and
        must not look: what is read of it later follows on the same stream."""
        if not self._memory:
            return x
        return self._take(x.shape, x.dtype).copy_(x, non_blocking=True)

    def on(self, device: torch.device, x: Tensor) -> Tensor:
        """What is kept, where it is computed with."""
        if x.device != device:
            self.moved_bytes += x.nbytes
        return x.to(device, non_blocking=True)

    def _take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Some of `memory`, whatever it holds; memory of its own where that is full."""
        assert self._memory is not None
        start = self._used
        stop = start + shape.numel() * dtype.itemsize
        if stop > self._memory.bytes.numel():
            return torch.empty(shape, dtype=dtype)
        self._used = -(-stop // ALIGNMENT) * ALIGNMENT
        return self._memory.bytes[start:stop].view(dtype).view(shape)


@dataclass
class KeptTile:
    """Tokens of each sequence's prefix and question, and what follows from them."""

    arms: int
    prefixes: list[int]
    questions: list[int]
    new_tokens: int
    _now: tuple[int, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, tile: Tile, new_tokens: int) -> KeptTile:
        """Of a tile in its first sweep. All branches of a sequence are equally long."""
        questions = [len(sequence.branches[0].ids) for sequence in tile.sequences]
        prefixes = [len(sequence.prefix) for sequence in tile.sequences]
        return cls(len(tile.sequences[0].branches), prefixes, questions, new_tokens)

    @property
    def prefix(self) -> int:
        """Columns of the prefixes."""
        return max(self.prefixes)

    @property
    def question(self) -> int:
        """Columns of the questions, with those that are added so that all of them together are
        aligned."""
        return self.columns - self.prefix - self.new_tokens

    @property
    def columns(self) -> int:
        return kept_columns(self.prefix, max(self.questions), self.new_tokens)

    def step_of(self, tile: Tile) -> int:
        """How many tokens have been generated before those that ride now."""
        return tile.sequences[0].past - self.prefixes[0] - self.questions[0]

    def at(self, step: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of the token of `step`, its position [B] and what is added to its scores [B, columns]:
        -inf where a column has no token of the sequence, or none yet."""
        if self._now is None or self._now[0] != step or self._now[1].device != like.device:
            prefix, question, new = (
                torch.arange(count) for count in (self.prefix, self.question, self.new_tokens)
            )
            pairs = list(zip(self.prefixes, self.questions, strict=True))
            seen = torch.stack(
                [torch.cat((prefix < before, question < own, new <= step)) for before, own in pairs]
            )
            bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
            position = torch.tensor([before + own + step for before, own in pairs])
            self._now = step, position.to(like.device), bias.to(like.device, like.dtype)
        return self._now[1:]


@dataclass(frozen=True)
class Part:
    """The prefixes of some sequences of a tile, padded to `length`, of each arm; no streams where
    they are empty."""

    rows: slice
    length: int
    streams: list[Streams]


@dataclass
class KeptLayer:
    """One layer of a tile, whose sequences B have a branch for each arm A.

    parts       sequences whose prefixes are decoded together, each with the streams of all arms
    question    [2, A, B, G, columns, D] keys AFTER RoPE, and values
    generated   [new tokens, 2, A, B, G, D] likewise
    """

    shape: KeptTile
    memory: KeptCaches
    parts: list[Part] = field(default_factory=list)
    waiting: list[Part] = field(default_factory=list)
    question: Tensor = field(default_factory=lambda: torch.empty(0))
    generated: Tensor = field(default_factory=lambda: torch.empty(0))

    def keep(
        self, group: Group, prefix: Sequence[Streams], own: Sequence[Pair], at_once: int
    ) -> None:
        """A group's prefix (none where that is empty) and own tokens, of each arm. Copies them.

        The groups of a tile come in order; those that are `at_once` sequences together are joined.
        """
        if not self.parts and not self.waiting:
            keys, shape = own[0][0], self.shape
            sizes, dim = (2, shape.arms, len(shape.prefixes), keys.shape[1]), keys.shape[3]
            self.question = keys.new_zeros(*sizes, shape.question, dim)
            self.generated = self.memory.zeros((shape.new_tokens, *sizes, dim), keys)
        rows = slice(group.first, group.first + len(group.sequences))
        if self.waiting and rows.stop - self.waiting[0].rows.start > at_once:
            self._put_away()
        length = len(group.sequences[0].prefix)
        self.waiting.append(Part(rows, length, _moved(prefix, torch.clone)))
        for arm, pair in enumerate(own):
            for kept, x in zip(self.question, pair, strict=True):
                kept[arm, rows, :, : x.shape[2]] = x
        if rows.stop == len(self.shape.prefixes):  # the last group
            self._put_away()
            self.question = self.memory.put(self.question)

    def _put_away(self) -> None:
        """What waits, as one part if that can be."""
        together = _joined(self.waiting)
        for part in [together] if together else self.waiting:
            self.parts.append(replace(part, streams=_moved(part.streams, self.memory.put)))
        self.waiting.clear()

    def extend(self, step: int, keys_AGBD: Tensor, values_AGBD: Tensor) -> None:
        """Keys (after RoPE) and values of the token of `step`; see KeptCaches.put."""
        new = torch.stack((keys_AGBD.transpose(1, 2), values_AGBD.transpose(1, 2)))
        self.generated[step].copy_(new, non_blocking=True)

    def prefix_on(self, device: torch.device, part: Part, arms: slice) -> list[Streams]:
        """Streams of a part there, not decoded. Other objects even on the same device: what they
        decode must not stay with what is kept."""
        return _moved(part.streams[arms], partial(self.memory.on, device))

    def exact_on(self, device: torch.device) -> Pair:
        """`question` and `generated` there."""
        return self.memory.on(device, self.question), self.memory.on(device, self.generated)


def _joined(parts: Sequence[Part]) -> Part | None:
    """Consecutive parts as one; None where the streams of an arm cannot be."""
    joined: Joined = {}
    streams: list[Streams] = []
    if not all(part.streams for part in parts):
        return None
    for of_arm in zip(*(part.streams for part in parts), strict=True):
        keys, values = (CachedStream.joined(of, joined) for of in zip(*of_arm, strict=True))
        if keys is None or values is None:
            return None
        streams.append((keys, values))
    rows = slice(parts[0].rows.start, parts[-1].rows.stop)
    return Part(rows, max(part.length for part in parts), streams)


def _moved(streams: Sequence[Streams], move: Callable[[Tensor], Tensor]) -> list[Streams]:
    """Streams of several arms elsewhere; what they share is moved once, and decoded once."""
    moved: Moved = {}
    return [(keys.moved(move, moved), values.moved(move, moved)) for keys, values in streams]

"""Keys and values that generation keeps between sweeps.

A tile's are kept together, layer by layer, and laid out in the columns that its next tokens attend
to; prefixes as their arms store them, what follows exactly:

    columns:  [ prefix, padded | question, padded | tokens generated so far ]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from layersweep.errors import Fallback
from layersweep.kv.store import KvStore, Waiting
from layersweep.kv.stream import first_held
from layersweep.stream.pinned import HostBuffer
from layersweep.sweep.sequences import Group, Tile
from layersweep.sweep.state import kept_columns
from layersweep.units import format_bytes

Pair = tuple[Tensor, ...]  # keys, values


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

    `memory`: they wait there, and visit the device with their layer; None leaves them on it.
    """

    def __init__(self, new_tokens: int, memory: HostBuffer | None = None) -> None:
        self.new_tokens = new_tokens
        self.waiting = Waiting(None if memory is None else memory.bytes)
        self._tiles: dict[int, KeptTile] = {}
        self._layers: dict[tuple[int, int], KeptLayer] = {}

    @property
    def moved_bytes(self) -> int:
        """What has gone to a device for its visits."""
        return self.waiting.moved_bytes

    def tile(self, tile: Tile) -> KeptTile:
        """Lengths of a tile's caches, those of its first sweep."""
        if tile.first not in self._tiles:
            self._tiles[tile.first] = KeptTile.of(tile, self.new_tokens)
        return self._tiles[tile.first]

    def layer(self, tile: Tile, layer: int) -> KeptLayer:
        """What is kept of a tile in one layer."""
        at = tile.first, layer
        if at not in self._layers:
            self._layers[at] = KeptLayer(self.tile(tile), self.waiting)
        return self._layers[at]


@dataclass
class KeptTile:
    """Tokens of each sequence's prefix and question, and what follows from them."""

    arms: int
    prefixes: list[int]
    questions: list[int]
    new_tokens: int
    _step: int = -1
    _now: dict[tuple[int | None, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)

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

    @property
    def longest(self) -> int:
        """Tokens that its longest sequence can reach."""
        ends = (sum(pair) for pair in zip(self.prefixes, self.questions, strict=True))
        return max(ends) + self.new_tokens

    def step_of(self, tile: Tile) -> int:
        """How many tokens have been generated before those that ride now."""
        return tile.sequences[0].past - self.prefixes[0] - self.questions[0]

    def at(self, step: int, window: int | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of the token of `step`, its position [B] and what is added to its scores [B, columns]:
        -inf where a column has no token of the sequence, none yet, or one behind the window."""
        if step != self._step:
            self._step, self._now = step, {}
        key = window, like.device
        if key not in self._now:
            pairs = list(zip(self.prefixes, self.questions, strict=True))
            seen = torch.stack([self._seen(*pair, step, window) for pair in pairs])
            bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
            position = torch.tensor([before + own + step for before, own in pairs])
            self._now[key] = position.to(like.device), bias.to(like.device, like.dtype)
        return self._now[key]

    def _seen(self, before: int, own: int, step: int, window: int | None) -> Tensor:
        """[columns] True where the token of `step` looks."""
        first = first_held(before, window)
        prefix, question, new = (
            torch.arange(count) for count in (self.prefix, self.question, self.new_tokens)
        )
        there = torch.cat((prefix < before - first, question < own, new <= step))
        if window is None:
            return there
        position = torch.cat((first + prefix, before + question, before + own + new))
        return there & (position > before + own + step - window)


@dataclass(frozen=True)
class Prefixes:
    """What is kept of the prefixes of consecutive sequences of a tile: `length` tokens, padded,
    from position `first` on; no store where there are none."""

    rows: slice
    first: int
    length: int
    store: KvStore | None

    @staticmethod
    def joined(parts: Sequence[Prefixes]) -> Prefixes | None:
        """All of them as one; None where an arm's streams cannot be."""
        stores = [part.store for part in parts if part.store is not None]
        store = KvStore.joined(stores) if len(stores) == len(parts) else None
        if store is None:
            return None
        rows = slice(parts[0].rows.start, parts[-1].rows.stop)
        return Prefixes(rows, parts[0].first, max(part.length for part in parts), store)

    def moved(self, move: Callable[[Tensor], Tensor], arms: slice = slice(None)) -> Prefixes:
        """Those of some arms elsewhere, nothing decoded."""
        return replace(self, store=self.store and self.store.moved(move, arms))


@dataclass
class KeptLayer:
    """One layer of a tile, whose sequences B have a branch for each arm A.

    prefixes    of sequences that are decoded together, under all arms
    question    [A, B, G, columns, D] keys AFTER RoPE, and values
    generated   [new tokens, A, B, G, D] likewise
    """

    shape: KeptTile
    waiting: Waiting
    prefixes: list[Prefixes] = field(default_factory=list)
    arriving: list[Prefixes] = field(default_factory=list)
    question: list[Tensor] = field(default_factory=list)
    generated: list[Tensor] = field(default_factory=list)

    def keep(
        self, group: Group, first: int, prefix: KvStore | None, own: Sequence[Pair], at_once: int
    ) -> None:
        """A group's prefix from position `first` on (None where that is empty) and own tokens, of
        each arm. Copies them.

        The groups of a tile come in order; those that are `at_once` sequences together are joined.
        """
        shape = self.shape
        if not self.question:
            for x in own[0]:
                sizes, dim = (shape.arms, len(shape.prefixes), x.shape[1]), x.shape[3]
                self.question.append(x.new_zeros(*sizes, shape.question, dim))
                self.generated.append(self.waiting.zeros((shape.new_tokens, *sizes, dim), x))
        rows = slice(group.first, group.first + len(group.sequences))
        if self.arriving and (
            rows.stop - self.arriving[0].rows.start > at_once or self.arriving[0].first != first
        ):
            self._put_away()
        length = len(group.sequences[0].prefix) - first
        self.arriving.append(Prefixes(rows, first, length, prefix).moved(torch.clone))
        for arm, pair in enumerate(own):
            for kept, x in zip(self.question, pair, strict=True):
                kept[arm, rows, :, : x.shape[2]] = x
        if rows.stop == len(shape.prefixes):  # the last group
            self._put_away()
            self.question = [self.waiting.put(kept) for kept in self.question]

    def _put_away(self) -> None:
        """What has arrived, joined if that can be."""
        together = Prefixes.joined(self.arriving)
        for prefixes in [together] if together else self.arriving:
            self.prefixes.append(prefixes.moved(self.waiting.put))
        self.arriving.clear()

    def extend(self, step: int, keys_AGBD: Tensor, values_AGBD: Tensor) -> None:
        """Keys (after RoPE) and values of the token of `step`; see Waiting.put."""
        for kept, x in zip(self.generated, (keys_AGBD, values_AGBD), strict=True):
            kept[step].copy_(x.transpose(1, 2), non_blocking=True)

    def prefixes_on(self, device: torch.device, arms: slice) -> Iterator[Prefixes]:
        """Prefixes there, not decoded, one at a time; what they decode does not stay with what is
        kept."""
        move = partial(self.waiting.on, device)
        return (prefixes.moved(move, arms) for prefixes in self.prefixes)

    def exact_on(self, device: torch.device) -> list[Pair]:
        """(`question`, `generated`) of keys and of values there."""
        both = zip(self.question, self.generated, strict=True)
        return [(self.waiting.on(device, a), self.waiting.on(device, b)) for a, b in both]

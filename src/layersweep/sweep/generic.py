"""The sweep where transformers' own layers compute: the same loop, around forward passes that halt.

    embed  ->  for each layer: every tile up to its experts -> for each expert: all tiles  ->  head

See sweep/loop.py for what a sweep is, model/generic/walk.py for what halts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from layersweep.families.generic.alike import gate_of
from layersweep.families.spec import Decoder
from layersweep.model.compute import Compute
from layersweep.model.generic.decoder import Modules
from layersweep.model.generic.turning import Turners
from layersweep.model.generic.walk import AtExperts, AtLayer
from layersweep.model.routing import Routing
from layersweep.stream.generic_shapes import HEAD_ROWS
from layersweep.stream.shapes import experts_at_once, positions_at_once
from layersweep.stream.store import BlockStore
from layersweep.sweep.clock import PhaseClock
from layersweep.sweep.dense import Views
from layersweep.sweep.engine import Engine
from layersweep.sweep.feed import groups_of
from layersweep.sweep.generic_experts import ExpertsVisit, joined
from layersweep.sweep.generic_walking import Walking
from layersweep.sweep.record import (
    LayerCheck,
    LayerHealth,
    LogitsReader,
    Piece,
    Progress,
    SweepRecord,
)
from layersweep.sweep.sequences import Tile
from layersweep.sweep.shapes import check_length
from layersweep.sweep.state import Rows, pieces_of, read_rows


class GenericEngine(Engine):
    """An engine whose layers are transformers'."""

    def __init__(
        self, decoder: Decoder, store: BlockStore, compute: Compute, scratch_bytes: int
    ) -> None:
        super().__init__(decoder, store, compute, scratch_bytes)
        assert decoder.generic is not None
        self.modules = Modules(decoder.generic, decoder.num_hidden_layers, compute)
        self.turners = Turners(compute.device)

    def walking(self, tile: Tile, record: SweepRecord, leave: ExitStack) -> Walking:
        """A tile before its embedding; it is closed with `leave`."""
        return Walking(
            self.decoder, self.modules, self.compute, self.scratch, tile, record.cache_bits,
            self.turners, leave,
        )  # fmt: skip


def run_modules(
    engine: GenericEngine,
    tiles: list[Tile],
    read_logits: LogitsReader,
    lead: Tile | None,
    check: LayerCheck | None,
    progress: Progress,
) -> SweepRecord:
    """See sweep/loop.run_sweep."""
    record = SweepRecord()
    for tile in tiles:
        longest = max(sequence.longest for sequence in tile.sequences)
        check_length(engine.decoder, longest, "shorter sequences")
    with (
        torch.inference_mode(),
        engine.compute.numerics(),
        engine.visited(),
        ExitStack() as leave,
    ):
        first = [engine.walking(tile, record, leave) for tile in ([lead] if lead else [])]
        rest = [engine.walking(tile, record, leave) for tile in tiles]
        sweep = _Sweep(engine, record, first, rest, progress, check)
        sweep.run(read_logits)
        record.seconds = sweep.clock.seconds()
    for index, walking in enumerate(rest):
        bad = walking.state.nonfinite().items()
        record.nonfinite |= {(index, *where): layer for where, layer in bad}
    return record


@dataclass(frozen=True)
class _Left:
    """LayerHealth that is still on the device: float32 [2], or [1] without a router."""

    layer: int
    experts_used: int | None
    largest_and_spread: Tensor


class _Sweep:
    """One walk over an engine's blocks; the `lead` tile goes ahead of the `rest`."""

    def __init__(
        self,
        engine: GenericEngine,
        record: SweepRecord,
        lead: list[Walking],
        rest: list[Walking],
        progress: Progress,
        check: LayerCheck | None,
    ) -> None:
        self.engine, self.record = engine, record
        self.lead, self.rest, self.every = lead, rest, [*lead, *rest]
        self.check = check if lead else None
        self.store, self.weights, self.modules = engine.store, engine.weights, engine.modules
        self.clock = PhaseClock(engine.compute.device)
        self.of_layer: dict[int | None, list[int]] = {}
        for number, spec in enumerate(self.store.specs):
            self.of_layer.setdefault(spec.layer, []).append(number)
        self._progress, self._done = progress, 0
        self._left: _Left | None = None
        self._routed: tuple[int, Tensor] | None = None
        layers = len(self.modules.layers)
        self._total = layers * len(rest) + len(self.store.specs) - 2 - layers

    def run(self, read_logits: LogitsReader) -> None:
        first, last = self.of_layer[None]
        with self.clock.phase("embedding"), self.modules.bound(self._filled(first)):
            for walking in self.every:
                walking.go()
        for layer in range(len(self.modules.layers)):
            self._visit_layer(layer)
        self._report()
        with self.clock.phase("logits"), self.modules.bound(self._filled(last)):
            for number, walking in enumerate(self.every):
                self._read(walking, read_logits)
                self._progress("logits", number + 1, len(self.every))

    def _visit_layer(self, layer: int) -> None:
        first, *experts = self.of_layer[layer]
        prefix = f"{self.modules.layers[layer].module}."
        with self.modules.bound(self._filled(first, prefix, experts)):
            with self.clock.phase("gate"):
                for walking in self.lead:
                    walking.go()
            with self.clock.phase("attention"):
                for walking in self.rest:
                    walking.go()
                    self._visited()
            if experts:
                self._visit_experts(layer, experts)
        for walking in self.every:
            assert isinstance(walking.halt, AtLayer) and walking.halt.index == layer + 1
            walking.note_bad(layer)
        if self.check:
            self._report()
            self._look(layer, self.lead[0])

    def _visit_experts(self, layer: int, numbers: Sequence[int]) -> None:
        """Experts, one after the other or a few together, with all tiles; then all of these on
        through the layer."""
        module = self.modules.module(self.modules.layers[layer].experts)
        described, compute = self.engine.decoder.layers[layer], self.engine.compute
        act = gate_of(module, compute.dtype, described.feed.inner)
        shapes = [self.store.specs[number].shape for number in numbers]
        with self.clock.phase("experts"):
            for walking in self.every:
                walking.route(layer)
            # the one place in a layer where the host waits for the device
            Routing.settle([one.state.routing for one in self.every if one.state.routing])
            self._report()
            if self.check:
                self._routed = self._route_of(self.lead[0])
            for group in groups_of(numbers, shapes, self._at_once(layer)):
                self.weights.fill_feeds([self.store.get(number) for number in group])
                for number in group:
                    self.store.release(number)
                visit = ExpertsVisit(
                    [self.store.specs[number].shape for number in group], described, self.weights,
                    compute, self.engine.scratch, module, act,
                )  # fmt: skip
                for walking in self.every:
                    visit(walking.state)
                self._visited(len(group))
            for walking in self.every:
                assert isinstance(walking.halt, AtExperts)
                walking.go()

    def _route_of(self, walking: Walking) -> tuple[int, Tensor]:
        """Experts that have rows, and the router's spread, which is still on the device."""
        assert walking.state.routing is not None
        start = walking.state.routing.start
        used = sum(after > before for before, after in pairwise(start))
        return used, walking.spread()

    def _look(self, layer: int, walking: Walking) -> None:
        """What `_report` will say; no wait."""
        largest = walking.hidden.abs().max().float()
        if self._routed is None:
            self._left = _Left(layer, None, largest[None])
            return
        (used, spread), self._routed = self._routed, None
        self._left = _Left(layer, used, torch.stack((largest, spread)))

    def _report(self) -> None:
        """Show the lead tile, as it left the layer before, to `check`. Waits for the device."""
        if self.check and self._left:
            left, self._left = self._left, None
            largest, *spread = left.largest_and_spread.tolist()
            self.record.experts_used.append(left.experts_used)
            self.check(LayerHealth(left.layer, largest, left.experts_used, *(spread or [None])))

    def _read(self, walking: Walking, read_logits: LogitsReader) -> None:
        walking.go()
        start = 0
        for number, sequence in enumerate(walking.tile.sequences):
            pieces = self._pieces(walking, read_rows(sequence, start))
            read_logits(walking.tile, number, sequence, pieces)
            start += sequence.rows
        walking.halt = None

    def _pieces(self, walking: Walking, ranges: list[Rows]) -> Iterator[Piece]:
        vocabulary = self.engine.decoder.vocab_size
        for positions, cut in pieces_of(
            ranges, positions_at_once(walking.tile.branches, vocabulary)
        ):
            rows = torch.cat([walking.hidden[first:last] for first, last in cut])
            with self.engine.scratch.frame():
                logits = self.engine.scratch.take(len(rows), vocabulary, dtype=torch.float32)
                parts = zip(
                    torch.split(rows, HEAD_ROWS), torch.split(logits, HEAD_ROWS), strict=True
                )
                for some, into in parts:
                    into.copy_(self.modules.logits(some, self._product))
                of_branches = torch.split(logits, [last - first for first, last in cut])
                yield positions, list(of_branches)

    def _product(self, x_NH: Tensor, weight_VH: Tensor) -> Tensor:
        memory = x_NH.new_empty(len(x_NH), len(weight_VH), dtype=torch.float32)
        return self.engine.compute.ops.logits(x_NH, weight_VH, memory)

    def _filled(self, number: int, prefix: str = "", feeds: Sequence[int] = ()) -> Views:
        """A block's weights in the compute dtype, by the names of their parameters."""
        block = self.store.get(number)
        shapes = [self.store.specs[feed].shape for feed in feeds]
        at_once = self._at_once(block.spec.layer) if block.spec.layer is not None else 1
        self.weights.fill_attention(block, shapes, at_once)
        self.store.release(number)
        own = joined({key: self.weights.attention[key] for key in block.spec.weights})
        return {self.modules.parameter(f"{prefix}{key}"): view for key, view in own.items()}

    def _at_once(self, layer: int) -> int:
        decoder, compute = self.engine.decoder, self.engine.compute
        return experts_at_once(
            decoder, decoder.layers[layer], compute.dtype.itemsize, cpu=compute.cpu
        )

    def _visited(self, count: int = 1) -> None:
        self._done += count
        self._progress("sweep", self._done, self._total)

"""The sweep where transformers' own layers compute: the same loop, around forward passes that halt.

    embed  ->  for each layer: every tile up to its experts -> for each expert: all tiles  ->  head

See sweep/loop.py for what a sweep is, model/generic/walk.py for what halts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from layersweep.families.spec import Decoder
from layersweep.model.compute import Compute
from layersweep.model.generic.decoder import Modules
from layersweep.model.generic.experts import ExpertSums
from layersweep.model.generic.walk import AtExperts, AtLayer, Done, Halt
from layersweep.model.ops import NEVER
from layersweep.stream.blocks import Block
from layersweep.stream.shapes import rows_at_once
from layersweep.stream.store import BlockStore
from layersweep.sweep.clock import PhaseClock
from layersweep.sweep.dense import Views
from layersweep.sweep.generic_rows import TileRows, context_maker, tile_positions
from layersweep.sweep.loop import Engine
from layersweep.sweep.record import (
    LayerCheck,
    LayerHealth,
    LogitsReader,
    Progress,
    SweepRecord,
)
from layersweep.sweep.sequences import Tile
from layersweep.sweep.state import TileState, read_rows


class GenericEngine(Engine):
    """An engine whose layers are transformers'."""

    def __init__(
        self, decoder: Decoder, store: BlockStore, compute: Compute, scratch_bytes: int
    ) -> None:
        super().__init__(decoder, store, compute, scratch_bytes)
        assert decoder.generic is not None
        self.modules = Modules(decoder.generic, decoder.num_hidden_layers, compute.device)
        self.layer_of = {
            self.modules.module(layer.attention): index
            for index, layer in enumerate(self.modules.layers)
            if layer.attention
        }


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
    with (
        torch.inference_mode(),
        engine.compute.numerics(),
        engine.visited(),
        ExitStack() as leave,
    ):
        sweep = _Sweep(engine, record, progress, check)
        states = [_Walking(engine, tile, record, leave) for tile in ([lead] if lead else [])]
        rest = [_Walking(engine, tile, record, leave) for tile in tiles]
        sweep.run(states, rest, read_logits)
        record.seconds = sweep.clock.seconds()
    for index, walking in enumerate(rest):
        bad = walking.state.nonfinite().items()
        record.nonfinite |= {(index, *where): layer for where, layer in bad}
    return record


class _Walking:
    """A tile on its way through the layers."""

    def __init__(
        self, engine: GenericEngine, tile: Tile, record: SweepRecord, leave: ExitStack
    ) -> None:
        decoder, compute = engine.decoder, engine.compute
        self.tile, self.state = tile, TileState(tile, decoder.query_width)
        device = compute.device
        self.state.unit_of_row = self.state.unit_of_row.to(device)
        self.state.first_bad_layer = self.state.first_bad_layer.to(device)
        context = context_maker(decoder, compute, engine.scratch, record.cache_bits)
        rows = TileRows(tile, self.state.groups, engine.layer_of, context, cpu=compute.cpu)
        ids = torch.from_numpy(tile.ids()).to(device)
        self.walk = engine.modules.walk(ids, tile_positions(tile).to(device), rows)
        leave.callback(self.walk.close)
        self.halt: Halt | None = None
        self.sums: ExpertSums | None = None
        self.health: tuple[int, float] | None = None

    def go(self, answer: Tensor | None = None) -> None:
        self.halt = None  # what it holds is the model's alone, while it computes
        self.halt = self.walk.go(answer)

    def note_bad(self, hidden_NH: Tensor, layer: int) -> None:
        """Which prefixes and branches are no longer finite, without waiting for the device."""
        bad = ~torch.isfinite(hidden_NH.sum(-1, dtype=torch.float32))
        state = self.state
        found = torch.where(bad, layer, NEVER).to(torch.int32)
        state.first_bad_layer.scatter_reduce_(0, state.unit_of_row.long(), found, "amin")


class _Sweep:
    """One walk over an engine's blocks."""

    def __init__(
        self,
        engine: GenericEngine,
        record: SweepRecord,
        progress: Progress,
        check: LayerCheck | None,
    ) -> None:
        self.engine, self.record, self.check = engine, record, check
        self.store, self.weights, self.modules = engine.store, engine.weights, engine.modules
        self.clock = PhaseClock(engine.compute.device)
        self.of_layer: dict[int | None, list[int]] = {}
        for number, spec in enumerate(self.store.specs):
            self.of_layer.setdefault(spec.layer, []).append(number)
        self._progress, self._done = progress, 0

    def run(self, lead: list[_Walking], rest: list[_Walking], read_logits: LogitsReader) -> None:
        every = [*lead, *rest]
        self._total = len(self.modules.layers) * len(rest) + sum(
            len(numbers) - 1 for layer, numbers in self.of_layer.items() if layer is not None
        )
        first, last = self.of_layer[None]
        with self.clock.phase("embedding"), self.modules.bound(self._filled(first)):
            for walking in every:
                walking.go()
        for layer in range(len(self.modules.layers)):
            self._visit_layer(layer, lead, rest)
        with self.clock.phase("logits"), self.modules.bound(self._filled(last)):
            for number, walking in enumerate(every):
                self._read(walking, read_logits)
                self._progress("logits", number + 1, len(every))

    def _visit_layer(self, layer: int, lead: list[_Walking], rest: list[_Walking]) -> None:
        first, *experts = self.of_layer[layer]
        parts = self.modules.layers[layer]
        weights = self._filled(first, prefix=f"{parts.module}.", feeds=experts)
        with self.modules.bound(weights):
            for phase, walkings in (("gate", lead), ("attention", rest)):
                with self.clock.phase(phase):
                    for walking in walkings:
                        walking.go()
                        if walkings is rest:
                            self._visited()
            if experts:
                self._visit_experts(layer, lead, rest)
        for walking in (*lead, *rest):
            halt = walking.halt
            assert isinstance(halt, AtLayer) and halt.index == layer + 1
            walking.note_bad(halt.hidden_NH, layer)
        if self.check and lead:
            self._show(layer, lead[0])

    def _visit_experts(self, layer: int, lead: list[_Walking], rest: list[_Walking]) -> None:
        """One expert after the other, with all tiles, until all of them have what they wait for."""
        parts = self.modules.layers[layer]
        self.layer = layer
        module, (_, *numbers) = self.modules.module(parts.experts), self.of_layer[layer]
        every, ops = [*lead, *rest], self.engine.compute.ops
        with self.clock.phase("experts"):
            for walking in every:
                assert isinstance(walking.halt, AtExperts)
                walking.sums = ExpertSums.of(walking.halt, len(numbers), self._at_once(walking))
            ExpertSums.settle([w.sums for w in every if w.sums])
            for expert, number in enumerate(numbers):
                self.weights.fill_feed(self._block(number))
                one = _joined(self.weights.feeds[0])
                self.store.release(number)
                for walking in every:
                    assert walking.sums is not None
                    walking.sums.add(expert, module, one, ops)
                self._visited()
            for walking in every:
                sums, walking.sums = walking.sums, None
                assert sums is not None
                walking.health = sums.health() if walking in lead and self.check else None
                walking.go(sums.sums_NH)

    def _at_once(self, walking: _Walking) -> int:
        feed = self.engine.decoder.layers[self.layer].feed
        return rows_at_once(feed, "expert", walking.tile.rows, cpu=self.engine.compute.cpu)

    def _show(self, layer: int, walking: _Walking) -> None:
        """The lead tile, as it left a layer, to `check`. Waits for the device."""
        halt = walking.halt
        assert isinstance(halt, AtLayer) and self.check
        largest = float(halt.hidden_NH.abs().max())
        used, spread = walking.health or (None, None)
        walking.health = None
        self.record.experts_used.append(used)
        self.check(LayerHealth(layer, largest, used, spread))

    def _read(self, walking: _Walking, read_logits: LogitsReader) -> None:
        walking.go()
        halt, start = walking.halt, 0
        assert isinstance(halt, Done)
        for number, sequence in enumerate(walking.tile.sequences):
            ranges = read_rows(sequence, start)
            rows = torch.cat([halt.hidden_NH[first:last] for first, last in ranges])
            with self.engine.scratch.frame():
                logits = self.modules.logits(rows, self._product)
                parts = torch.split(logits, [last - first for first, last in ranges])
                read_logits(walking.tile, number, sequence, list(parts))
            start += sequence.rows
        walking.halt = None

    def _product(self, x_NH: Tensor, weight_VH: Tensor) -> Tensor:
        memory = self.engine.scratch.take(len(x_NH), len(weight_VH), dtype=torch.float32)
        return self.engine.compute.ops.logits(x_NH, weight_VH, memory)

    def _filled(self, number: int, prefix: str = "", feeds: Sequence[int] = ()) -> Views:
        """A block's weights in the compute dtype, by their names in the model."""
        block = self._block(number)
        specs = [self.store.specs[feed].shape for feed in feeds]
        self.weights.fill_attention(block, specs)
        self.store.release(number)
        return {
            self.modules.parameter(f"{prefix}{key}"): view
            for key, view in self.weights.attention.items()
            if key in block.spec.weights
        }

    def _block(self, number: int) -> Block:
        return self.store.get(number)

    def _visited(self) -> None:
        self._done += 1
        self._progress("sweep", self._done, self._total)


def _joined(views: Views) -> dict[str, Tensor]:
    """An expert's weights by the names of their parameters: those in pieces as one."""
    pieces: dict[str, list[Tensor]] = {}
    for key, view in views.items():
        number, _, rest = key.partition(".")
        pieces.setdefault(rest if number.isdigit() else key, []).append(view)
    return {
        key: parts[0] if len(parts) == 1 else _side_by_side(parts) for key, parts in pieces.items()
    }


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Views that follow one another in memory as one view; else a copy."""
    end = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end:
            return torch.cat(parts)
        end += part.nbytes
    rows = sum(len(part) for part in parts)
    return parts[0].as_strided((rows, *parts[0].shape[1:]), parts[0].stride())

"""The sweep: embed, visit every layer once with all tiles, read the logits.

for each layer:   attention of every tile -> for each expert, or MLP: all tiles -> leave
the lead tile (the gate) goes ahead of the others through attention and each expert, and what it
looked like as it left a layer is read in the middle of the next, where the host waits for the
device anyway: a broken model stops there.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from layersweep.errors import InputError
from layersweep.families.weights import BlockShape
from layersweep.kv.fit import Fit
from layersweep.model.routing import Routing
from layersweep.stream.blocks import Block
from layersweep.stream.shapes import positions_at_once
from layersweep.sweep.attention import visit_attention
from layersweep.sweep.caches import KeptCaches
from layersweep.sweep.clock import PhaseClock
from layersweep.sweep.context import LayerContext, RopeTables
from layersweep.sweep.engine import Engine
from layersweep.sweep.feed import FeedVisit, experts_used, leave_feed
from layersweep.sweep.head import Head
from layersweep.sweep.record import (
    HealthThere,
    LayerCheck,
    LayerHealth,
    LogitsReader,
    Pieces,
    Progress,
    SweepRecord,
)
from layersweep.sweep.running import RunningCaches
from layersweep.sweep.sequences import Tile, reference_tile, want_reference
from layersweep.sweep.state import TileState, read_rows
from layersweep.sweep.turn import HostTurn
from layersweep.sweep.visits import FeedGroup, LayerBlocks, Visits
from layersweep.sweep.watch import Watch

MANY = 4  # rows of each expert, on average, from which on all of them have some
Caches = KeptCaches | RunningCaches | None


def run_sweep(
    engine: Engine,
    tiles: list[Tile],
    read_logits: LogitsReader,
    *,
    then: Sequence[Engine] = (),
    lead: Tile | None = None,
    check: LayerCheck | None = None,
    caches: Caches = None,
    turn: HostTurn | None = None,
    progress: Progress = lambda phase, done, total: None,
    watch: Watch | None = None,
) -> SweepRecord:
    """Visit every block once with all `tiles`, on `engine`, and `then` on those that hold the later
    layers.

    `read_logits(tile, sequence index, sequence, pieces)` is called once per sequence at the end.
    Its logits come in pieces of as many positions as memory is planned for: (positions, a tensor
    [rows, V] float32 per branch), gone when the next piece is asked for. `check` sees the lead
    tile of each layer, once the next one's attention is done, and may raise. With `caches`, keys
    and values of `tiles` (of one name) are kept between sweeps; with RunningCaches,
    `read_logits` is called once per tile, with what its sequences read in a row. Sweeps
    that run at once, each in a thread, share one `turn`. `watch` sees the attention of each group
    of `tiles` in each layer;
    transformers' own layers show nothing.
    """
    if engine.decoder.generic:
        from layersweep.sweep.generic import GenericEngine, run_modules
        from layersweep.sweep.generic_limits import KEEPS_NOTHING

        assert isinstance(engine, GenericEngine) and not then
        if caches is not None:
            raise InputError(KEEPS_NOTHING)
        return run_modules(engine, tiles, read_logits, lead, check, progress)
    record, turn = SweepRecord(), turn or HostTurn()
    decoder = engine.decoder
    groups = [
        [TileState(tile, decoder.query_width) for tile in group]
        for group in ([lead] if lead else [], tiles)
    ]
    if lead and check:
        groups[0][0].looked_at = True
    reference = None
    known = isinstance(caches, RunningCaches) and bool(caches.fits)
    if engine.reference and not known and want_reference(tiles):
        reference = TileState(reference_tile(engine.reference), decoder.query_width)
        groups[0].append(reference)
    every = [*groups[0], *groups[1]]
    layers = [blocks for stage in (engine, *then) for blocks in stage.blocks.values()]
    visits = Visits(progress, layers, len(tiles))
    with torch.inference_mode(), engine.compute.numerics(), ExitStack() as leave:
        before = ExitStack()
        for stage in (engine, *then):
            # the next engine is entered before this one is left: no tile waits between them,
            # where it would take the memory of the next
            visit = leave.enter_context(ExitStack())
            visit.enter_context(stage.visited())
            with turn:
                sweep = _Sweep(stage, record, caches, visits, every, turn, reference, watch)
                if stage.layers[0] == 0:
                    sweep.embed(every)
                else:
                    moved = [one.move(stage.compute.device, stage.keeps_normed) for one in every]
                    record.moved_bytes += sum(moved)
            before.close()  # joins threads and waits for the device: others launch meanwhile
            before = visit
            with turn:
                for layer in stage.layers:
                    sweep.visit_layer(layer, groups[0], groups[1], check)
                sweep.report(check)
                if stage.layers[-1] == decoder.num_hidden_layers - 1:
                    read = [state for state in every if state is not reference]
                    sweep.read_head(read, read_logits)
            for phase, seconds in sweep.clock.seconds().items():
                record.seconds[phase] = record.seconds.get(phase, 0.0) + seconds
    for index, state in enumerate(groups[1]):
        bad = state.nonfinite().items()
        record.nonfinite |= {(index, *where): layer for where, layer in bad}
    return record


class _Sweep:
    """One walk over an engine's blocks, which the store numbers in sweep order."""

    def __init__(
        self, engine: Engine, record: SweepRecord, caches: Caches, visited: Visits,
        states: list[TileState], turn: HostTurn, reference: TileState | None, watch: Watch | None,
    ) -> None:  # fmt: skip
        self.visited, self.turn = visited, turn
        self.reference, self.watch = reference, watch
        self.decoder, self.store, self.compute = engine.decoder, engine.store, engine.compute
        self.weights, self.scratch, self.experts = engine.weights, engine.scratch, engine.experts
        self.keeps_normed = engine.keeps_normed
        self.record, self.caches = record, caches
        self.blocks = engine.blocks
        self.clock = PhaseClock(self.compute.device)
        self._left: HealthThere | None = None
        sequences = [sequence for state in states for sequence in state.tile.sequences]
        longest = max((sequence.longest for sequence in sequences), default=0)
        growing = isinstance(caches, RunningCaches)
        self.tables = engine.tables(longest) if growing else RopeTables(longest, self.compute)

    def embed(self, states: list[TileState]) -> None:
        device, dtype = self.compute.device, self.compute.dtype
        # rounded as transformers rounds it
        scale = torch.tensor(self.decoder.embedding_scale, dtype=dtype).item()
        ids = [torch.from_numpy(state.tile.ids()) for state in states]  # while the table is read
        with self.clock.phase("embedding"):
            table = self.weights.embedding(self._block(0))
            for state, rows in zip(states, ids, strict=True):
                hidden = table[rows.to(device)].to(dtype)
                hidden = hidden if scale == 1.0 else hidden.mul_(scale)
                state.start(hidden, self.keeps_normed)
            self.store.release(0)

    def visit_layer(
        self, layer: int, lead: list[TileState], rest: list[TileState], check: LayerCheck | None
    ) -> None:
        blocks = self.blocks[layer]
        self._fill_attention(blocks)
        fit = None
        if lead:
            with self.clock.phase("gate"):
                fit = self._attend(layer, lead, None)
        if isinstance(self.caches, RunningCaches):  # fitted once, for all walks
            fit = self.caches.fits.setdefault(layer, fit) if fit else self.caches.fits.get(layer)
        with self.clock.phase("attention"):
            self._attend(layer, rest, self.caches, fit, self.visited, self.watch)
        groups = deque(blocks.groups)
        few = isinstance(self.caches, RunningCaches)  # rows, so that not every expert has some
        first = groups.popleft() if groups and not (few and groups[0].routed) else None
        with self.clock.phase("experts"):
            if first:  # decoded while the host waits, in the one place of a layer
                self._fill(first, first)
            with self.turn.away():
                Routing.settle([state.routing for state in (*lead, *rest) if state.routing])
        self.report(check)
        with self.clock.phase("experts"):
            if first:
                self._feed(first.shapes, layer, lead, rest)
            used = experts_used([*lead, *rest]) if few else set()
            for group in groups:
                some = group.used_by(used, whole=self.weights.keeps) if few else group
                self._fill(some, group)
                if some:
                    self._feed(some.shapes, layer, lead, rest)
            if blocks.fetched:
                self._visit_experts(layer, blocks.at_once, lead, rest)
            self.visited(len(blocks.feeds))
            if lead:
                with self.clock.phase("gate"):
                    self._leave(layer, lead)
                    if check:
                        self._left = self._look(layer, lead[0])
            self._leave(layer, rest)
        for state in (*lead, *rest):  # their memory is the next layer's
            state.routing = state.router_logits = None

    def _fill_attention(self, blocks: LayerBlocks) -> None:
        number = blocks.attention
        if self.weights.reuse(self.store.specs[number]):
            return
        block = self._block(number)
        with self.clock.phase("dequantization"):
            self.weights.fill_attention(block, blocks.feeds, blocks.at_once)
        self.store.release(number)

    def _fill(self, some: FeedGroup | None, every: FeedGroup) -> None:
        """Make one MLP, or a group of experts, dense; of `every`, those that are needed. The store
        brings all the same, in order, but where what is dense stays so and nothing streams."""
        weights = self.weights
        if weights.keeps and (some is None or weights.reuse(self.store.specs[some.numbers[0]])):
            return
        blocks = {number: self._block(number) for number in every.numbers}
        if some:
            with self.clock.phase("dequantization"):
                self.weights.fill_feeds([blocks[number] for number in some.numbers])
        for number in every.numbers:
            self.store.release(number)

    def _visit_experts(
        self, layer: int, at_once: int, lead: list[TileState], rest: list[TileState]
    ) -> None:
        """Those that are fetched by id, now that routing is known."""
        experts, feed = self.experts, self.decoder.layers[layer].feed
        assert experts is not None and feed.router is not None
        keys = experts.chosen(layer, experts_used([*lead, *rest]))
        rows = sum(state.tile.rows for state in (*lead, *rest))
        many = rows * feed.router.top_k >= MANY * feed.experts
        for number, blocks in enumerate(experts.visit(keys, at_once)):
            if many and number == 0:  # the next layer will want all of its own
                experts.want(experts.of_layer.get(layer + 1, []))
            with self.clock.phase("dequantization"):
                self.weights.fill_feeds(blocks)
            self._feed([block.spec.shape for block in blocks], layer, lead, rest)

    def _feed(
        self, blocks: Sequence[BlockShape], layer: int, lead: list[TileState], rest: list[TileState]
    ) -> None:
        """What is dense, with all tiles."""
        visit = FeedVisit(
            blocks, self.decoder.layers[layer], self.weights, self.compute, self.scratch
        )
        if lead:
            with self.clock.phase("gate"):
                for state in lead:
                    visit(state)
        for state in rest:
            visit(state)

    def _block(self, index: int) -> Block:
        if not self.store.waits_for(index):  # the turn is not handed over for nothing
            return self.store.get(index)
        with self.turn.away():
            return self.store.get(index)

    def _attend(
        self,
        layer: int,
        states: list[TileState],
        caches: Caches,
        fit: Fit | None = None,
        done: Callable[[], None] = lambda: None,
        watch: Watch | None = None,
    ) -> Fit | None:
        """What is fitted to the reference text, if it is one of them."""
        context = LayerContext(
            self.decoder, layer, self.weights.attention, self.tables, self.compute, self.scratch,
            self.record.cache_bits, caches, watch, fit,
        )  # fmt: skip
        for state in states:
            context.fits = state is self.reference and not context.attention.latent
            visit_attention(state, context)
            done()
        return context.fit

    def _leave(self, layer: int, states: list[TileState]) -> None:
        """Add what the layer's second half found once, and note who has become non-finite; no
        wait."""
        for state in states:
            leave_feed(state, self.decoder.layers[layer], self.weights, self.compute)
            self.compute.ops.leave_layer_(
                state.hidden, state.update, state.unit_of_row, state.first_bad_layer, layer
            )

    def _look(self, layer: int, state: TileState) -> HealthThere:
        """What `report` will say; no wait."""
        largest = state.hidden.abs().max().float()
        if state.routing is None or state.router_logits is None:
            return HealthThere(layer, None, largest[None])
        start = state.routing.start
        used = sum(start[e + 1] > start[e] for e in range(len(start) - 1))
        spread = state.router_logits.float().std(0).max()
        return HealthThere(layer, used, torch.stack((largest, spread)))

    def report(self, check: LayerCheck | None) -> None:
        """Show the lead tile, as it left the layer before, to `check`. Waits for the device."""
        if check and self._left:
            left, self._left = self._left, None
            largest, *spread = left.largest_and_spread.tolist()
            self.record.experts_used.append(left.experts_used)
            check(LayerHealth(left.layer, largest, left.experts_used, *(spread or [None])))

    def _in_a_row(self, state: TileState, head: Head) -> Pieces:
        """Logits of what all sequences read, as if they were one with one branch."""
        sequences = state.tile.sequences
        starts = itertools.accumulate((one.rows for one in sequences), initial=0)
        each = map(read_rows, sequences, starts)
        at_once = positions_at_once(1, self.decoder.vocab_size)
        return head.in_a_row(state.hidden, list(itertools.chain.from_iterable(each)), at_once)

    def read_head(self, states: list[TileState], read_logits: LogitsReader) -> None:
        index = len(self.store.specs) - 1
        total = sum(len(state.tile.sequences) for state in states)
        done = 0
        with self.clock.phase("logits"):
            if not self.weights.reuse(self.store.specs[index]):
                block = self._block(index)
                with self.clock.phase("dequantization"):
                    self.weights.fill_head(block)
                self.store.release(index)
            head = Head(self.decoder, self.weights.head, self.compute, self.scratch)
            if isinstance(self.caches, RunningCaches):
                for state in states:
                    pieces = self._in_a_row(state, head)
                    read_logits(state.tile, 0, state.tile.sequences[0], pieces)
                return
            for state in states:
                start, at_once = 0, positions_at_once(state.tile.branches, self.decoder.vocab_size)
                for number, sequence in enumerate(state.tile.sequences):
                    pieces = head.pieces(state.hidden, read_rows(sequence, start), at_once)
                    read_logits(state.tile, number, sequence, pieces)
                    start += sequence.rows
                    done += 1
                    self.visited.progress("logits", done, total)

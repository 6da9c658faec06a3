"""The sweep: embed, visit every layer once with all tiles, read the logits.

for each layer:   attention of every tile -> for each expert: all tiles -> leave
the lead tile (the gate) goes ahead of the others through attention and each expert, and what it
looked like as it left a layer is read in the middle of the next, where the host waits for the
device anyway: a broken model stops there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layersweep.checkpoint.config import ModelConfig
from layersweep.model import maths
from layersweep.model.compute import Compute, Scratch
from layersweep.stream.blocks import Block
from layersweep.stream.store import BlockStore
from layersweep.sweep.attention import visit_attention
from layersweep.sweep.caches import KeptCaches
from layersweep.sweep.clock import PhaseClock
from layersweep.sweep.context import LayerContext
from layersweep.sweep.dense import DenseWeights
from layersweep.sweep.experts import visit_expert
from layersweep.sweep.sequences import BranchedSequence, Tile
from layersweep.sweep.state import Routing, TileState, read_rows
from layersweep.sweep.turn import HostTurn


@dataclass(frozen=True)
class LayerHealth:
    """What the lead tile looked like as it left a layer. `largest` may be infinite or NaN."""

    layer: int
    largest: float
    experts_used: int
    router_spread: float


@dataclass(frozen=True)
class _Left:
    """LayerHealth that is still on the device: float32 [2]."""

    layer: int
    experts_used: int
    largest_and_spread: Tensor


LogitsReader = Callable[[Tile, int, BranchedSequence, list[Tensor]], None]
LayerCheck = Callable[[LayerHealth], None]
Progress = Callable[[str, int, int], None]


@dataclass
class SweepRecord:
    """What a sweep leaves besides logits.

    `cache_bits[tile name, arm]` = [bits stored, elements]; `nonfinite` = (tile index, index of
    the sequence within the tile, branch or -1 for the prefix) -> first bad layer; `seconds` per
    phase, by the device's own clock; `moved_bytes` of hidden states between devices.
    """

    cache_bits: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    nonfinite: dict[tuple[int, int, int], int] = field(default_factory=dict)
    experts_used: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    moved_bytes: int = 0

    def add(self, later: SweepRecord, ahead: int = 0) -> None:
        """Take over a later sweep of the same tiles, or of those after the first `ahead`."""
        for key, counted in later.cache_bits.items():
            total = self.cache_bits.setdefault(key, [0.0, 0.0])
            total[0] += counted[0]
            total[1] += counted[1]
        for (tile, sequence, branch), layer in later.nonfinite.items():
            where = ahead + tile, sequence, branch
            self.nonfinite[where] = min(layer, self.nonfinite.get(where, layer))
        for phase, seconds in later.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.moved_bytes += later.moved_bytes


class Engine:
    """What sweeps of one model share: where blocks come from, and memory to compute in.

    `layers`: those that this engine holds, all by default; the first one's has the embedding, too,
    and the last one's the head.
    """

    def __init__(
        self,
        config: ModelConfig,
        store: BlockStore,
        compute: Compute,
        scratch_bytes: int,
        layers: range | None = None,
    ) -> None:
        self.config, self.store, self.compute = config, store, compute
        self.layers = layers or range(config.num_hidden_layers)
        self._visiting = threading.Lock()
        self.weights = DenseWeights(config, compute)
        self.scratch = Scratch(scratch_bytes, compute.device)

    @contextmanager
    def visited(self) -> Iterator[None]:
        """One walk over this engine's blocks; other sweeps wait until it is left."""
        with self._visiting:
            if not self.compute.cpu:
                torch.cuda.set_device(self.compute.device)
            with self.store.sweep():
                yield

    def close(self) -> None:
        self.store.close()


def run_sweep(
    engine: Engine,
    tiles: list[Tile],
    read_logits: LogitsReader,
    *,
    then: Sequence[Engine] = (),
    lead: Tile | None = None,
    check: LayerCheck | None = None,
    caches: KeptCaches | None = None,
    turn: HostTurn | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> SweepRecord:
    """Visit every block once with all `tiles`, on `engine`, and `then` on those that hold the later
    layers.

    `read_logits(tile, sequence index, sequence, logits per branch [rows, V] float32)` is
    called once per sequence at the end; the logits are gone when it returns. `check` sees the
    lead tile of each layer, once the next one's attention is done, and may raise. With `caches`,
    keys and values of `tiles` (of one name) are kept between sweeps. Sweeps that run at once, each
    in a thread, share one `turn`.
    """
    record, turn = SweepRecord(), turn or HostTurn()
    config = engine.config
    width = config.num_attention_heads * config.head_dim
    groups = [
        [TileState(tile, width) for tile in group] for group in ([lead] if lead else [], tiles)
    ]
    every = [*groups[0], *groups[1]]
    visits = _Visits(progress, config, len(tiles))
    with torch.inference_mode(), engine.compute.numerics(), ExitStack() as leave:
        before = ExitStack()
        for stage in (engine, *then):
            # the next engine is entered before this one is left: no tile waits between them,
            # where it would take the memory of the next
            visit = leave.enter_context(ExitStack())
            visit.enter_context(stage.visited())
            with turn:
                sweep = _Sweep(stage, record, caches, visits, every, turn)
                if stage.layers[0] == 0:
                    sweep.embed(every)
                else:
                    record.moved_bytes += sum(state.move(stage.compute.device) for state in every)
            before.close()  # joins threads and waits for the device: others launch meanwhile
            before = visit
            with turn:
                for layer in stage.layers:
                    sweep.visit_layer(layer, groups[0], groups[1], check)
                sweep.report(check)
                if stage.layers[-1] == config.num_hidden_layers - 1:
                    sweep.read_head(every, read_logits)
            for phase, seconds in sweep.clock.seconds().items():
                record.seconds[phase] = record.seconds.get(phase, 0.0) + seconds
    for index, state in enumerate(groups[1]):
        bad = state.nonfinite().items()
        record.nonfinite |= {(index, *where): layer for where, layer in bad}
    return record


class _Visits:
    """Progress: a visit is a tile's attention, or an expert with all tiles."""

    def __init__(self, progress: Progress, config: ModelConfig, tiles: int) -> None:
        self.progress, self.done = progress, 0
        self.total = config.num_hidden_layers * (tiles + config.num_local_experts)

    def __call__(self) -> None:
        self.done += 1
        self.progress("sweep", self.done, self.total)


class _Sweep:
    """One walk over an engine's blocks. They are numbered in sweep order: embed, layers, head."""

    def __init__(
        self,
        engine: Engine,
        record: SweepRecord,
        caches: KeptCaches | None,
        visited: _Visits,
        states: list[TileState],
        turn: HostTurn,
    ) -> None:
        self.visited, self.turn = visited, turn
        self.config, self.store, self.compute = engine.config, engine.store, engine.compute
        self.weights, self.scratch = engine.weights, engine.scratch
        self.record, self.caches = record, caches
        self.per_layer = 1 + self.config.num_local_experts
        # of the first layer here: after the embedding, where that is here, too
        self.first = 1 if engine.layers[0] == 0 else -engine.layers[0] * self.per_layer
        self.clock = PhaseClock(self.compute.device)
        self._left: _Left | None = None
        sequences = [sequence for state in states for sequence in state.tile.sequences]
        longest = max((sequence.longest for sequence in sequences), default=0)
        positions = torch.arange(longest, device=self.compute.device)
        cos, sin = maths.rope_table(self.config.rope_theta, self.config.head_dim, positions)
        self.cos, self.sin = cos.to(self.compute.dtype), sin.to(self.compute.dtype)

    def embed(self, states: list[TileState]) -> None:
        device, dtype = self.compute.device, self.compute.dtype
        ids = [torch.from_numpy(state.tile.ids()) for state in states]  # while the table is read
        with self.clock.phase("embedding"):
            table = self.weights.embedding(self._block(0))
            for state, rows in zip(states, ids, strict=True):
                state.start(table[rows.to(device)].to(dtype))
            self.store.release(0)

    def visit_layer(
        self, layer: int, lead: list[TileState], rest: list[TileState], check: LayerCheck | None
    ) -> None:
        first = self.first + layer * self.per_layer
        self.weights.fill_attention(self._block(first))
        if lead:
            with self.clock.phase("gate"):
                self._attend(layer, lead, None)
        with self.clock.phase("attention"):
            self._attend(layer, rest, self.caches, self.visited)
            self.store.release(first)
            with self.turn.away():  # the one place in a layer where the host waits for the device
                Routing.settle([state.routing for state in (*lead, *rest) if state.routing])
        self.report(check)
        with self.clock.phase("experts"):
            for expert in range(self.config.num_local_experts):
                self.weights.fill_expert(self._block(first + 1 + expert))
                if lead:
                    with self.clock.phase("gate"):
                        self._experts(expert, lead)
                self._experts(expert, rest)
                self.store.release(first + 1 + expert)
                self.visited()
            if lead:
                with self.clock.phase("gate"):
                    self._leave(layer, lead)
                    if check:
                        self._left = self._look(layer, lead[0])
            self._leave(layer, rest)
        for state in (*lead, *rest):  # their memory is the next layer's
            state.routing = state.router_logits = None

    def _block(self, index: int) -> Block:
        if not self.store.waits_for(index):  # the turn is not handed over for nothing
            return self.store.get(index)
        with self.turn.away():
            return self.store.get(index)

    def _attend(
        self,
        layer: int,
        states: list[TileState],
        caches: KeptCaches | None,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        context = LayerContext(
            self.config, layer, self.weights, self.cos, self.sin, self.compute, self.scratch,
            self.record.cache_bits, caches,
        )  # fmt: skip
        for state in states:
            visit_attention(state, context)
            done()

    def _experts(self, expert: int, states: list[TileState]) -> None:
        for state in states:
            visit_expert(
                state, expert, self.weights, self.config, self.compute, self.scratch
            )  # fmt: skip

    def _leave(self, layer: int, states: list[TileState]) -> None:
        """Add the experts' sums once, and note who has become non-finite; no wait."""
        for state in states:
            self.compute.ops.leave_layer_(
                state.hidden, state.update, state.unit_of_row, state.first_bad_layer, layer
            )

    def _look(self, layer: int, state: TileState) -> _Left:
        """What `report` will say; no wait."""
        assert state.routing is not None and state.router_logits is not None
        start = state.routing.start
        used = sum(start[e + 1] > start[e] for e in range(self.config.num_local_experts))
        largest = state.hidden.abs().max().float()
        spread = state.router_logits.std(0).max().float()
        return _Left(layer, used, torch.stack((largest, spread)))

    def report(self, check: LayerCheck | None) -> None:
        """Show the lead tile, as it left the layer before, to `check`. Waits for the device."""
        if check and self._left:
            left, self._left = self._left, None
            largest, spread = left.largest_and_spread.tolist()
            self.record.experts_used.append(left.experts_used)
            check(LayerHealth(left.layer, largest, left.experts_used, spread))

    def read_head(self, states: list[TileState], read_logits: LogitsReader) -> None:
        index = len(self.store.specs) - 1
        total = sum(len(state.tile.sequences) for state in states)
        done = 0
        with self.clock.phase("logits"):
            self.weights.fill_head(self._block(index))
            self.store.release(index)
            for state in states:
                start = 0
                for number, sequence in enumerate(state.tile.sequences):
                    with self.scratch.frame():
                        logits = self._logits(state.hidden, read_rows(sequence, start))
                        read_logits(state.tile, number, sequence, logits)
                    start += sequence.rows
                    done += 1
                    self.visited.progress("logits", done, total)

    def _logits(self, hidden: Tensor, ranges: list[tuple[int, int]]) -> list[Tensor]:
        """Logits [rows, V] float32 of row ranges of a tile."""
        ops, config = self.compute.ops, self.config
        rows = torch.cat([hidden[first:last] for first, last in ranges])
        memory = self.scratch.take(*rows.shape, dtype=self.compute.dtype)
        x = ops.rms_norm(rows, self.weights.norm, config.rms_norm_eps, memory)
        memory = self.scratch.take(len(rows), config.vocab_size, dtype=torch.float32)
        logits = ops.logits(x, self.weights.lm_head, memory)
        return list(torch.split(logits, [last - first for first, last in ranges]))

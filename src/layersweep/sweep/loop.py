"""The sweep: embed, visit every layer once with all tiles, read the logits.

for each layer:   attention of every tile -> for each expert: all tiles -> leave
the lead tile (the gate) goes through a layer before the others, and is checked as it
leaves: a broken model stops at its first broken layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layersweep.checkpoint.config import ModelConfig
from layersweep.model import maths
from layersweep.stream.store import BlockStore
from layersweep.sweep.attention import (
    AttentionWeights,
    BranchCache,
    LayerContext,
    visit_attention,
)
from layersweep.sweep.experts import ExpertScratch, visit_expert
from layersweep.sweep.sequences import Sequence, Tile
from layersweep.sweep.state import TileState, read_rows


@dataclass(frozen=True)
class LayerHealth:
    """What the lead tile looked like as it left a layer."""

    layer: int
    finite: bool
    largest: float
    experts_used: int
    router_spread: float


LogitsReader = Callable[[Tile, int, Sequence, list[Tensor]], None]
LayerCheck = Callable[[LayerHealth], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Numerics:
    """How a sweep computes. `router_float`: routing weights stay float32."""

    device: torch.device
    dtype: torch.dtype
    router_float: bool = True


@dataclass
class SweepRecord:
    """What a sweep leaves besides logits.

    `cache_bits[tile name, arm]` = [bits stored, elements]; `nonfinite` = (tile name, index of
    the sequence within the tile, branch or -1 for the prefix) -> first bad layer.
    """

    cache_bits: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    nonfinite: dict[tuple[int, int, int], int] = field(default_factory=dict)
    experts_used: list[int] = field(default_factory=list)


def run_sweep(
    config: ModelConfig,
    store: BlockStore,
    numerics: Numerics,
    tiles: list[Tile],
    read_logits: LogitsReader,
    *,
    lead: Tile | None = None,
    check: LayerCheck | None = None,
    caches: dict[tuple[int, int, int], BranchCache] | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> SweepRecord:
    """Visit every block once with all `tiles`.

    `read_logits(tile, sequence index, sequence, logits per branch [rows, V] float32)` is
    called once per sequence at the end. `check` sees the lead tile after each layer and may
    raise. With `caches`, keys and values of `tiles` (of one name) are kept between sweeps.
    """
    record = SweepRecord()
    with torch.inference_mode(), store.sweep():
        sweep = _Sweep(config, store, numerics, record, caches, progress)
        groups = [([lead] if lead else []), tiles]
        states = [[sweep.state_of(tile) for tile in group] for group in groups]
        sweep.embed([state for group in states for state in group])
        for layer in range(config.num_hidden_layers):
            sweep.visit_layer(layer, states[0], states[1], check)
        sweep.read_head([*states[0], *states[1]], read_logits)
        for index, state in enumerate(states[1]):
            bad = state.nonfinite().items()
            record.nonfinite |= {(index, *where): layer for where, layer in bad}
    return record


class _Sweep:
    """One walk over the blocks. Blocks are numbered in sweep order: embed, layers, head."""

    def __init__(
        self,
        config: ModelConfig,
        store: BlockStore,
        numerics: Numerics,
        record: SweepRecord,
        caches: dict[tuple[int, int, int], BranchCache] | None,
        progress: Progress,
    ) -> None:
        self.progress, self.visits = progress, 0
        self.config, self.store, self.numerics = config, store, numerics
        self.record, self.caches = record, caches
        self.per_layer = 1 + config.num_local_experts
        self.masks: dict[tuple[int, int], Tensor] = {}
        self.scratch = ExpertScratch.allocate(
            config.hidden_size, config.intermediate_size, numerics.dtype, numerics.device
        )
        self.longest = 0

    def state_of(self, tile: Tile) -> TileState:
        longest = max(sequence.longest for sequence in tile.sequences)
        self.longest = max(self.longest, longest)
        return TileState(tile, self.config.num_attention_heads * self.config.head_dim)

    def embed(self, states: list[TileState]) -> None:
        block = self.store.get(0)
        placed = block.spec.weights["embed"]
        table = (
            block.dense("embed", self.numerics.dtype) if placed.packed else block.stored("embed")
        )
        for state in states:
            ids = torch.tensor(state.tile.ids(), device=self.numerics.device)
            state.start(table[ids].to(self.numerics.dtype))
        self.store.release(0)
        positions = torch.arange(self.longest, device=self.numerics.device)
        self.cos, self.sin = maths.rope_table(
            self.config.rope_theta, self.config.head_dim, positions
        )

    def visited(self, states: int) -> None:
        """Report progress: a visit is a tile's attention, or an expert with all tiles."""
        total = self.config.num_hidden_layers * (states + self.config.num_local_experts)
        self.visits += 1
        self.progress("sweep", self.visits, total)

    def visit_layer(
        self, layer: int, lead: list[TileState], rest: list[TileState], check: LayerCheck | None
    ) -> None:
        first = 1 + layer * self.per_layer
        weights = AttentionWeights.of(self.store.get(first), self.numerics.dtype)
        if lead:
            self._pass(layer, first, lead, weights, keep=True, check=check)
        self._pass(layer, first, rest, weights, keep=False, check=None)

    def _pass(
        self,
        layer: int,
        first: int,
        states: list[TileState],
        weights: AttentionWeights,
        *,
        keep: bool,
        check: LayerCheck | None,
    ) -> None:
        """Take `states` through a layer; unless `keep`, each block is released after use."""
        caches = None if keep else self.caches
        context = LayerContext(
            self.config, layer, self.cos, self.sin, self.numerics.router_float,
            self.masks, self.record.cache_bits, caches,
        )  # fmt: skip
        for state in states:
            visit_attention(state, weights, context)
            if not keep:
                self.visited(len(states))
        if not keep:
            self.store.release(first)
        for expert in range(self.config.num_local_experts):
            if states:
                self.scratch.fill(self.store.get(first + 1 + expert))
            for state in states:
                visit_expert(
                    state, expert, self.scratch, weights.post_attention_norm,
                    self.config.rms_norm_eps,
                )  # fmt: skip
            if not keep:
                self.store.get(first + 1 + expert)
                self.store.release(first + 1 + expert)
                self.visited(len(states))
        for state in states:
            health = self._health(layer, state) if check else None
            state.leave_layer(layer)
            if check and health:
                check(health)

    def _health(self, layer: int, state: TileState) -> LayerHealth:
        assert state.routing is not None and state.router_logits is not None
        start = state.routing.start
        used = sum(start[e + 1] > start[e] for e in range(self.config.num_local_experts))
        self.record.experts_used.append(used)
        largest = (state.hidden + state.update).abs().max().item()
        spread = state.router_logits.std(0).max().item()
        return LayerHealth(layer, largest < float("inf"), largest, used, spread)

    def read_head(self, states: list[TileState], read_logits: LogitsReader) -> None:
        index = len(self.store.specs) - 1
        block = self.store.get(index)
        norm = block.dense("norm", self.numerics.dtype)
        head = block.dense("lm_head", self.numerics.dtype)
        self.store.release(index)
        total = sum(len(state.tile.sequences) for state in states)
        done = 0
        for state in states:
            start = 0
            for number, sequence in enumerate(state.tile.sequences):
                ranges = read_rows(sequence, start)
                rows = torch.cat([state.hidden[a:b] for a, b in ranges])
                logits = _logits(maths.rms_norm(rows, norm, self.config.rms_norm_eps), head)
                parts = torch.split(logits, [b - a for a, b in ranges])
                read_logits(state.tile, number, sequence, list(parts))
                start += sequence.rows
                done += 1
                self.progress("logits", done, total)


def _logits(x: Tensor, head: Tensor) -> Tensor:
    """x [N, H] times head [V, H] transposed, in float32 (never rounded to 16 bits)."""
    if x.dtype == torch.float32:
        return maths.linear(x, head)
    return torch.mm(x, head.t(), out_dtype=torch.float32)

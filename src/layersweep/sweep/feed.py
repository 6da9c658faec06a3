"""The other half of a layer visit: a dense MLP, a shared expert, or one routed expert after the
other. One of them is dense at a time, and all tiles use it."""

from __future__ import annotations

import torch
from torch import Tensor

from layersweep.families.spec import Layer
from layersweep.families.weights import BlockShape
from layersweep.model.compute import Compute, Scratch
from layersweep.stream.shapes import rows_at_once
from layersweep.sweep.dense import DenseWeights
from layersweep.sweep.state import TileState

NORM_ROWS = 12_800  # at once


class FeedVisit:
    """One block of a layer's feed, with each tile in turn."""

    def __init__(
        self, block: BlockShape, layer: Layer, weights: DenseWeights, compute: Compute,
        scratch: Scratch,
    ) -> None:  # fmt: skip
        self.block, self.layer, self.feed = block, layer, layer.feed
        self.weights, self.compute, self.scratch = weights, compute, scratch

    def __call__(self, state: TileState) -> None:
        """Add the block's output to the tile's update buffer.

        The rows of one expert are unique, so plain indexed addition is deterministic; experts come
        in order, so the sum of a row does not depend on anything else. Its rows of a tile are one
        product; where routing is so uneven that they exceed `rows_at_once`, equal pieces of that.
        """
        size = rows_at_once(self.feed, self.block.role, state.tile.rows, cpu=self.compute.cpu)
        if self.block.expert is None:
            for first in range(0, state.tile.rows, size):
                self._all_rows(state, slice(first, min(first + size, state.tile.rows)))
            return
        routing = state.routing
        assert routing is not None
        last = routing.start[self.block.expert + 1]
        for first in range(routing.start[self.block.expert], last, size):
            some = slice(first, min(first + size, last))
            rows = routing.rows[some]
            with self.scratch.frame():
                y = self._mlp(state.hidden, rows, len(rows))[1]
                self.compute.ops.add_rows_(state.update, rows, y, routing.weights[some])

    def _all_rows(self, state: TileState, some: slice) -> None:
        with self.scratch.frame():
            x, y = self._mlp(state.hidden[some], None, some.stop - some.start)
            if "gate" in self.weights.feed:
                y.mul_(torch.sigmoid(self.compute.ops.linear(x, self.weights.feed["gate"])))
            state.update[some] += y

    def _mlp(self, hidden: Tensor, rows: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """The normed rows and down(act(gate x) * up x) of all `hidden` or of the index `rows`."""
        ops, feed, weights = self.compute.ops, self.feed, self.weights.feed
        take, dtype = self.scratch.take, self.compute.dtype
        x = self._input(hidden, rows, take(count, hidden.shape[1], dtype=dtype))
        gate_up = weights["gate_up_proj"]
        both = ops.linear(x, gate_up, take(count, len(gate_up), dtype=dtype))
        if feed.bias:
            both = both.add_(weights["gate_up_bias"])
        inner = ops.swiglu_(both, feed.act, interleaved=feed.interleaved, limit=feed.limit)
        # x has served, where nobody asks for it: its memory takes y
        free = x if "gate" not in weights else take(count, hidden.shape[1], dtype=dtype)
        y = ops.linear(inner, weights["down_proj"], free)
        return x, y.add_(weights["down_bias"]) if feed.bias else y

    def _input(self, hidden: Tensor, rows: Tensor | None, memory: Tensor) -> Tensor:
        norm = self.layer.feed_norm
        if norm is None:
            return memory.copy_(hidden if rows is None else hidden[rows])
        weight = self.weights.attention["feed_norm"]
        return self.compute.ops.rms_norm(
            hidden, weight, norm.eps, memory, rows=rows, offset=norm.offset
        )


def leave_feed(state: TileState, layer: Layer, weights: DenseWeights, compute: Compute) -> None:
    """What becomes of the sum before it is added to the hidden states."""
    norm = layer.feed_out_norm
    if norm:
        weight = weights.attention["feed_out_norm"]
        update = state.update
        for first in range(0, len(update), NORM_ROWS):
            some = update[first : first + NORM_ROWS]
            some.copy_(compute.ops.rms_norm(some, weight, norm.eps, some, offset=norm.offset))
    if layer.residual != 1.0:
        state.update *= layer.residual

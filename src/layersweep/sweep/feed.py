"""The other half of a layer visit: a dense MLP, a shared expert, or routed experts, one after the
other or, where they are small, a few together. What is dense is used by all tiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from layersweep.families.spec import Layer
from layersweep.families.weights import BlockShape
from layersweep.model.compute import Compute, Scratch
from layersweep.model.ops import Parts
from layersweep.model.routing import Routing
from layersweep.stream.shapes import rows_at_once
from layersweep.sweep.dense import DenseWeights, Views
from layersweep.sweep.state import TileState

NORM_ROWS = 12_800  # at once
Span = tuple[int, int]


class FeedVisit:
    """Some blocks of a layer's feed, whose weights are dense, with each tile in turn.

    A row's result depends on that row and on the number of rows that its expert has in the tile,
    not on who computes where: a row's sums are its own, and its experts add to it in their order.
    Where routing is so uneven that their rows exceed `rows_at_once` of each, they go in several
    runs, and an expert that exceeds all of that in pieces.
    """

    def __init__(
        self, blocks: Sequence[BlockShape], layer: Layer, weights: DenseWeights, compute: Compute,
        scratch: Scratch,
    ) -> None:  # fmt: skip
        self.blocks, self.layer, self.feed = blocks, layer, layer.feed
        self.weights, self.compute, self.scratch = weights, compute, scratch
        self.feeds = weights.feeds

    def __call__(self, state: TileState) -> None:
        """Add the blocks' outputs to the tile's update buffer."""
        role, rows = self.blocks[0].role, state.tile.rows
        size = rows_at_once(self.feed, role, rows, cpu=self.compute.cpu)
        if role != "expert":
            for first in range(0, rows, size):
                self._all_rows(state, slice(first, min(first + size, rows)))
            return
        routing = state.routing
        assert routing is not None
        experts = [block.expert for block in self.blocks if block.expert is not None]
        spans = [(routing.start[expert], routing.start[expert + 1]) for expert in experts]
        most = size * len(spans)
        for run in runs_within(spans, most):
            (first, _), (_, last) = spans[run.start], spans[run.stop - 1]
            if len(spans) > 1 and last - first <= most:
                self._together(state, routing, experts[run], spans[run], self._weights(run))
                continue
            for start in range(first, last, size):
                weights = self._weights(run)
                self._alone(state, routing, weights, start, min(start + size, last))

    def _weights(self, run: slice) -> Views:
        """Of a run of the blocks: nearly always all, and each view takes the host 3 us."""
        if run == slice(0, len(self.blocks)):
            return self.feeds
        return {key: view[run] for key, view in self.feeds.items()}

    def _together(
        self, state: TileState, routing: Routing, experts: Sequence[int], spans: Sequence[Span],
        weights: Views,
    ) -> None:  # fmt: skip
        """Experts in a run, which share all launches; their products, too, where the device can."""
        first, last = spans[0][0], spans[-1][1]
        if first == last:
            return
        with self.scratch.frame():
            rows, ends = routing.rows[first:last], routing.ends
            if experts[-1] - experts[0] == len(experts) - 1:
                ends = ends[experts[0] : experts[-1] + 1]
            else:  # those between them have no rows
                ends = ends[torch.tensor(experts, device=ends.device)]
            parts = Parts([(start - first, stop - first) for start, stop in spans], ends)
            y = self._experts(state, rows, weights, parts)
            self.compute.ops.add_places_(
                state.update, routing.places, first, y, routing.weights[first:last]
            )

    def _alone(
        self, state: TileState, routing: Routing, weights: Views, first: int, last: int
    ) -> None:
        """Rows of one expert. They are unique, so plain indexed addition is deterministic."""
        with self.scratch.frame():
            rows, parts = routing.rows[first:last], Parts([(0, last - first)])
            y = self._experts(state, rows, weights, parts)
            self.compute.ops.add_rows_(state.update, rows, y, routing.weights[first:last])

    def _all_rows(self, state: TileState, some: slice) -> None:
        weights, parts = self.feeds, Parts([(0, some.stop - some.start)])
        hidden, update = state.hidden[some], state.update[some]
        with self.scratch.frame():
            x = self._input(hidden, None, self._take(len(hidden)))
            if self.blocks[0].role == "mlp":  # alone in its layer: the update is zero so far
                self._mlp(x, None, update, weights, parts)
                return
            # x is asked for once more where there is a gate, else its memory takes y
            free = self._take(len(hidden)) if "gate" in weights else x
            y = self._mlp(x, None, free, weights, parts)
            if "gate" in weights:
                y.mul_(torch.sigmoid(self.compute.ops.linear(x, weights["gate"][0])))
            update += y

    def _experts(self, state: TileState, rows: Tensor, weights: Views, parts: Parts) -> Tensor:
        """What experts make of the tile's rows of the index `rows`."""
        y = self._take(len(rows))
        if state.normed is not None and parts.ends is not None:
            return self._mlp(state.normed, rows, y, weights, parts)
        x = self._input(state.hidden, rows, y)  # has served before its memory takes y
        return self._mlp(x, None, y, weights, parts)

    def _mlp(
        self, x: Tensor, rows: Tensor | None, out: Tensor, weights: Views, parts: Parts
    ) -> Tensor:
        """down(act(gate x) * up x) of normed rows, all or those of the index `rows`, each part by
        weights of its own, in `out`."""
        ops, feed = self.compute.ops, self.feed
        width = weights["gate_up_proj"].shape[1]
        both = self.scratch.take(len(out), width, dtype=self.compute.dtype)
        both = self._products(x, both, "gate_up", weights, parts, rows)
        inner = ops.swiglu_(both, feed.act, interleaved=feed.interleaved, limit=feed.limit)
        return self._products(inner, out, "down", weights, parts)

    def _products(
        self, x: Tensor, out: Tensor, name: str, weights: Views, parts: Parts,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Rows of `parts` times the weights `name`, with their biases."""
        biases = weights[f"{name}_bias"] if self.feed.bias else None
        return self.compute.ops.products(x, weights[f"{name}_proj"], biases, parts, out, rows)

    def _take(self, rows: int) -> Tensor:
        """Scratch for rows that go in or come out."""
        width = self.feeds["down_proj"].shape[1]
        return self.scratch.take(rows, width, dtype=self.compute.dtype)

    def _input(self, hidden: Tensor, rows: Tensor | None, memory: Tensor) -> Tensor:
        norm = self.layer.feed_norm
        if norm is None:
            return memory.copy_(hidden if rows is None else hidden[rows])
        weight = self.weights.attention["feed_norm"]
        return self.compute.ops.rms_norm(
            hidden, weight, norm.eps, memory, rows=rows, offset=norm.offset
        )


def runs_within(spans: Sequence[Span], most: int) -> Iterator[slice]:
    """Spans in runs of at most `most` rows; one that has more is a run of its own."""
    first = 0
    for at in range(1, len(spans) + 1):
        if at == len(spans) or spans[at][1] - spans[first][0] > most:
            yield slice(first, at)
            first = at


def experts_used(states: Iterable[TileState]) -> set[int]:
    """Those that any row of these tiles goes to. Routing is settled."""
    found: set[int] = set()
    for routing in (state.routing for state in states):
        if routing is not None:
            start = routing.start
            found.update(e for e in range(len(start) - 1) if start[e + 1] > start[e])
    return found


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


def groups_of(
    numbers: Sequence[int], blocks: Sequence[BlockShape], experts_at_once: int
) -> Iterator[list[int]]:
    """Numbers of a layer's feed blocks, those that are visited together in one list."""
    first = 0
    while first < len(numbers):
        last = first + 1
        while (
            last < min(len(numbers), first + experts_at_once)
            and blocks[first].role == blocks[last].role == "expert"
        ):
            last += 1
        yield list(numbers[first:last])
        first = last

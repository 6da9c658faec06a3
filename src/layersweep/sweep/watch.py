"""What attention was made of in one layer, for whoever measures it while a sweep runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.store import KvStore
from layersweep.model import maths
from layersweep.sweep.context import LayerContext, Table
from layersweep.sweep.heads import Streams, read
from layersweep.sweep.sequences import Group

QUERIES = 64  # at a time: their weights are held in float32, for all heads


@dataclass(frozen=True)
class Attended:
    """A group of equal-shaped sequences after attention, before the output projection. It is gone
    when the watcher returns.

    q [B, Q, rows, D] turned and out [B, Q, rows, D of a value]: rows of the prefix, then of each
    branch. `own`: exact streams of the first branch; `past`: of the prefix from position `first`
    on, and `store` the same as the branches' arms keep it, in the order of the branches.
    """

    group: Group
    q: Tensor
    out: Tensor
    own: Streams
    past: Streams
    store: KvStore
    first: int
    table: Table | None
    context: LayerContext

    @property
    def layer(self) -> int:
        return self.context.index

    def branch(self, index: int) -> slice:
        """Rows of a branch; all are as long as the first."""
        sequence = self.group.sequences[0]
        length = len(sequence.branches[0].ids)
        start = len(sequence.prefix) + index * length
        return slice(start, start + length)

    def divergence(self, index: int) -> Tensor:
        """KL(exact || coded) of attention, nats, [B, Q, T]: of the first branch's queries, which
        an exact past made, over the keys as branch `index` stores them and its own, exact ones."""
        exact, coded = (self._keys(past) for past in (self.past, self.store.decoded(index)))
        q = self.q[:, :, self.branch(0)]
        seen = maths.branch_mask(q.shape[2], exact.shape[2], q.device, self.context.rule.window)
        pieces = []
        for first in range(0, q.shape[2], QUERIES):
            some, mask = q[:, :, first : first + QUERIES], seen[first : first + QUERIES]
            both = (self._weights(some, keys, mask) for keys in (exact, coded))
            pieces.append(_divergence(*both))
        return torch.cat(pieces, dim=2)

    def _keys(self, past: Streams) -> Tensor:
        """Turned keys of a past and of the first branch. The scratch is planned for one of them."""
        with self.context.scratch.frame():
            return read([past, self.own], self.first, self.table, self.context)[0].clone()

    def _weights(self, q_BQTD: Tensor, k_BGSD: Tensor, mask: Tensor) -> Tensor:
        """What each key's value counts for, [B, Q, T, S] float32; with a sink's share, which is no
        key's, in one more column."""
        rule, (batch, heads, queries, dim) = self.context.rule, q_BQTD.shape
        groups, keys = k_BGSD.shape[1:3]
        scores = q_BQTD.float().reshape(batch, groups, -1, dim) @ k_BGSD.float().mT
        scores = scores.view(batch, heads, queries, keys).mul_(rule.scale or dim**-0.5)
        weights = maths.score_weights(scores, mask, rule.softcap, self.context.sinks)
        if self.context.sinks is None:
            return weights
        return torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), dim=-1)


Watch = Callable[[Attended], None]


def _divergence(exact: Tensor, coded: Tensor) -> Tensor:
    """Sum of p ln(p / p^) over the last dimension."""
    tiny = torch.finfo(torch.float32).tiny
    return (exact * (exact.clamp(min=tiny) / coded.clamp(min=tiny)).log()).sum(-1)

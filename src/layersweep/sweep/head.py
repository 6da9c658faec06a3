"""The last visit of a sweep: logits of the positions that are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.families.spec import Decoder
from layersweep.model.compute import Compute, Scratch
from layersweep.sweep.dense import Views
from layersweep.sweep.record import Piece
from layersweep.sweep.state import Rows, lots_of, pieces_of


@dataclass(frozen=True)
class Head:
    """The last norm and the head, whose `weights` are dense."""

    decoder: Decoder
    weights: Views
    compute: Compute
    scratch: Scratch

    def pieces(self, hidden: Tensor, ranges: list[Rows], at_once: int) -> Iterator[Piece]:
        """Of row ranges of a tile, one per branch, `at_once` rows of each at a time."""
        for positions, rows in pieces_of(ranges, at_once):
            with self.scratch.frame():
                logits = self._logits(hidden, rows)
                yield positions, list(torch.split(logits, [last - first for first, last in rows]))

    def in_a_row(self, hidden: Tensor, ranges: list[Rows], at_once: int) -> Iterator[Piece]:
        """Of the rows of all ranges, as if they followed one another in one branch."""
        start = 0
        for rows in lots_of(ranges, at_once):
            with self.scratch.frame():
                logits = self._logits(hidden, rows)
                yield slice(start, start + len(logits)), [logits]
                start += len(logits)

    def _logits(self, hidden: Tensor, ranges: list[Rows]) -> Tensor:
        """Logits [rows of all ranges, V] float32."""
        ops, decoder, take = self.compute.ops, self.decoder, self.scratch.take
        rows = torch.cat([hidden[first:last] for first, last in ranges])
        memory, norm = take(*rows.shape, dtype=self.compute.dtype), decoder.norm
        x = ops.rms_norm(rows, self.weights["norm"], norm.eps, memory, offset=norm.offset)
        memory = take(len(rows), decoder.vocab_size, dtype=torch.float32)
        logits = ops.logits(x, self.weights["lm_head"], memory)
        if decoder.logit_scale != 1.0:
            logits = logits.mul_(decoder.logit_scale)
        if decoder.logit_softcap is not None:
            cap = decoder.logit_softcap
            logits = logits.div_(cap).tanh_().mul_(cap)
        return logits

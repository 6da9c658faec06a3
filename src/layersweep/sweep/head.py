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
from layersweep.sweep.state import Rows, pieces_of


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
                yield positions, self._logits(hidden, rows)

    def _logits(self, hidden: Tensor, ranges: list[Rows]) -> list[Tensor]:
        """Logits [rows, V] float32."""
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
        return list(torch.split(logits, [last - first for first, last in ranges]))

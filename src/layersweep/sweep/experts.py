"""The expert half of a layer visit: one expert is dense at a time, all tiles use it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.model import maths
from layersweep.stream.blocks import Block
from layersweep.stream.plan import CPU_EXPERT_ROWS
from layersweep.sweep.state import TileState


@dataclass
class ExpertScratch:
    """Memory for one dense expert, reused for every expert: w13 [2I, H] and w2 [H, I]."""

    w13: Tensor
    w2: Tensor

    @classmethod
    def allocate(
        cls, hidden: int, inner: int, dtype: torch.dtype, device: torch.device
    ) -> ExpertScratch:
        return cls(
            torch.empty(2 * inner, hidden, dtype=dtype, device=device),
            torch.empty(hidden, inner, dtype=dtype, device=device),
        )

    def fill(self, block: Block) -> None:
        inner = self.w2.shape[1]
        block.dense("w1", self.w13.dtype, out=self.w13[:inner])
        block.dense("w3", self.w13.dtype, out=self.w13[inner:])
        block.dense("w2", self.w2.dtype, out=self.w2)


def visit_expert(
    state: TileState, expert: int, scratch: ExpertScratch, norm: Tensor, eps: float
) -> None:
    """Add an expert's weighted output to the tile's update buffer.

    The rows of one expert are unique, so plain indexed addition is deterministic; experts
    come in order, so the sum of a row does not depend on anything else.
    """
    routing = state.routing
    assert routing is not None
    chosen = slice(routing.start[expert], routing.start[expert + 1])
    rows, share = routing.rows[chosen], routing.weights[chosen]
    # pieces do not change a row: it does not depend on its neighbours (MIN_GEMM_ROWS)
    size = CPU_EXPERT_ROWS if rows.device.type == "cpu" else max(1, len(rows))
    for at in range(0, len(rows), size):
        some, weight = rows[at : at + size], share[at : at + size, None]
        x = maths.rms_norm(state.hidden[some], norm, eps)
        y = maths.swiglu(x, scratch.w13, scratch.w2)
        state.update[some] += (y * weight).to(y.dtype)

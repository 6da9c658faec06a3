"""The expert half of a layer visit: one expert is dense at a time, all tiles use it."""

from __future__ import annotations

from layersweep.checkpoint.config import ModelConfig
from layersweep.model.compute import Compute, Scratch
from layersweep.stream.shapes import expert_piece
from layersweep.sweep.dense import DenseWeights
from layersweep.sweep.state import TileState


def visit_expert(
    state: TileState,
    expert: int,
    weights: DenseWeights,
    config: ModelConfig,
    compute: Compute,
    scratch: Scratch,
) -> None:
    """Add an expert's weighted output to the tile's update buffer.

    The rows of one expert are unique, so plain indexed addition is deterministic; experts come
    in order, so the sum of a row does not depend on anything else. Its rows of a tile are one
    product; where routing is so uneven that they exceed `expert_piece`, equal pieces of that.
    """
    ops, routing = compute.ops, state.routing
    assert routing is not None
    first, last = routing.start[expert], routing.start[expert + 1]
    size = expert_piece(config, state.tile.rows, cpu=compute.cpu)
    hidden, inner = config.hidden_size, config.intermediate_size
    for at in range(first, last, size):
        some = slice(at, min(at + size, last))
        rows, share = routing.rows[some], routing.weights[some]
        count, dtype = len(rows), compute.dtype
        with scratch.frame():
            x = scratch.take(count, hidden, dtype=dtype)
            x = ops.rms_norm(
                state.hidden, weights.post_attention_norm, config.rms_norm_eps, x, rows=rows
            )
            gate_up = scratch.take(count, 2 * inner, dtype=dtype)
            inner_rows = ops.swiglu_(ops.linear(x, weights.w13, gate_up))
            y = ops.linear(inner_rows, weights.w2, x)  # x has served: its memory takes y
            ops.add_rows_(state.update, rows, y, share)

"""How many sweeps a run takes whose numbers are written down as they finish.

What is lost when it is killed is the sweep under way, so a sweep should be short; but each one
visits all weights again.
"""

from __future__ import annotations

from collections.abc import Callable

from layersweep.probes import TILE_ROWS, cpu_gemm_rate, cuda_gemm_rate
from layersweep.stream.plan import Plan
from layersweep.stream.rates import sweep_seconds
from layersweep.stream.shapes import CPU_EXPERT_ROWS
from layersweep.sweep.model import Model

LOSS_S = 300.0  # at most, of predicted time
REPEATED_SHARE = 0.03  # at most, of predicted time, for reading weights again
# Assumed, and slow: weights that do not fit the host are read from disk in every sweep.
H2D, DISK = 5e9, 0.3e9


def sized_plan(plan_of: Callable[[int], Plan], tiles: int, device: str, gemm_flops: float) -> Plan:
    """The plan with the fewest sweeps of at most LOSS_S each; fewer and longer ones where all of
    them together would take more than REPEATED_SHARE longer.

    `plan_of(n)` plans at least n sweeps; a sweep has one of the `tiles` at least.
    """

    def seconds(plan: Plan) -> list[float]:
        return sweep_seconds(plan, device, gemm_flops, H2D, DISK)

    chosen = plan_of(1)
    most = (1 + REPEATED_SHARE) * sum(seconds(chosen))
    for count in range(len(chosen.sweeps) + 1, tiles + 1):
        if max(seconds(chosen)) <= LOSS_S:
            break
        plan = plan_of(count)
        if sum(seconds(plan)) > most:
            break
        chosen = plan
    return chosen


def gemm_rate(model: Model) -> float:
    """FLOP/s of this machine on the expert's own product, the ceiling that a run is held to."""
    decoder = model.checkpoint.decoder
    if model.cpu:
        shape = (CPU_EXPERT_ROWS, decoder.hidden_size, 2 * decoder.widest_inner)
        return cpu_gemm_rate(shape)
    shape = (TILE_ROWS, decoder.hidden_size, 2 * decoder.widest_inner)
    return cuda_gemm_rate(str(model.compute.device), shape, 0.3)

"""`bench sweep`: one sweep bound by the bus, and one bound by arithmetic.

Weights lie in pinned host memory; a first sweep, not timed, puts them there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from layersweep.bench.ceilings import gemm_ceiling
from layersweep.kv.arms import EXACT
from layersweep.stream.plan import host_ring_bytes, place
from layersweep.stream.runs import runs_of
from layersweep.stream.shapes import tile_flops
from layersweep.sweep.engine import Engine
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.model import Model
from layersweep.sweep.record import Pieces
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile, tiles_of
from layersweep.sweep.shapes import tile_shape

Json = dict[str, Any]
FEW_TOKENS = 64
MANY_LENGTH, MANY_TILES, TILE = 2048, 5, 20
REPEATS = 3


def bench_sweep(model: Model, *, say: Callable[[str], None]) -> list[Json]:
    """Rows "bus" and "arithmetic", each the median of 3 sweeps."""
    decoder = model.checkpoint.decoder
    with model.compute.numerics():
        say("measuring the rate of products")
        gemm = gemm_ceiling(decoder, model.compute.device, model.compute.dtype)
    few = [Tile("few", (_ride(decoder.vocab_size, FEW_TOKENS, 0),))]
    rides = [_ride(decoder.vocab_size, MANY_LENGTH, seed) for seed in range(MANY_TILES * TILE)]
    many = tiles_of("many", rides, TILE)
    engine = _open(model, many)
    try:
        say("first sweep: fills the host store")
        run_sweep(engine, few, _ignore)
        rate = engine.store.measure_h2d()
        assert rate is not None
        bus = _median_sweep(engine, few)
        bus["pinned_gbps"] = rate / 1e9
        bus["share_of_pinned_rate"] = bus["bytes_copied"] / bus["wall_s"] / rate
        say("arithmetic")
        arithmetic = _median_sweep(engine, many)
        width = decoder.query_width
        flops = sum(tile_flops(decoder, tile_shape(tile, width)) for tile in many)
        arithmetic |= {
            "flops": flops,
            "gemm_ceiling_tflops": gemm / 1e12,
            "share_of_gemm_rate": flops / arithmetic["wall_s"] / gemm,
        }
        fallbacks = [fallback._asdict() for fallback in engine.store.fallbacks]
    finally:
        engine.close()
    shared = {"host": "pinned" if not fallbacks else "see fallbacks", "fallbacks": fallbacks}
    return [{"job": "bus", **bus, **shared}, {"job": "arithmetic", **arithmetic, **shared}]


def _ride(vocabulary: int, length: int, seed: int) -> BranchedSequence:
    """Random tokens, of which the last one's logits are read."""
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist())
    return BranchedSequence((), (Branch(EXACT, ids, (length - 1, length)),))


def _open(model: Model, tiles: list[Tile]) -> Engine:
    """An engine that keeps all weights in host memory and none on the device."""
    runs = runs_of(model.specs)
    placement = place(runs, model.machine, host_ring_bytes(runs, model.machine), room=0)
    return model.open(replace(model.plan(tiles), placement=placement))


def _median_sweep(engine: Engine, tiles: list[Tile]) -> Json:
    runs: list[Json] = []
    for _ in range(REPEATS):
        store = engine.store
        copied, stalled, copying = store.h2d_bytes, store.stall_s, store.copy_s
        started = time.perf_counter()
        record = run_sweep(engine, tiles, _ignore)
        wall = time.perf_counter() - started
        bytes_copied = store.h2d_bytes - copied
        runs.append({
            "wall_s": wall,
            "bytes_copied": bytes_copied,
            "copy_gbps": bytes_copied / (store.copy_s - copying) / 1e9,
            "stall_fraction": (store.stall_s - stalled) / wall,
            "phases": record.seconds,
            "tokens": sum(tile.rows for tile in tiles),
        })  # fmt: skip
    return sorted(runs, key=lambda run: float(run["wall_s"]))[len(runs) // 2]


def _ignore(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
    for _ in pieces:  # computes them
        pass

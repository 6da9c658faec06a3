"""`bench study`: the main job at full size, against the floor of the same run.

The clock runs from the first weight byte asked for until results.json is in place. Kernels and
context are warm (a job of one tile ran before) and the text is tokenized; everything else counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from layersweep.bench.ceilings import disk_rate, evict, gemm_ceiling
from layersweep.environment import versions
from layersweep.report.store import write_results
from layersweep.stream.plan import Plan
from layersweep.stream.rates import planned_seconds
from layersweep.study.results import build_results
from layersweep.study.run import StudyRun
from layersweep.study.study import prepare_study
from layersweep.sweep.model import Model
from layersweep.tasks.needle.task import TILE_TRIALS
from layersweep.tasks.perplexity.task import TILE_SEGMENTS
from layersweep.tasks.settings import EvalSettings

Json = dict[str, Any]
Say = Callable[[str], None]
DISK_BYTES = 6 * 10**9  # of the checkpoint are read to measure the disk


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of the products; bytes/s of the disk where files were evicted, else None."""

    gemm: float
    disk: float | None


def bench_study(model: Model, settings: EvalSettings, *, cold: bool, say: Say) -> list[Json]:
    """One row per task of `settings`. `cold`: files are evicted before each measured run."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(long_text(settings.segments or 0, settings.prefix + settings.continuation))
        settings = replace(settings, text=str(text))
        ceilings = measure_ceilings(model, cold=cold, say=say)
        for task in settings.tasks:
            say(f"{task}: warm-up")
            job = replace(settings, tasks=(task,))
            _run(model, one_tile(job), ceilings, Path(folder))
            if cold:
                evict(model.checkpoint.files)
            say(f"{task}: measured run")
            rows.append(_run(model, job, ceilings, Path(folder)))
    return rows


def measure_ceilings(model: Model, *, cold: bool, say: Say) -> Ceilings:
    """Rates of this machine, in this process."""
    say("measuring the rate of products")
    with model.compute.numerics():
        gemm = gemm_ceiling(model.checkpoint.decoder, model.compute.device, model.compute.dtype)
    disk = None
    if cold:
        say("measuring the disk")
        evict(model.checkpoint.files)
        disk = disk_rate(model.specs, DISK_BYTES)
    return Ceilings(gemm, disk)


def long_text(segments: int, tokens: int) -> str:
    """The bundled text, repeated until it holds `segments` windows of `tokens` (2 characters a
    token at least, by any tokenizer), and enough for haystacks."""
    held_out = resources.files("layersweep.demo") / "text" / "heldout.txt"
    text = held_out.read_text("utf-8")
    return text * (1 + 5 * max(segments, 100) * tokens // len(text))


def one_tile(settings: EvalSettings) -> EvalSettings:
    per_depth = -(-TILE_TRIALS // len(settings.niah_depths))
    return replace(settings, segments=TILE_SEGMENTS, niah_per_depth=per_depth)


def _run(model: Model, settings: EvalSettings, ceilings: Ceilings, folder: Path) -> Json:
    study = prepare_study(model, settings)
    versions()  # asks other programs once: a run has printed them before its clock starts
    with StudyRun(study) as run:
        outcome = run.measure(gemm_flops=ceilings.gemm)
        results = build_results(study, outcome, command="layersweep bench study")
        write_results(folder, results)
        wall = time.perf_counter() - outcome.started
    floors = floor(study.plan, ceilings, outcome.h2d_rate)
    return {
        "job": "+".join(settings.tasks),
        **_sizes(study.plan, results),
        **results["performance"],
        **floors,
        "wall_s": wall,
        "ratio": wall / floors["floor_s"],
        "planned_s": planned_seconds(
            study.plan, model.compute.device.type, ceilings.gemm, outcome.h2d_rate, ceilings.disk
        ),
        "gate_passed": results["gate"]["passed"] if results["gate"] else None,
        "host": results["paths"]["host"],
        "fallbacks": results["fallbacks"],
    }


def floor(plan: Plan, ceilings: Ceilings, h2d: float | None) -> dict[str, float]:
    """The least time a plan can take: computing, copying and reading at measured rates."""
    floors = {"compute_floor_s": plan.flops / ceilings.gemm}
    if h2d:
        floors["copy_floor_s"] = plan.bytes_to_copy / h2d
    if ceilings.disk:
        floors["disk_floor_s"] = plan.bytes_to_read / ceilings.disk
    rates = {"disk_gbps": ceilings.disk / 1e9} if ceilings.disk else {}
    return {**floors, "floor_s": max(floors.values()), **rates}


def _sizes(plan: Plan, results: Json) -> Json:
    return {
        "tiles_per_sweep": [len(sweep) for sweep in plan.sweeps],
        "planned_peaks": plan.peaks,
        "segments": results["protocol"]["segments"],
        "needles": len(results["needle"]["trials"]) if results["needle"] else None,
        "bytes_to_copy": plan.bytes_to_copy,
        "bytes_to_read": plan.bytes_to_read,
    }

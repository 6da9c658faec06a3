"""`bench study --device cuda:0,cuda:1`: the study with a process for each device, against one in
the same call, and whether both gave the same numbers.

The clock runs from the first weight byte that any process asks for to the merged results.json in
place. Kernels and contexts are warm, as in study.py.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from layersweep.bench.study import Say, floor, long_text, measure_ceilings, one_tile
from layersweep.evals.finished import pack
from layersweep.evals.manifest import manifest_of
from layersweep.evals.merge import StudyPart, merge
from layersweep.evals.results import build_results
from layersweep.evals.run import StudyRun, run_study
from layersweep.evals.settings import EvalSettings
from layersweep.evals.shard import Shard
from layersweep.evals.study import prepare_study
from layersweep.report.store import write_results
from layersweep.sweep.model import load
from layersweep.units import parse_size

Json = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Of one device."""

    source: str
    vram: str
    ram: str
    assume_capability: str | None


@dataclass(frozen=True)
class Part:
    """What a process has measured. `started`: time.perf_counter, one for all of a host."""

    part: StudyPart
    started: float
    floors: Json
    host_bytes: int


def bench_devices(place: Place, devices: list[str], settings: EvalSettings, say: Say) -> list[Json]:
    """A row per task for the first device and one for all of them, with the speed-up."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(long_text(settings.segments or 0, settings.prefix + settings.continuation))
        for task in settings.tasks:
            job = replace(settings, text=str(text), tasks=(task,))
            runs = []
            for names in (devices[:1], devices):
                say(f"{task}: {len(names)} device(s)")
                runs.append(_run(place, names, job, Path(folder)))
            (one, first), (all_of_them, several) = runs
            several["speedup"] = first["wall_s"] / several["wall_s"]
            several["same_numbers"] = _numbers(one) == _numbers(all_of_them)
            rows += [first, several]
    return rows


def _run(place: Place, devices: list[str], job: EvalSettings, folder: Path) -> tuple[Json, Json]:
    """The merged results of a process for each device, and the row that is printed."""
    context = multiprocessing.get_context("spawn")
    count = len(devices)
    barrier, queue = context.Barrier(count), context.SimpleQueue()
    workers = [
        context.Process(
            target=_measure,
            args=(place, device, job, Shard(rank + 1, count, rank, count), barrier, queue),
        )
        for rank, device in enumerate(devices)
    ]
    for worker in workers:
        worker.start()
    parts = [_next(queue, workers) for _ in workers]
    parts.sort(key=lambda part: part.part.shard)
    merged = merge([part.part for part in parts], command="layersweep bench study")
    write_results(folder, merged.results)
    wall = time.perf_counter() - min(part.started for part in parts)
    for worker in workers:
        worker.join()
    shards = merged.results["performance"].pop("shards")
    floors = max(part.floors["floor_s"] for part in parts)
    row = {
        "job": f"{job.tasks[0]} on {count}",
        "devices": count,
        **merged.results["performance"],
        "wall_s": wall,
        "floor_s": floors,
        "ratio": wall / floors,
        "host_weight_bytes": sum(part.host_bytes for part in parts),
        "wall_s_of_each": [one["wall_s"] for one in shards],
        "phases_of_each": [one["phases"] for one in shards],
    }
    return merged.results, row


def _next(queue: SimpleQueue[Part], workers: Sequence[Any]) -> Part:
    while queue.empty():
        if any(worker.exitcode for worker in workers):
            raise SystemExit("a process failed: see above")
        time.sleep(0.01)
    return queue.get()


def _measure(
    place: Place,
    device: str,
    settings: EvalSettings,
    shard: Shard,
    barrier: Barrier,
    queue: SimpleQueue[Part],
) -> None:
    """One process: warm up, wait for the others, measure."""
    model = load(
        place.source, vram=place.vram, ram=place.ram, device=device,
        assume_capability=place.assume_capability, sharers=shard.local_size,
    )  # fmt: skip
    if not model.cpu:
        import torch

        limit = parse_size(place.vram) / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(limit, device)
    ceilings = measure_ceilings(model, cold=False, say=lambda line: None)
    run_study(prepare_study(model, one_tile(settings)), gemm_flops=ceilings.gemm)
    study = prepare_study(model, settings, shard=shard)
    with StudyRun(study) as run:
        barrier.wait()
        outcome = run.measure(gemm_flops=ceilings.gemm)
        results = build_results(study, outcome, command="layersweep bench study")
        sweeps = {"sweeps/0000": pack(study.record, study.done)}
        part = StudyPart(
            device, str(shard), manifest_of(study), study.record.facts(), results, sweeps
        )
        floors = floor(study.plan, ceilings, outcome.h2d_rate)
        queue.put(Part(part, outcome.started, floors, study.plan.host_bytes))


def _numbers(results: Json) -> Json:
    """Everything that is measured of the model."""
    return {name: results[name] for name in ("perplexity", "needle")}

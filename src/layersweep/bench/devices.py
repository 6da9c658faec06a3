"""`bench study --device cuda:0,cuda:1`: times a study on one device and on all, in turn, in the
same processes, and checks that all runs gave the same numbers.

The clock runs from the first weight byte that any process asks for until results.json is in place
(the merged one of several devices). Kernels, contexts and the code that writes results are warm.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

from layersweep.bench.study import Say, floor, long_text, measure_ceilings, one_tile
from layersweep.report.store import write_results
from layersweep.runs.finished import pack
from layersweep.runs.merge import ShardOutput, merge
from layersweep.runs.shard import WHOLE, Shard
from layersweep.study.manifest import manifest_of
from layersweep.study.results import build_results
from layersweep.study.run import StudyRun
from layersweep.study.study import prepare_study
from layersweep.sweep.model import load
from layersweep.tasks.registry import TASKS
from layersweep.tasks.settings import EvalSettings
from layersweep.units import parse_size

Json = dict[str, Any]
PAIRS = 3


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

    part: ShardOutput
    started: float
    ended: float
    floors: Json
    host_bytes: int


def bench_devices(
    place: Place, devices: list[str], settings: EvalSettings, say: Say, pairs: int = PAIRS
) -> list[Json]:
    """A row per task for the first device and one for all of them, the run of the median time of
    each, with the median of the speed-ups of `pairs` runs one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(long_text(settings.segments or 0, settings.prefix + settings.continuation))
        settings = replace(settings, text=str(text))
        jobs = [replace(settings, tasks=(task,)) for task in settings.tasks]
        with _Workers(place, devices, jobs, pairs, Path(folder)) as workers:
            say("warm-up")
            workers.warm_up(len(jobs))
            rows = []
            for job in jobs:
                runs = []
                for pair in range(pairs):
                    say(f"{job.tasks[0]}: pair {pair + 1} of {pairs}")
                    runs.append((workers.run(job, 1), workers.run(job, len(devices))))
                rows += _rows(runs)
    return rows


def _rows(pairs: list[tuple[tuple[Json, Json], tuple[Json, Json]]]) -> list[Json]:
    """What is printed of (results, row) of one device and of several, in pairs."""
    numbers = [_numbers(results) for pair in pairs for results, _ in pair]
    ones, several = ([pair[side][1] for pair in pairs] for side in (0, 1))
    middle = [
        sorted(rows, key=lambda row: row["wall_s"])[len(pairs) // 2] for rows in (ones, several)
    ]
    speedups = [one["wall_s"] / all_["wall_s"] for one, all_ in zip(ones, several, strict=True)]
    for row, rows in zip(middle, (ones, several), strict=True):
        row["walls_s"] = [one["wall_s"] for one in rows]
    middle[1] |= {
        "speedups": speedups,
        "speedup": statistics.median(speedups),
        "same_numbers": all(one == numbers[0] for one in numbers),
    }
    return middle


class _Workers:
    """A process for each device. In every round, all of them or the first one alone measures."""

    def __init__(
        self, place: Place, devices: list[str], jobs: list[EvalSettings], pairs: int, folder: Path
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder, self.count = folder, len(devices)
        self._barrier, self._queue = context.Barrier(self.count + 1), context.SimpleQueue()
        self._processes = [
            context.Process(
                target=_work_or_abort,
                args=(place, device, jobs, pairs, Shard(rank + 1, self.count, rank, self.count),
                      folder, self._barrier, self._queue),
            )
            for rank, device in enumerate(devices)
        ]  # fmt: skip

    def __enter__(self) -> _Workers:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *failure: object) -> None:
        for process in self._processes:
            if failure[0] is not None:
                process.terminate()
            process.join()

    def warm_up(self, jobs: int) -> None:
        for part in self._parts(self.count * jobs):
            write_results(self.folder, merge([part.part], command="warm-up").results)

    def run(self, job: EvalSettings, count: int) -> tuple[Json, Json]:
        """A round of `count` devices: the merged results, and the row that is printed."""
        self._meet()
        parts = sorted(self._parts(count), key=lambda part: part.part.shard)
        merged = merge([part.part for part in parts], command="layersweep bench study")
        write_results(self.folder, merged.results)
        ended = parts[0].ended if count == 1 else time.perf_counter()
        self._meet()
        wall = ended - min(part.started for part in parts)
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

    def _meet(self) -> None:
        try:
            self._barrier.wait()
        except BrokenBarrierError:
            raise SystemExit("a process failed: see above") from None

    def _parts(self, count: int) -> list[Part]:
        return [self._next() for _ in range(count)]

    def _next(self) -> Part:
        while self._queue.empty():
            if any(process.exitcode for process in self._processes):
                raise SystemExit("a process failed: see above")
            time.sleep(0.002)
        part: Part = self._queue.get()
        return part


def _work_or_abort(*args: Any) -> None:
    with ExitStack() as failed:
        failed.callback(args[-2].abort)  # nobody waits for this process any more
        _work(*args)
        failed.pop_all()


def _work(
    place: Place,
    device: str,
    jobs: Sequence[EvalSettings],
    pairs: int,
    shard: Shard,
    folder: Path,
    barrier: Barrier,
    queue: SimpleQueue[Part],
) -> None:
    """One process: warm up, then in every pair of each job measure alone, if it is the first one,
    and together with the others. Alone, it writes the results."""
    first = shard.local_rank == 0
    models = {
        count: load(
            place.source, vram=place.vram, ram=place.ram, device=device,
            assume_capability=place.assume_capability, sharers=count,
        )
        for count in ((1, shard.of) if first else (shard.of,))
    }  # fmt: skip
    together = models[shard.of]
    if not together.cpu:
        import torch

        limit = parse_size(place.vram) / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(limit, device)
    ceilings = measure_ceilings(together, cold=False, say=lambda line: None)

    def measure(settings: EvalSettings, shard: Shard, ready: Callable[[], object]) -> None:
        """Hands its part on before memory is given back, as one device's clock stops there, too."""
        study = prepare_study(models.get(shard.of, together), settings, shard=shard)
        manifest = manifest_of(study)
        with StudyRun(study) as run:
            ready()
            outcome = run.measure(gemm_flops=ceilings.gemm)
            results = build_results(study, outcome, command="layersweep bench study")
            if shard.of == 1:
                write_results(folder / device, results)
            ended = time.perf_counter()
            sweeps = {"sweeps/0000": pack(study.record, study.done)}
            left = ShardOutput(
                shard.folder, str(shard), manifest, study.record.facts(), results, sweeps
            )
            floors = floor(study.plan, ceilings, outcome.h2d_rate)
            queue.put(Part(left, outcome.started, ended, floors, study.plan.host_bytes))

    for job in jobs:
        measure(one_tile(job), WHOLE, lambda: None)
    for job in jobs:
        for _ in range(pairs):
            for share in (WHOLE, shard):
                if first or share.of > 1:
                    measure(job, share, barrier.wait)
                else:
                    barrier.wait()
                barrier.wait()  # the results are in place


def _numbers(results: Json) -> Json:
    """Everything that is measured of the model."""
    return {kind.name: results[kind.name] for kind in TASKS}

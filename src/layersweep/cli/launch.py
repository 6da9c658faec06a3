"""`--device cuda:0,cuda:1`: a process per device, as torchrun would start them, and their result.

Threads would wait for each other's interpreter at every one of a sweep's many short launches.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from layersweep.cli.exits import exit_code
from layersweep.cli.job import Job, compute, interrupted
from layersweep.cli.shards import Say, check_counts, collect, in_shards, keep_refusal
from layersweep.errors import (
    GateError,
    InputError,
    Interrupted,
    LayersweepError,
    MachineError,
    NoRoomTogether,
)
from layersweep.runs.shard import Shard

PR_SET_PDEATHSIG = 1
START_TIMEOUT_S = 3600.0  # of the slowest process, with its kernels to compile


class WorkerError(LayersweepError):
    """A worker's own failure, told once."""

    def __init__(self, message: str, hint: str, code: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = code


def launch(job: Job, say: Say) -> dict[str, Any]:
    """Compute `job` with a process for each of its devices; returns the results of all.

    Without an --out the parts lie in a temporary folder. If a process fails, the others are ended
    and their finished sweeps are kept. Raises what that process raised, or MachineError if it was
    killed.
    """
    from layersweep.sweep.choices import resolve_device

    devices = job.machine.device.split(",")
    if len(set(devices)) < len(devices) and set(devices) != {"cpu"}:
        raise InputError(
            f"--device {job.machine.device}: found a device twice, needed each once",
            hint="--device cuda:0,cuda:1",
        )
    for device in devices:
        resolve_device(device)
    if (results := _over_layers(job, say)) is not None:
        return results
    if job.out is not None:
        _check_folder(job.out, len(devices), job.resume)
    with tempfile.TemporaryDirectory(prefix="layersweep-") as temporary:
        kept = replace(job, out=job.out or Path(temporary))
        try:
            _run_workers(kept, len(devices))
        except WorkerError as failure:
            if failure.exit_code == GateError.exit_code:
                keep_refusal(kept, len(devices))
            raise
        except KeyboardInterrupt as stop:
            raise interrupted(job.out) from stop
        results = collect(kept, len(devices), say if job.out is not None else lambda line: None)
    assert results is not None  # every worker has come to its end
    return results


def _over_layers(job: Job, say: Say) -> dict[str, Any] | None:
    """Generated answers read all weights for every token. If the devices can keep the weights
    together but not alone, one process gives each device its share of the layers. None if they
    cannot, or if the study has other tasks."""
    from layersweep.generate.plan import wants_layers_shared
    from layersweep.study.study import prepare_study
    from layersweep.sweep.model import load

    if not job.settings.generates:
        return None
    if job.settings.tasks != ("niah",):
        say("note: each device generates with weights of its own; --tasks niah alone shares them")
        return None
    model = load(job.source, **asdict(job.machine))
    if not wants_layers_shared([model, *model.beside]):
        return None
    try:
        study = prepare_study(model, job.settings, kept=job.out is not None)
    except NoRoomTogether as failure:
        say(f"fallback: layers over devices: used a process for each: {failure}")
        return None
    except LayersweepError:
        return compute(job)  # meets the same failure and leaves a diagnosis
    return compute(job, prepared=study)


def _check_folder(out: Path, of: int, resume: bool) -> None:
    check_counts(out, of)
    if (out / "shards").exists() and not resume:
        raise InputError(
            f"--out {out}: found the shards of an earlier run, needed a folder without",
            hint="--resume continues that run; or name another folder, or delete this one",
        )


def _run_workers(job: Job, count: int) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, failures = context.Barrier(count), context.SimpleQueue()
    workers = [
        context.Process(
            target=_work,
            args=(job, Shard(rank + 1, count, rank, count, "--device"), barrier.wait, failures.put),
            name=f"layersweep {rank + 1}/{count}",
        )
        for rank in range(count)
    ]
    try:
        for worker in workers:
            worker.start()
        failed = _first_failure(workers)
    except KeyboardInterrupt:  # the terminal has interrupted the workers, too
        for worker in workers:
            worker.join()
        raise
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
                worker.join()
    if failed is None:
        return
    if not failures.empty():
        raise WorkerError(*failures.get())
    if (failed.exitcode or 0) < 0:
        name = signal.Signals(-(failed.exitcode or 0)).name
        raise MachineError(
            f"{failed.name}: the process was ended by {name}"
            + (", as the system does when host memory runs out" if name == "SIGKILL" else ""),
            hint="with --out, finished sweeps are kept: --resume continues after them",
        )
    sys.exit(failed.exitcode)  # its traceback has been printed


def _first_failure(workers: list[SpawnProcess]) -> SpawnProcess | None:
    """Wait for all workers, or for the first that fails."""
    running = list(workers)
    while running:
        ended = wait([worker.sentinel for worker in running])
        for worker in [worker for worker in running if worker.sentinel in ended]:
            worker.join()
            running.remove(worker)
            if worker.exitcode:
                return worker
    return None


def _work(
    job: Job, shard: Shard, arrive: Callable[[float], object], tell: Callable[[Any], None]
) -> None:
    """All that a worker does. All workers start their sweeps at the same time."""
    _end_with_parent()

    def failed(message: str, hint: str, code: int) -> int:
        if code != Interrupted.exit_code:
            tell((message, hint, code))
        return code

    def part() -> None:
        compute(in_shards(job, shard), shard, lambda: arrive(START_TIMEOUT_S))

    sys.exit(exit_code(part, failed))


def _end_with_parent() -> None:
    """End with the parent: nothing would use this worker's numbers, and a resumed run would find
    its folder locked."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that
            os.kill(os.getpid(), signal.SIGKILL)

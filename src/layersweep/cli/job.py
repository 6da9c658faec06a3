"""One process's part of an evaluation: prepare, measure, write down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from layersweep.errors import GateError, Interrupted, LayersweepError
from layersweep.runs.shard import WHOLE, Shard
from layersweep.tasks.settings import EvalSettings

if TYPE_CHECKING:  # torch and scipy load only once the arguments are known to be good
    from layersweep.cli.events import Events
    from layersweep.runs.folder import RunFolder
    from layersweep.study.study import Study
    from layersweep.sweep.model import Model


@dataclass(frozen=True)
class MachineOptions:
    """Where and how to compute; field names are the command's options."""

    revision: str | None
    vram: str
    ram: str
    device: str
    dtype: str
    weights: str
    router_dtype: str
    assume_capability: str | None


@dataclass(frozen=True)
class Job:
    """What `layersweep eval` was asked for. `stop_after`: seconds from `began` (time.monotonic,
    which the processes of a host share); `command` as it is recorded."""

    source: str
    settings: EvalSettings
    machine: MachineOptions
    out: Path | None
    resume: bool
    stop_after: float | None
    began: float
    command: str


def compute(
    job: Job,
    shard: Shard = WHOLE,
    ready: Callable[[], object] = lambda: None,
    prepared: Study | None = None,
) -> dict[str, Any]:
    """Compute a shard's tiles, and write to `job.out`; returns the results.

    `ready` is called when the model is open, before the first weight is read. `prepared`: the job's
    study, if there is one already. Any failure leaves diagnosis.json.
    """
    from layersweep.cli.events import Events
    from layersweep.runs.folder import RunFolder

    events = Events(Console(stderr=True), shard)
    study = None
    with RunFolder(job.out, events.say, resume=job.resume) as folder:
        try:
            study = _prepare(job, shard, folder, events, prepared)
            return _measure(job, study, folder, events, ready)
        except (Exception, KeyboardInterrupt) as failure:
            told = interrupted(job.out) if isinstance(failure, KeyboardInterrupt) else failure
            if job.out is not None and folder.usable:
                _diagnose(job.out, told, study, events)
            if told is failure:
                raise
            raise told from failure


def interrupted(out: Path | None) -> Interrupted:
    """Ctrl-C, and what it leaves of a run."""
    kept = f"finished sweeps are kept in {out}: --resume continues after them"
    return Interrupted("interrupted", hint=kept if out else "without --out nothing is kept")


def device_of(devices: str, shard: Shard) -> str:
    """The --device of one of several processes of a host.

    Of a list, its own; "auto" and "cuda" mean the GPU of its rank. Raises InputError where there
    are fewer GPUs than processes.
    """
    from layersweep.errors import InputError

    if shard.of == 1:
        return devices
    names = devices.split(",")
    if len(names) == shard.local_size:
        return names[shard.local_rank]
    if len(names) > 1:
        raise InputError(
            f"--device {devices}: found {len(names)} devices, needed one for each of "
            f"{shard.local_size} processes",
            hint="--device auto gives each process the GPU of its rank",
        )
    if devices not in ("auto", "cuda") or shard.local_size == 1:
        return devices
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 and devices == "auto":
        return "cpu"
    if count == 1 and shard.source.startswith("SLURM"):  # which shows each task its own GPU alone
        return "cuda:0"
    if shard.local_rank >= count:
        raise InputError(
            f"--device {devices}: found {count} CUDA devices, needed one for each of "
            f"{shard.local_size} processes",
            hint=f"start {max(count, 1)} process(es), or --device cpu",
        )
    return f"cuda:{shard.local_rank}"


def _diagnose(out: Path, failure: BaseException, study: Study | None, events: Events) -> None:
    """Write diagnosis.json and hint at it; the failure itself counts more than that."""
    try:
        path = events.write_diagnosis(out, failure, study)
    except OSError as second:
        events.say(f"note: {out}/diagnosis.json cannot be written ({second.strerror})")
        return
    if isinstance(failure, LayersweepError):
        failure.hint = f"{failure.hint}; details in {path}" if failure.hint else str(path)
    else:
        events.say(f"hint: details in {path}")


def _prepare(
    job: Job, shard: Shard, folder: RunFolder, events: Events, prepared: Study | None
) -> Study:
    from layersweep.cli.events import budget_line, layout_line, paths_line, versions_line
    from layersweep.study.study import prepare_study

    loaded = prepared.model if prepared else _load(job, shard)
    events.say_once(layout_line(loaded.checkpoint))
    for note in loaded.checkpoint.notes:
        events.say_once(f"note: {note}")
    kept = folder.path is not None
    study = prepared or prepare_study(loaded, job.settings, kept=kept, shard=shard)
    if kept:
        _start(folder, study, events)
    events.say_once(paths_line(study.model, study.plan.host))
    events.say_once(budget_line(study))
    events.say_once(versions_line())
    for fallback in study.fallbacks:
        events.say_fallback(fallback)
    return study


def _start(folder: RunFolder, study: Study, events: Events) -> None:
    from layersweep.study.manifest import manifest_of

    sweeps = folder.start(manifest_of(study), study.record, str(study.shard))
    if sweeps is not None:
        study.resume(sweeps)
        events.say(
            f"note: resumed after {len(sweeps)} finished sweep(s): "
            f"{len(study.resumed)} of {len(study.own)} tiles are there"
        )


def _load(job: Job, shard: Shard) -> Model:
    from layersweep.kv.arms import parse_arms

    # the cheapest refusal first: no torch yet
    parse_arms(job.settings.kv, growing=job.settings.streaming)
    from layersweep.sweep.model import load

    machine = replace(job.machine, device=device_of(job.machine.device, shard))
    return load(job.source, **asdict(machine), sharers=shard.local_size)


def _measure(
    job: Job, study: Study, folder: RunFolder, events: Events, ready: Callable[[], object]
) -> dict[str, Any]:
    from layersweep.progress import SweepProgress
    from layersweep.study.results import build_results
    from layersweep.study.run import Outcome, StudyRun, TimeLimit

    limit = TimeLimit(float("inf") if job.stop_after is None else job.stop_after, job.began)
    with StudyRun(study, events.say_fallback) as running:
        ready()
        try:
            with SweepProgress(events.console, shown=study.shard.local_rank == 0) as progress:
                outcome = running.measure(
                    progress=progress,
                    finished_sweep=lambda sweep: folder.keep(study.record, sweep),
                    limit=limit,
                )
        except GateError:
            failed = build_results(study, Outcome(), command=job.command, gate_failed=True)
            _write(folder.path, failed)
            raise
        results = build_results(study, outcome, command=job.command)
        _write(folder.path, results)
    if limit.reached:
        events.say(
            f"note: stopped after {len(study.own) - len(study.pending)} of {len(study.own)} "
            "tiles, before --stop-after; --resume continues"
        )
    if folder.path is not None and study.complete:
        events.say(f"wrote {folder.path}/results.json, report.html, windows.csv")
    return results


def _write(folder: Path | None, results: dict[str, Any]) -> None:
    """results.json, report.html and windows.csv, each whole or not at all."""
    from layersweep.report.files import write_report
    from layersweep.runs.files import writing

    if folder is not None:
        with writing(folder):
            write_report(folder, results)

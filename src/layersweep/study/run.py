"""Running a prepared study: its sweeps, what they leave, and when they must end.

Every sweep is whole tiles; when it is done its numbers are complete, and can be kept.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from layersweep.errors import Fallback, GateError, MachineError
from layersweep.generate.lanes import Lead, generate_units
from layersweep.runs.finished import FinishedSweep
from layersweep.study.shrink import KEPT, of_the_host, out_of_memory, shrink
from layersweep.study.sizing import gemm_rate
from layersweep.study.study import Study, tile_key
from layersweep.sweep.engine import Engine
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.record import Pieces, Progress, SweepRecord
from layersweep.sweep.sequences import BranchedSequence, Tile

Finished = Callable[[FinishedSweep], None]


@dataclass
class Outcome:
    """What the sweeps of a study took, in this process. `h2d_bytes` of weights; `moved_bytes` of
    hidden states between devices, and of caches that visit them."""

    sweeps: int = 0
    gate_sweeps: int = 0
    bytes_read: int = 0
    h2d_bytes: int = 0
    moved_bytes: int = 0
    copy_s: float = 0.0
    stall_s: float = 0.0
    h2d_rate: float | None = None
    started: float = 0.0
    sweep_s: float = 0.0
    peak_device_bytes: int = 0
    host_pinned: bool = True
    fallbacks: list[Fallback] = field(default_factory=list)
    gemm_flops: float | None = None


class TimeLimit:
    """Ends a run between sweeps or units: none is begun that would end late if it took as long as
    the longest so far. The first one always is.

    `seconds` from `began` (time.monotonic) on.
    """

    def __init__(self, seconds: float, began: float | None = None) -> None:
        self.seconds = seconds
        self.began = time.monotonic() if began is None else began
        self.longest, self.reached = 0.0, False

    def allows_another(self) -> bool:
        late = time.monotonic() + self.longest > self.began + self.seconds
        self.reached = self.longest > 0 and late
        return not self.reached

    def took_one(self, began: float) -> None:
        """One that `began` then (time.monotonic) is done."""
        self.longest = max(self.longest, time.monotonic() - began)


@dataclass
class Listeners:
    """Who is told of a run's progress, and what ends it early."""

    progress: Progress
    finished_sweep: Finished
    limit: TimeLimit


def run_study(study: Study, **given: Any) -> Outcome:
    """`StudyRun.measure` with an engine of its own."""
    with StudyRun(study) as run:
        return run.measure(**given)


class StudyRun:
    """The engine of a study, open from the first sweep until the context is left: giving back
    pinned memory takes a tenth of a second per GiB, and results need not wait for that.

    Fallbacks are told to `say` as they happen.
    """

    def __init__(
        self, study: Study, say: Callable[[Fallback], None] = lambda fallback: None
    ) -> None:
        self.study, self.say = study, say
        self.engines: list[Engine] = []
        self.fallbacks: list[Fallback] = []

    def __enter__(self) -> StudyRun:
        if not self.study.finished:
            self._open()
        return self

    def _open(self) -> None:
        """Take the plan's memory; a smaller plan's where somebody else was faster."""
        while not self.engines:
            try:
                self.engines = self.study.open(self.say)
            except Exception as failure:
                why = self._memory_that_is_gone(failure)
            else:
                return
            self._shrink(why)

    def _close(self) -> None:
        for engine in self.engines:
            engine.close()
        self.engines = []

    def __exit__(self, *failure: object) -> None:
        self._close()

    def measure(
        self,
        *,
        progress: Progress = lambda phase, done, total: None,
        finished_sweep: Finished = lambda sweep: None,
        gemm_flops: float | None = None,
        limit: TimeLimit | None = None,
    ) -> Outcome:
        """Run the sweeps that are left. Where memory runs out, with fewer tiles in each.

        `finished_sweep` is called as each sweep's results are complete. `gemm_flops`: the machine's
        rate where it has been measured, else it is measured. `limit`: sweeps that might not end in
        time are left. Raises GateError when the gate or the baseline fails, MachineError where no
        plan fits.
        """
        study = self.study
        outcome = Outcome()
        if study.finished:
            return outcome
        with study.meter.phase("ceiling"):
            outcome.gemm_flops = gemm_flops or study.gemm_flops or gemm_rate(study.model)
            outcome.h2d_rate = self.engines[0].store.measure_h2d()
        with study.meter:
            outcome.started = time.perf_counter()
            listeners = Listeners(progress, finished_sweep, limit or TimeLimit(math.inf))
            while not (study.finished or listeners.limit.reached):
                if not self.engines:
                    self._open()
                self._work(outcome, listeners)
            outcome.sweep_s = time.perf_counter() - outcome.started
        outcome.fallbacks += self.fallbacks
        if study.gate and study.done.gate:
            study.gate.check_peak(*_peaks(study, outcome))
        return outcome

    def _work(self, outcome: Outcome, listeners: Listeners) -> None:
        """Sweep what is left to sweep, or generate; where memory ends, plan the rest anew."""
        study, why = self.study, ""
        try:
            if study.sweeping:
                _sweep_tiles(study, outcome, self.engines[0], listeners)
            else:
                _generate(study, outcome, self.engines, listeners, self._note)
        except Exception as failure:
            why = self._memory_that_is_gone(failure)
        finally:
            _account(outcome, self.engines, study)
        # here, where the failure's frames, and the tensors in them, are gone
        if why:
            self._close()
            study.forget_unfinished()
            self._shrink(why)
        elif not study.finished:
            self._close()

    def _memory_that_is_gone(self, failure: Exception) -> str:
        """The words of a failed allocation that a smaller plan may help. Raises anything else."""
        if not out_of_memory(failure):
            raise failure
        why = " ".join(str(failure).split())[:160] or type(failure).__name__
        if of_the_host(failure) and not self.study.model.cpu:
            raise MachineError(f"the host ran out of memory: {why}", hint=KEPT) from failure
        return why

    def _note(self, fallback: Fallback) -> None:
        self.fallbacks.append(fallback)
        self.say(fallback)

    def _shrink(self, why: str) -> None:
        gc.collect()
        self._note(shrink(self.study, why))


def _account(outcome: Outcome, engines: list[Engine], study: Study) -> None:
    """Take over what the engines counted."""
    for engine, model in zip(engines, study.models, strict=False):
        store = engine.store
        outcome.bytes_read += store.bytes_read
        outcome.h2d_bytes += store.h2d_bytes
        outcome.copy_s += store.copy_s
        outcome.stall_s += store.stall_s
        outcome.host_pinned = outcome.host_pinned and store.host_pinned
        outcome.fallbacks += store.fallbacks
        if not model.cpu:
            reserved = torch.cuda.max_memory_reserved(model.compute.device)
            peak = reserved + model.context_bytes
            outcome.peak_device_bytes = max(outcome.peak_device_bytes, peak)


def _peaks(study: Study, outcome: Outcome) -> tuple[int, int]:
    """Measured and planned peak: of the device, or of what a CPU run adds to the host."""
    if study.model.cpu:
        grown = study.meter.peak_bytes - study.meter.start_bytes
        return grown, study.planned_host_bytes
    return outcome.peak_device_bytes, study.planned_device_bytes


def _sweep_tiles(
    study: Study,
    outcome: Outcome,
    engine: Engine,
    listeners: Listeners,
) -> None:
    lead = study.lead
    tiles = [*lead, *study.to_sweep]
    for number, sweep in enumerate(study.plan.sweeps):
        if not listeners.limit.allows_another():
            return
        began = time.monotonic()
        some = [tiles[index] for index in sweep if index >= len(lead)]
        first = number == 0 and bool(lead)
        record = run_sweep(
            engine,
            some,
            lambda *what: _read(study, *what),
            lead=lead[0] if first else None,
            check=study.gate.check_layer if first and study.gate else None,
            progress=listeners.progress,
        )
        outcome.sweeps += bool(some)
        outcome.gate_sweeps += not some
        _finish(study, some, record, listeners, began)


def _read(
    study: Study, tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces
) -> None:
    for task in study.tasks:
        if task.name == tile.name:
            task.read(tile, number, sequence, pieces)
            return
    assert study.gate is not None
    study.gate.check_logits(pieces, study.model.compute.ops.losses)


def _generate(
    study: Study,
    outcome: Outcome,
    engines: list[Engine],
    listeners: Listeners,
    say: Callable[[Fallback], None],
) -> None:
    """Trials unit by unit: a sweep per token, and caches are not kept on disk."""
    assert study.generated is not None and study.generation is not None
    lead = None
    if study.lead and study.gate:
        lead = Lead(study.lead[0], study.gate.check_layer, lambda *what: _read(study, *what))
    units = generate_units(
        study.generation, engines, study.generated, lead=lead, progress=listeners.progress,
        allows_another=listeners.limit.allows_another, say=say,
    )  # fmt: skip
    for unit in units:
        outcome.sweeps += unit.sweeps
        outcome.moved_bytes += unit.moved_bytes
        _finish(study, unit.tiles, unit.record, listeners, unit.began)


def _finish(
    study: Study, tiles: list[Tile], record: SweepRecord, listeners: Listeners, began: float
) -> None:
    """The numbers of `tiles` are complete: they are kept. A sweep of the gate alone is kept once,
    and no limit may end a run after it: it is no progress."""
    finished = _take(study, tiles, record)
    news = bool(tiles) or study.done.gate is None
    study.gate_passed = True
    study.done.add(finished)
    if news:
        listeners.finished_sweep(finished)
    if tiles:
        listeners.limit.took_one(began)


def _take(study: Study, tiles: list[Tile], record: SweepRecord) -> FinishedSweep:
    """What a sweep leaves; a baseline that became non-finite ends the run."""
    for phase, seconds in record.seconds.items():
        study.meter.phases[phase] = study.meter.phases.get(phase, 0.0) + seconds
    with study.meter.phase("results to the host"):
        for task in study.tasks:
            task.settle()
    report = study.gate.report() if study.gate else None
    finished = FinishedSweep([tile_key(tile) for tile in tiles], record.cache_bits, gate=report)
    for (tile_index, sequence, branch), layer in record.nonfinite.items():
        tile = tiles[tile_index]
        found = tile.sequences[sequence].branches[branch] if branch >= 0 else None
        if found is None or found.role == "baseline":  # or the prefix, which all branches read
            raise GateError(
                f"{tile.name} {tile.first + sequence}: the exact baseline is not finite from "
                f"layer {layer} on",
                hint="try --dtype bfloat16 or float32; see diagnosis.json for the layer",
            )
        if found.role == "arm":
            name = found.arm.name
            finished.nonfinite[name] = min(layer, finished.nonfinite.get(name, layer))
    for tile in tiles:
        for task in study.tasks:
            if task.name == tile.name:
                task.check_baseline(tile.first, len(tile.sequences))
    return finished

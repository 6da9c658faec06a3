"""Runs a generation: its units one after another, or one on each stage at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice, takewhile

from layersweep.errors import Fallback
from layersweep.generate.generation import Generation, Unit
from layersweep.stream.pinned import HostBuffer
from layersweep.sweep.caches import KeptCaches, cache_memory
from layersweep.sweep.engine import Engine
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.record import (
    LayerCheck,
    LogitsReader,
    Progress,
    SweepRecord,
)
from layersweep.sweep.sequences import Tile
from layersweep.sweep.turn import HostTurn
from layersweep.tasks.task import GeneratedTask


@dataclass
class Generated:
    """A finished unit, which `began` then (time.monotonic). `moved_bytes`: hidden states between
    devices, and caches to them."""

    tiles: list[Tile]
    record: SweepRecord
    sweeps: int
    moved_bytes: int
    began: float


@dataclass(frozen=True)
class Lead:
    """The gate's tile: it rides ahead of the first unit's first sweep."""

    tile: Tile
    check: LayerCheck
    read: LogitsReader


def generate_units(
    generation: Generation,
    engines: Sequence[Engine],
    task: GeneratedTask,
    *,
    lead: Lead | None,
    progress: Progress,
    allows_another: Callable[[], bool],
    say: Callable[[Fallback], None],
) -> Iterator[Generated]:
    """The units as they are done, until `allows_another` says no. `engines` as in the plan.

    On several stages a thread per lane walks its unit through them; an engine is one's own while
    its layers are visited, so that lanes alternate.
    """
    tokens, turn = _Tokens(progress, generation.walks), HostTurn()
    waiting: list[HostBuffer] = []  # where the caches of a finished unit were: pinned once

    def unit(number: int) -> Generated:
        own, its_lead = generation.units[number], lead if number == 0 else None
        memory = waiting.pop() if waiting else None
        if generation.offload and memory is None:
            pin = not engines[0].compute.cpu
            memory = cache_memory(generation.unit_cache_bytes, pin=pin, say=say)
        try:
            caches = KeptCaches(task.new_tokens, memory)
            return _unit(engines, task, own, caches, its_lead, tokens, turn)
        finally:  # every walk ends with the device, so that nothing reads it any more
            if memory:
                waiting.append(memory)

    numbers = takewhile(lambda number: allows_another(), range(len(generation.units)))
    try:
        if generation.lanes == 1:
            yield from map(unit, numbers)
        else:
            yield from _in_lanes(generation.lanes, unit, numbers, engines[0], tokens)
    finally:
        for memory in waiting:
            memory.close()


def _in_lanes(
    count: int,
    unit: Callable[[int], Generated],
    numbers: Iterator[int],
    engine: Engine,
    tokens: _Tokens,
) -> Iterator[Generated]:
    """Units as they finish, `count` of them in progress."""
    with engine.compute.numerics(), ThreadPoolExecutor(count, "lane") as lanes:
        running: set[Future[Generated]] = set()
        try:
            while True:
                running |= {lanes.submit(unit, n) for n in islice(numbers, count - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            tokens.stop.set()


class _Stopped(Exception):
    """Another lane has failed, or the run was interrupted."""


class _Tokens:
    """Progress over all lanes; ends the lanes when the run has ended."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.done, self.total = progress, 0, total
        self.stop, self._lock = threading.Event(), threading.Lock()

    def sweep(self, phase: str, done: int, total: int) -> None:
        if self.stop.is_set():
            raise _Stopped

    def one(self) -> None:
        with self._lock:
            self.done += 1
            self.progress("tokens", self.done, self.total)


def _unit(
    engines: Sequence[Engine],
    task: GeneratedTask,
    unit: Unit,
    caches: KeptCaches,
    lead: Lead | None,
    tokens: _Tokens,
    turn: HostTurn,
) -> Generated:
    whole, sweeps, began = SweepRecord(), 0, time.monotonic()
    place = {tile.first: index for index, tile in enumerate(unit.tiles)}

    def run(rides: list[Tile], read: LogitsReader) -> None:
        nonlocal sweeps
        first = lead if sweeps == 0 else None

        def reads(tile: Tile, *what: object) -> None:
            (first.read if first and tile is first.tile else read)(tile, *what)  # type: ignore[arg-type]

        record = run_sweep(
            engines[0], rides, reads, then=engines[1:], caches=caches, turn=turn,
            lead=first.tile if first else None, check=first.check if first else None,
            progress=tokens.sweep,
        )  # fmt: skip
        whole.add(record, ahead=place[rides[0].first] if rides else 0)
        sweeps += 1
        tokens.one()

    task.generate(run, unit.first)
    return Generated(unit.tiles, whole, sweeps, whole.moved_bytes + caches.moved_bytes, began)

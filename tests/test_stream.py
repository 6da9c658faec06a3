"""The block store's parts: byte ring, pinned memory, reading ahead. No model, no GPU."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage.floats import Floats
from layersweep.checkpoint.weights import Weight
from layersweep.errors import CheckpointError, Fallback
from layersweep.families.weights import BlockShape
from layersweep.stream import host as host_module
from layersweep.stream.blocks import BlockSpec, PlacedWeight, Slot
from layersweep.stream.device import DeviceStage
from layersweep.stream.host import CACHED_READERS, READERS, Event, HostStage, Readers
from layersweep.stream.pinned import pinned_ring
from layersweep.stream.reader import PIECE_BYTES, RunReader
from layersweep.stream.ring import ByteRing
from layersweep.stream.runs import Placement, choose_spread, compute_ring, runs_of
from layersweep.stream.store import BlockStore

MIB = 2**20


@given(st.integers(1, 100), st.lists(st.one_of(st.integers(1, 60), st.none()), max_size=80))
def test_ring_ranges_are_inside_and_never_overlap(capacity: int, steps: list[int | None]) -> None:
    ring, held = ByteRing(capacity), deque[tuple[int, int]]()
    for step in steps:
        if step is None:
            if held:
                ring.free()
                held.popleft()
            continue
        start = ring.take(step)
        if start is None:
            # it may refuse only where no contiguous range is free behind the newest
            ends = [held[-1][1], 0] if held else [0]
            for begin in ends:
                fits = begin + step <= capacity
                assert not fits or any(a < begin + step and begin < b for a, b in held)
            continue
        assert start >= 0 and start + step <= capacity
        assert all(stop <= start or start + step <= first for first, stop in held)
        held.append((start, start + step))
    assert ring.used == sum(stop - first for first, stop in held)


@given(st.integers(1, 20), st.integers(1, 20))
def test_a_ring_of_a_layer_and_a_run_more_never_locks_up(count: int, size: int) -> None:
    """A layer's runs are freed only when all of them are there: from any start they must fit."""
    ring = ByteRing(count * size + size)
    for _ in range(50):
        for _ in range(count):
            assert ring.take(size) is not None
        for _ in range(count):
            ring.free()


def test_a_refused_pin_is_tried_smaller_and_ends_pageable() -> None:
    asked: list[int] = []

    def limited(address: int, nbytes: int) -> int:
        asked.append(nbytes)
        return 0 if nbytes <= 3 * MIB else 2

    buffer, size = pinned_ring(16 * MIB, MIB, limited)
    assert (size, buffer.pinned, asked) == (2 * MIB, True, [16 * MIB, 8 * MIB, 4 * MIB, 2 * MIB])
    buffer, size = pinned_ring(16 * MIB, 4 * MIB, limited)
    assert (size, buffer.pinned) == (4 * MIB, False)
    assert buffer.bytes.numel() == 4 * MIB


def a_file(folder: Path, sizes: list[int]) -> tuple[list[BlockSpec], list[bytes]]:
    """Blocks of one float tensor each, in one file; three blocks a layer."""
    file, offset, specs, contents = folder / "model.safetensors", 0, [], []
    with file.open("wb") as stream:
        for index, size in enumerate(sizes):
            data = os.urandom(size)
            stream.write(data)
            contents.append(data)
            source = StoredTensor(f"t{index}", file, "F16", (size // 2,), offset, size)
            weight = Weight(f"t{index}", (size // 2,), Floats(source))
            placed = PlacedWeight(weight, weight.storage, (Slot(source, 0, size),))
            shape = BlockShape("mlp", index // 3, {"w": (size // 2,)})
            specs.append(BlockSpec(shape, {"w": placed}, size, size))
            offset += size
    return specs, contents


def placed(specs: list[BlockSpec], kept: int = 0, ring: int | None = None) -> Placement:
    runs = runs_of(specs)
    host = choose_spread([run.nbytes for run in runs], kept)
    return Placement(frozenset(), host, 0, compute_ring(runs) if ring is None else ring)


@pytest.mark.parametrize("kept", [0, 5_000_000, 10**9])
def test_blocks_arrive_whole_and_in_order_sweep_after_sweep(tmp_path: Path, kept: int) -> None:
    generator = random.Random(kept)
    sizes = [2 * generator.randint(1, 300_000) for _ in range(60)]
    specs, contents = a_file(tmp_path, sizes)
    store = BlockStore(specs, placed(specs, kept), torch.device("cpu"))
    for sweep in range(3):
        with store.sweep():
            for index, content in enumerate(contents):
                assert bytes(store.get(index).arena.numpy()) == content, (sweep, index)
                if index % 3 == 2:  # a layer at a time, as the gate's pass holds them
                    for done in range(index - 2, index + 1):
                        store.release(done)
    again = sum(run.nbytes for run in store.runs if run.index not in placed(specs, kept).host)
    assert store.bytes_read == sum(sizes) + 2 * again
    store.close()


def test_a_block_that_stays_is_made_once(tmp_path: Path) -> None:
    specs, _ = a_file(tmp_path, [40_000_000] * 6)  # two of them are a run
    store = BlockStore(specs, placed(specs, 80_000_000), torch.device("cpu"))
    seen = []
    for _ in range(2):
        with store.sweep():
            assert store.waits_for(0)
            for index in range(6):
                seen.append(store.get(index))
                assert not store.waits_for(index)
                store.release(index)
    same = [first is second for first, second in zip(seen[:6], seen[6:], strict=True)]
    kept = placed(specs, 80_000_000).host
    assert sum(same) == 2 == sum(len(store.runs[index].blocks) for index in kept)
    store.close()


def test_a_sweep_over_what_stays_takes_no_thread(
    tmp_path: Path, instant_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, and on a device that keeps everything; blocks that nobody asks for do no harm."""
    specs, contents = a_file(tmp_path, [40_000_000] * 6)
    runs, reader = runs_of(specs), RunReader(specs)
    every = frozenset(run.index for run in runs)
    store = BlockStore(specs, placed(specs, 10**9), torch.device("cpu"))
    host = HostStage(runs, reader, placed(specs), pin=False, say=lambda fallback: None)
    stage = DeviceStage(host, runs, replace(placed(specs), device=every), instant_device)
    monkeypatch.setattr("layersweep.stream.device.mark", lambda *device, **timed: Instant())
    with store.sweep():
        for index in range(6):
            store.get(index)
            store.release(index)
    stage.start()
    for _ in runs:
        stage.release(stage.take())
    stage.stop()
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail(thread.name))
    for wanted in (range(6), (0, 5), (0, 4, 5)):
        with store.sweep():
            for index in wanted:
                assert bytes(store.get(index).arena.numpy()) == contents[index]
                store.release(index)
        stage.start()
        for run in runs[:2]:
            landed = stage.take()
            assert bytes(landed.bytes.numpy()) == b"".join(contents[index] for index in run.blocks)
            stage.release(landed)
        stage.stop()
    monkeypatch.undo()
    store.close()
    stage.close()
    reader.close()


def test_memory_for_weights_stays_within_the_ring(tmp_path: Path) -> None:
    specs, _ = a_file(tmp_path, [1_000_000] * 60)
    runs, ring = runs_of(specs), compute_ring(runs_of(specs))
    reader = RunReader(specs)
    host = HostStage(runs, reader, placed(specs), pin=False, say=lambda fallback: None)
    assert host.ring_bytes.numel() == ring < sum(run.nbytes for run in runs) / 4
    host.start(frozenset())
    seen = set()
    for _ in runs:
        arrival = host.take()
        seen.add(arrival.bytes.data_ptr() - host.ring_bytes.data_ptr())
        host.release()
    assert all(0 <= start < ring for start in seen)
    host.stop()
    host.close()
    reader.close()


def test_a_sweep_that_is_left_early_can_be_followed_by_another(tmp_path: Path) -> None:
    specs, contents = a_file(tmp_path, [500_000] * 30)
    store = BlockStore(specs, placed(specs), torch.device("cpu"))
    for stop in (0, 1, 7):
        with pytest.raises(KeyboardInterrupt), store.sweep():
            for index in range(stop):
                store.get(index)
            raise KeyboardInterrupt
    with store.sweep():
        for index, content in enumerate(contents):
            assert bytes(store.get(index).arena.numpy()) == content
            store.release(index)
    store.close()


class Instant:
    """A stream or an event of a device that does everything at once."""

    def synchronize(self) -> None: ...

    def wait_event(self, event: Event) -> None: ...


@pytest.fixture
def instant_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The CPU, in the place of a GPU."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Instant())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Instant())
    for name in ("set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr("layersweep.stream.device.mark", lambda device, timed=True: Instant())
    monkeypatch.setattr("layersweep.stream.device.seconds_between", lambda pairs: 0.0)
    return torch.device("cpu")


class WatchedHost(HostStage):
    """Notes when ring bytes are given back, and when all of them are."""

    def __init__(self, *given: object, **named: object) -> None:
        super().__init__(*given, **named)  # type: ignore[arg-type]
        self.calls: list[str] = []

    def release(self, event: Event | None = None) -> None:
        self.calls.append("release")
        super().release(event)

    def stop(self) -> None:
        super().stop()
        self.calls.append("stop")


def test_an_aborted_sweep_gives_no_ring_bytes_of_the_next_one_back(
    tmp_path: Path, instant_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep is left while the courier copies the second run, which it goes on doing."""
    specs, contents = a_file(tmp_path, [40_000_000] * 6)  # two of them are a run, one is left over
    runs, reader = runs_of(specs), RunReader(specs)
    placement = replace(placed(specs), device_ring=compute_ring(runs))
    host = WatchedHost(runs, reader, placement, pin=False, say=lambda fallback: None)
    stage = DeviceStage(host, runs, placement, instant_device)
    copying, go_on, marks = threading.Event(), threading.Event(), iter(range(99))

    def mark(device: torch.device, timed: bool = True) -> Instant:
        if threading.current_thread().name == "run-courier" and next(marks) == 2:
            copying.set()
            go_on.wait()
        return Instant()

    monkeypatch.setattr("layersweep.stream.device.mark", mark)
    stage.start()
    courier = stage._courier
    assert courier is not None and copying.wait(10)
    join = courier.join
    monkeypatch.setattr(courier, "join", lambda: (go_on.set(), join()))
    stage.stop()
    assert host.calls == ["release", "release", "stop"]
    stage.start()
    for run in runs:
        landed = stage.take()
        assert bytes(landed.bytes.numpy()) == b"".join(contents[index] for index in run.blocks)
        stage.release(landed)
    stage.stop()
    stage.close()
    reader.close()


def test_a_sweep_that_a_read_has_ended_waits_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would write into ring bytes of the next one."""
    specs, _ = a_file(tmp_path, [100_000])
    runs, reader = runs_of(specs), RunReader(specs)

    def fails() -> int:
        raise OSError("no more")

    monkeypatch.setattr(reader, "tasks", lambda run, target, piece: [fails, lambda: 1])
    host = HostStage(runs, reader, placed(specs), pin=False, say=lambda fallback: None)
    waited: list[Future[None]] = []

    def wait(reads: Sequence[Future[None]]) -> None:
        waited.extend(reads)

    monkeypatch.setattr(host_module, "wait", wait)
    host.start(frozenset())
    with pytest.raises(OSError, match="no more"):
        host.take()
    host.stop()
    assert len(waited) == 2
    host.close()
    reader.close()


def test_a_file_cut_short_ends_the_sweep_with_the_tensor_named(tmp_path: Path) -> None:
    specs, _ = a_file(tmp_path, [500_000] * 30)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(500_000 * 20 + 100)
    store = BlockStore(specs, placed(specs), torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"t20 ends after 100 bytes"), store.sweep():
        for index in range(30):
            store.get(index)
            store.release(index)
    store.close()


def test_a_pageable_ring_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs, _ = a_file(tmp_path, [100_000] * 6)
    monkeypatch.setattr("layersweep.stream.pinned._register", lambda address, nbytes: 1)
    said: list[Fallback] = []
    runs = runs_of(specs)
    host = HostStage(runs, RunReader(specs), placed(specs), pin=True, say=said.append)
    assert [(fallback.what, fallback.used) for fallback in said] == [
        ("host ring", "pageable memory")
    ]
    assert not host.pinned
    host.close()


def test_a_file_is_dropped_from_the_page_cache_once_nothing_more_of_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    specs: list[BlockSpec] = []
    for folder in folders:
        folder.mkdir()
        specs += a_file(folder, [100_000] * 30)[0]
    read: list[str] = []
    fill, drop = RunReader._fill, RunReader.drop
    monkeypatch.setattr(
        RunReader, "_fill",
        lambda self, call, target: (read.extend(one.file.parent.name for one in call.sources),
                                    fill(self, call, target))[1],
    )  # fmt: skip
    monkeypatch.setattr(
        RunReader,
        "drop",
        lambda self, file: (read.append(f"drop {file.parent.name}"), drop(self, file))[1],
    )
    for dropped in (False, True):
        read.clear()
        store = BlockStore(specs, replace(placed(specs), drop_cache=dropped), torch.device("cpu"))
        with store.sweep():
            for index in range(60):
                store.get(index)
                store.release(index)
        store.close()
        assert (read.count("a"), read.count("b")) == (30, 30)
        drops = [entry for entry in read if entry.startswith("drop")]
        assert drops == (["drop a", "drop b"] if dropped else [])
        if dropped:
            assert "a" not in read[read.index("drop a") :]
            assert read[-1] == "drop b"


def test_all_readers_share_a_table_and_one_call_reads_a_run_of_small_blocks() -> None:
    readers = Readers()
    assert readers.piece_bytes(1200 * 2**20) == 200 * 2**20
    assert readers.piece_bytes(80 * 2**20) >= 80 * 2**20
    readers.cached = False  # a disk's queue
    assert readers.piece_bytes(1200 * 2**20) == PIECE_BYTES
    readers.close()


def test_few_readers_while_they_are_fast_and_many_while_they_wait() -> None:
    readers, lock = Readers(), threading.Lock()
    working = most = 0

    def read(seconds: float, nbytes: int) -> int:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        time.sleep(seconds)
        with lock:
            working -= 1
        return nbytes

    def wave(seconds: float, nbytes: int) -> int:
        nonlocal most
        most = 0
        for done in [readers.submit(partial(read, seconds, nbytes)) for _ in range(48)]:
            done.result()
        return most

    assert wave(0.01, 2**10) == CACHED_READERS  # too small to tell
    wave(0.02, 5 * 2**20)  # 0.25 GB/s each: a disk
    assert not readers.cached and wave(0.02, 2**10) == READERS
    wave(0.002, 2**30)  # 500 GB/s
    assert readers.cached and wave(0.01, 2**10) == CACHED_READERS
    readers.close()

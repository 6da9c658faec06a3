"""Planned reads: every byte in its place, whatever the system gives at a time; scales that are
checked. Beside the store's own tests in test_stream.py."""

from __future__ import annotations

import ctypes
import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_builders import tiny_checkpoint
from hostile_gguf import valid
from hypothesis import given, settings
from hypothesis import strategies as st

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.layout import open_checkpoint
from layersweep.checkpoint.storage.floats import Floats
from layersweep.checkpoint.weights import Weight
from layersweep.errors import CheckpointError, MachineError
from layersweep.families.weights import BlockShape
from layersweep.stream import preadv as preadv_module
from layersweep.stream import scales
from layersweep.stream.blocks import BlockSpec, PlacedWeight, Slot, block_specs
from layersweep.stream.preadv import MOST_VECTORS
from layersweep.stream.reader import PIECE_BYTES, RunReader
from layersweep.stream.reading_plan import GAP_BYTES
from layersweep.stream.runs import Run, runs_of

GUARD = 3  # bytes of memory around each tensor that no read may touch
UNTOUCHED = 255


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400,000 random bytes, none of them UNTOUCHED."""
    path = tmp_path_factory.mktemp("reading") / "model.safetensors"
    bytes_ = np.random.default_rng(0).integers(0, UNTOUCHED, 400_000, np.uint8)
    path.write_bytes(bytes_.tobytes())
    return path


def scattered(file: Path, sizes: list[int], gaps: list[int], seed: int) -> tuple[BlockSpec, Run]:
    """A block of tensors that lie in the file behind gaps, and in memory in any order."""
    sources, at = [], 0
    for index, (size, gap) in enumerate(zip(sizes, gaps, strict=True)):
        at += gap
        sources.append(StoredTensor(f"t{index}", file, "U8", (size,), at, size))
        at += size
    placed, place = {}, 0
    for source in random.Random(seed).sample(sources, len(sources)):
        place += GUARD
        weight = Weight(source.name, source.shape, Floats(source))
        slot = Slot(source, place, source.nbytes)
        placed[source.name] = PlacedWeight(weight, weight.storage, (slot,))
        place += source.nbytes
    shape = BlockShape("mlp", 0, {name: (1,) for name in placed})
    spec = BlockSpec(shape, placed, place + GUARD, sum(sizes))
    return spec, runs_of([spec])[0]


def expected(spec: BlockSpec) -> bytes:
    memory = bytearray([UNTOUCHED]) * spec.nbytes
    sources = [(placed.weight.data, placed.slots[0].offset) for placed in spec.weights.values()]
    content = sources[0][0].file.read_bytes()
    for source, place in sources:
        found = content[source.offset : source.offset + source.nbytes]
        memory[place : place + source.nbytes] = found
    return bytes(memory)


class Limited:
    """A preadv that gives at most `most` bytes at a time, after `failures` as error numbers."""

    def __init__(self, most: int, failures: Sequence[int] = ()) -> None:
        self.most, self.failures, self.calls = most, iter(failures), 0

    def __call__(self, handle: int, address: int, count: int, offset: int) -> int:
        self.calls += 1
        assert 0 < count <= MOST_VECTORS
        if number := next(self.failures, 0):
            ctypes.set_errno(number)
            return -1
        data = os.pread(handle, self.most, offset)
        done = 0
        for place, size in ((ctypes.c_int64 * 2) * count).from_address(address):
            part = data[done : done + size]
            ctypes.memmove(place, part, len(part))
            done += len(part)
        return done


def filled(spec: BlockSpec, run: Run, piece: int = PIECE_BYTES) -> bytes:
    reader = RunReader([spec])
    target = torch.full((run.nbytes,), UNTOUCHED, dtype=torch.uint8)
    assert sum(task() for task in reader.tasks(run, target, piece)) >= run.stored_bytes
    reader.close()
    return bytes(target.numpy())


tensors = st.lists(
    st.tuples(st.integers(0, 400), st.sampled_from([0, 0, 7, 500, GAP_BYTES, GAP_BYTES + 1])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60)
@given(tensors, st.integers(1, 900), st.sampled_from([0, 13, 70_000]), st.integers(0, 9))
def test_bytes_arrive_in_their_places_and_nowhere_else(
    file: Path, tensors: list[tuple[int, int]], piece: int, most: int, seed: int
) -> None:
    sizes, gaps = (list(column) for column in zip(*tensors, strict=True))
    spec, run = scattered(file, sizes, gaps, seed)
    with pytest.MonkeyPatch.context() as patch:
        if most:
            patch.setattr(preadv_module, "_function", lambda: Limited(most))
        assert filled(spec, run, piece) == expected(spec)


def test_more_ranges_than_the_system_takes_are_read_by_several_calls(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, run = scattered(file, [100] * 1500, [0, *[30] * 1499], seed=0)
    assert filled(spec, run) == expected(spec)
    counted, function = Limited(0), preadv_module._function()

    def count(handle: int, address: int, vectors: int, offset: int) -> int:
        counted.calls += 1
        return function(handle, address, vectors, offset)

    monkeypatch.setattr(preadv_module, "_function", lambda: count)
    reader = RunReader([spec])
    (task,) = reader.tasks(run, torch.zeros(run.nbytes, dtype=torch.uint8))
    assert task() == 1500 * 100 + 1499 * 30
    assert counted.calls == 3  # 1,500 ranges and 1,499 gaps, 1,024 at a time
    reader.close()


@pytest.mark.parametrize(("gap", "calls"), [(GAP_BYTES, 1), (GAP_BYTES + 1, 2)])
def test_a_gap_that_is_read_fits_the_memory_that_nobody_reads(
    file: Path, gap: int, calls: int
) -> None:
    spec, run = scattered(file, [100, 100], [0, gap], seed=0)
    (share,) = RunReader([spec])._reading(run, PIECE_BYTES).calls
    assert len(share) == calls


def test_small_calls_of_a_run_are_one_task(file: Path) -> None:
    spec, run = scattered(file, [100] * 5, [GAP_BYTES + 1] * 5, seed=0)
    reader = RunReader([spec])
    target = torch.zeros(run.nbytes, dtype=torch.uint8)
    assert len(reader.tasks(run, target)) == 1
    # 518 bytes of memory in pieces of 400: a reader takes as many calls as 100 bytes are
    assert len(reader.tasks(run, target, 400)) == 5
    reader.close()


def test_an_interrupted_read_goes_on_and_a_failed_one_names_its_tensor(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, run = scattered(file, [100, 100], [0, 50], seed=0)
    interrupted = Limited(1000, [errno.EINTR, errno.EINTR])
    monkeypatch.setattr(preadv_module, "_function", lambda: interrupted)
    assert filled(spec, run) == expected(spec)
    assert interrupted.calls == 3
    failing = Limited(120, [0, errno.EIO])  # 20 bytes into the gap
    monkeypatch.setattr(preadv_module, "_function", lambda: failing)
    with pytest.raises(MachineError, match=r"tensor t1 cannot be read \(Input/output error\)"):
        filled(spec, run)


@pytest.mark.parametrize("most", [0, 33])
@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "t0 ends after 0 bytes, needed 100"),
        (99, "t0 ends after 99 bytes, needed 100"),
        (120, "t1 ends after 0 bytes, needed 80"),
        (229, "t1 ends after 79 bytes, needed 80"),
    ],
)
def test_a_file_that_ends_early_names_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, message: str, most: int
) -> None:
    short = tmp_path / "short.safetensors"
    short.write_bytes(bytes(length))
    spec, run = scattered(short, [100, 80], [0, 50], seed=0)
    if most:
        monkeypatch.setattr(preadv_module, "_function", lambda: Limited(most))
    with pytest.raises(CheckpointError, match=f"short.safetensors: tensor {message}"):
        filled(spec, run)


@pytest.fixture(scope="module", params=[True, False], ids=["nested", "plain"])
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[BlockSpec], Run, torch.Tensor]:
    """Blocks of an NF4 model, the run of its first layer, and that run's bytes."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("nf4"), nested=request.param)
    specs = block_specs(open_checkpoint(str(folder)))
    run = runs_of(specs)[1]
    target = torch.zeros(run.nbytes, dtype=torch.uint8)
    reader = RunReader(specs)
    for task in reader.tasks(run, target):
        task()
    reader.check(run, target)
    reader.close()
    return specs, run, target


def test_a_bad_number_at_either_end_of_any_tensor_of_scales_is_found_and_named(
    quantized: tuple[list[BlockSpec], Run, torch.Tensor],
) -> None:
    specs, run, target = quantized
    reader, named = RunReader(specs), set()
    for block, start in zip(run.blocks, run.offsets, strict=True):
        for placed in specs[block].weights.values():
            if not placed.packed:
                continue
            looked = placed.slots[2:] or placed.slots[1:]
            values = ([float("nan"), -1.0], [float("inf"), float("nan")])
            for slot, bad in zip(looked, values, strict=False):
                scales = target[start + slot.offset :][: slot.nbytes].view(torch.float32)
                for index, value in zip((0, -1), bad, strict=True):
                    held = scales[index].item()
                    scales[index] = value
                    at = index % len(scales)
                    with pytest.raises(CheckpointError, match=rf"\[{at}\]: found {value}") as error:
                        reader.check(run, target)
                    assert slot.source is not None and slot.source.name in str(error.value)
                    named.add(slot.source.name)
                    scales[index] = held
    reader.check(run, target)
    nested = len(specs[run.first].weights["q_proj"].slots) == 4
    weights = 4 + 1 + 3 * 4  # of attention, a router, four experts
    assert len(named) == weights * (2 if nested else 1)


def test_equal_weights_of_equal_blocks_are_checked_by_one_look(
    quantized: tuple[list[BlockSpec], Run, torch.Tensor],
) -> None:
    specs, run, _ = quantized
    nested = len(specs[run.first].weights["q_proj"].slots) == 4
    experts = [look for look in RunReader(specs)._scales(run).floats if look.shape[0] == 4]
    assert [look.shape[:2] for look in experts] == [(4, 3)] * (2 if nested else 1)


def test_a_check_that_takes_long_is_made_by_whoever_ends_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scales, "MANY", 10)
    path = tmp_path / "model.gguf"
    whole = valid()
    path.write_bytes(whole.encode())
    specs = block_specs(open_checkpoint(str(path)))
    run = next(run for run in runs_of(specs) if any(specs[at].role == "mlp" for at in run.blocks))
    reader, target = RunReader(specs), torch.zeros(run.nbytes, dtype=torch.uint8)
    assert reader.checks_itself(run)
    checked: list[Run] = []
    monkeypatch.setattr(reader, "check", lambda run, target: checked.append(run))
    tasks = reader.tasks(run, target, 1 << 10)
    for task in tasks[1:]:
        task()
    assert len(tasks) > 2 and checked == []
    tasks[0]()
    assert checked == [run]
    reader.close()

"""The rates that a run is compared with, measured on its machine, in its process."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from layersweep.errors import InputError
from layersweep.families.spec import Decoder
from layersweep.probes import TILE_ROWS, resident_share
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.host import READERS
from layersweep.stream.reader import RunReader
from layersweep.stream.runs import runs_of
from layersweep.sweep.clock import PhaseClock

WARM_SECONDS = MEASURED_SECONDS = 2.0
CPU_SECONDS = 0.3  # each, where no clock has to come down first
MEMORY_BYTES = 256 * 2**20
MOST_CACHED = 0.01  # share of a file that may still lie in memory for it to count as evicted


def gemm_ceiling(decoder: Decoder, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of an expert's two products at a tile's rows, alternating back to back for 2 s
    after 2 s of warm-up (less on the CPU), on random normal data: [M, H] x [H, 2I] and
    [M, I] x [I, H]."""
    hidden, inner = decoder.hidden_size, decoder.widest_inner

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)

    x, w13, w2 = normal(TILE_ROWS, hidden), normal(2 * inner, hidden), normal(hidden, inner)
    y = normal(TILE_ROWS, inner)
    wide, narrow = x.new_empty(TILE_ROWS, 2 * inner), x.new_empty(TILE_ROWS, hidden)
    flops = 2.0 * TILE_ROWS * hidden * 3 * inner

    def run(seconds: float) -> float:
        """Pairs of products for about `seconds`; FLOP/s by the device's clock."""
        pairs, started, clock = 0, time.perf_counter(), PhaseClock(device)
        with clock.phase("products"):
            while time.perf_counter() - started < seconds:
                for _ in range(4):
                    torch.mm(x, w13.t(), out=wide)
                    torch.mm(y, w2.t(), out=narrow)
                pairs += 4
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
        return pairs * flops / clock.seconds()["products"]

    run(CPU_SECONDS if device.type == "cpu" else WARM_SECONDS)
    return run(CPU_SECONDS if device.type == "cpu" else MEASURED_SECONDS)


def memory_rate(device: torch.device) -> float:
    """Bytes per second that the memory of a device moves, of which a copy reads one half and writes
    the other: the best of five copies of 256 MiB after one that warms up."""
    source = torch.ones(MEMORY_BYTES, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(6):
        clock = PhaseClock(device)
        with clock.phase("copy"):
            target.copy_(source)
        best = min(best, clock.seconds()["copy"])
    del source, target
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 2 * MEMORY_BYTES / best


def evict(files: Sequence[Path]) -> float:
    """Take files out of the page cache; the share of them that is still there.

    Raises InputError where more than 1 % stays, since a disk row would then be a memory row.
    """
    kept = total = 0.0
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            kept += size * resident_share(stream.fileno(), size)
        total += size
    share = kept / total
    if share > MOST_CACHED:
        raise InputError(
            f"{files[0].parent}: {share:.0%} of the files stay in the page cache, needed below "
            f"{MOST_CACHED:.0%} for a measurement of the disk",
            hint="put the checkpoint on a disk (this may be a memory file system)",
        )
    return share


def disk_rate(specs: Sequence[BlockSpec], nbytes: int) -> float:
    """Bytes/s of the first `nbytes` of runs, read as a sweep reads them: same pieces, same
    number of threads. The files must have been evicted."""
    reader, read, started = RunReader(specs), 0, time.perf_counter()
    runs = runs_of(specs)
    buffers = [torch.empty(max(run.nbytes for run in runs), dtype=torch.uint8) for _ in range(2)]
    pending: list[list[object]] = [[], []]
    with ThreadPoolExecutor(READERS) as pool:
        for index, run in enumerate(runs):
            for done in pending[index % 2]:
                done.result()  # type: ignore[attr-defined]
            if read >= nbytes:
                break
            tasks = reader.tasks(run, buffers[index % 2][: run.nbytes])
            pending[index % 2] = [pool.submit(task) for task in tasks]
            read += run.stored_bytes
    reader.close()
    return read / (time.perf_counter() - started)

"""Rates of this machine, each measured in about a second: disk, memory, bus, matrix products.

Used by `layersweep doctor`. Every probe gives its memory, files and CUDA errors back.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from layersweep.environment import GIB, HOST_RESERVE
from layersweep.stream.pinned import clear_cuda_error, cuda_runtime
from layersweep.units import format_bytes

MIB = 2**20
DISK_FILE = 256 * MIB
DISK_BLOCK = 8 * MIB
DISK_THREADS = 4
COPY_BYTES = 256 * MIB  # pinned copies reach their full rate from here up
PIN_STEP = GIB
PIN_PROBE = 8 * GIB  # more takes seconds per step to fault in, and says nothing new
# Rows of one expert in a tile of the standard study: 20 segments x (1024 + 3 x 512) x 2 / 8.
TILE_ROWS = 12_800

GemmShape = tuple[int, int, int]  # [M, K] x [K, N]


@dataclass(frozen=True)
class DiskRate:
    """Bytes per second of a file read from disk; `resident` is the share that was still cached."""

    bytes_per_s: float
    resident: float
    bytes_read: int


@dataclass(frozen=True)
class BusRates:
    """Bytes per second between host and device memory."""

    pinned_h2d: float
    pageable_h2d: float
    pinned_d2h: float


@dataclass(frozen=True)
class PinLimit:
    """Bytes that could be registered in one process; `error` is None where the probe just ended."""

    bytes: int
    error: str | None


def disk_read_rate(folder: Path, size: int = DISK_FILE) -> DiskRate:
    """Read a fresh temporary file in `folder` after it was evicted from the page cache.

    8 MiB blocks, 4 threads. Raises OSError where the folder cannot be written or is too full.
    """
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise OSError(f"{format_bytes(free)} free, {format_bytes(2 * size)} needed")
    with tempfile.NamedTemporaryFile(prefix=".layersweep-doctor-", dir=folder) as file:
        for _ in range(0, size, DISK_BLOCK):
            file.write(os.urandom(DISK_BLOCK))  # random: a compressing disk must not shine
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # advice; the resident share says what came of it
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        resident = resident_share(file.fileno(), size)
        started = time.perf_counter()
        with ThreadPoolExecutor(DISK_THREADS) as pool:
            starts = range(0, size, size // DISK_THREADS)
            done = pool.map(lambda at: _read_span(file.fileno(), at, size // DISK_THREADS), starts)
            count = sum(done)
        return DiskRate(count / (time.perf_counter() - started), resident, count)


def _read_span(descriptor: int, start: int, size: int) -> int:
    buffer = mmap.mmap(-1, DISK_BLOCK)
    return sum(os.preadv(descriptor, [buffer], start + at) for at in range(0, size, DISK_BLOCK))


def resident_share(descriptor: int, size: int) -> float:
    """Share of a file's pages in the page cache, by mincore; 0 where the system cannot tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore"):
        return 0.0
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as pages:
        view = np.frombuffer(pages, dtype=np.uint8)
        flags = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        status = libc.mincore(
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(size),
            ctypes.c_void_p(flags.ctypes.data),
        )
        del view  # the map cannot be closed while an array looks at it
    return float((flags & 1).mean()) if status == 0 else 0.0


def memory_copy_rate(size: int = COPY_BYTES) -> float:
    """Bytes copied per second from one host buffer to another, as the weight loader does."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.zeros(size, dtype=torch.uint8)
    return size / _best_time(lambda: target.copy_(source))


def cpu_gemm_rate(shape: GemmShape) -> float:
    """float32 FLOP per second of [M, K] x [K, N] on all cores, random normal data."""
    m, k, n = shape
    left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    return 2.0 * m * k * n / _best_time(lambda: torch.mm(left, right, out=out))


def _best_time(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of `repeats` calls after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def bus_rates(device: str) -> BusRates:
    """Host-to-device and back, 256 MiB per copy."""
    on_device = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    pageable = torch.ones(COPY_BYTES, dtype=torch.uint8)
    pinned = pageable.pin_memory()

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        def copy() -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)

        return COPY_BYTES / _best_time(copy)

    return BusRates(rate(on_device, pinned), rate(on_device, pageable), rate(pinned, on_device))


def cuda_gemm_rate(device: str, shape: GemmShape, seconds: float = 1.0) -> float:
    """float16 FLOP per second, back to back for `seconds` after half of that as warm-up."""
    m, k, n = shape
    left = torch.randn(m, k, dtype=torch.float16, device=device)
    right = torch.randn(k, n, dtype=torch.float16, device=device)
    out = torch.empty(m, n, dtype=torch.float16, device=device)

    def run(limit: float) -> float:
        count, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < limit:
            torch.mm(left, right, out=out)
            torch.cuda.synchronize(device)
            count += 1
        return count * 2.0 * m * k * n / elapsed

    run(seconds / 2)
    return run(seconds)


def attention_kernels(device: str) -> dict[str, bool]:
    """Which fused kernels of scaled_dot_product_attention run here in float16, each tried."""
    query = torch.randn(1, 8, 64, 128, dtype=torch.float16, device=device)
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory_efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    return {name: _attention_runs(query, backend) for name, backend in backends.items()}


def _attention_runs(query: torch.Tensor, backend: SDPBackend) -> bool:
    with warnings.catch_warnings(), sdpa_kernel([backend]):
        warnings.simplefilter("ignore")  # torch explains each refusal in several warnings
        try:
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
            torch.cuda.synchronize(query.device)
        except RuntimeError:
            return False
    return True


def pin_limit(device: str, available: int) -> PinLimit:
    """Register 1 GiB steps of fresh memory until it fails or 8 GiB are pinned; all are given back.

    `available`: bytes of host memory that may be used; 3 GiB of them stay free.
    """
    torch.cuda.synchronize(device)  # cudaHostRegister needs a context
    runtime = cuda_runtime()
    held: list[tuple[mmap.mmap, int]] = []
    error = None
    try:
        while (len(held) + 1) * PIN_STEP <= min(PIN_PROBE, available - HOST_RESERVE):
            memory = mmap.mmap(-1, PIN_STEP)
            address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
            status = int(runtime.cudaHostRegister(address, PIN_STEP, 0))
            if status != 0:
                error = f"cudaHostRegister failed with CUDA error {status}"
                clear_cuda_error(device)
                break
            held.append((memory, address))
    finally:
        for _, address in held:
            runtime.cudaHostUnregister(address)
    return PinLimit(len(held) * PIN_STEP, error)

"""Host memory of exact size, registered with CUDA where it can be.

torch's own pinned allocator rounds sizes up to powers of two (24 GB of Mixtral would take 35),
so these are anonymous maps, registered whole. Containers and WSL refuse large registrations: a
refusal is cleared (it would otherwise be reported by the next kernel launch) and said.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

Register = Callable[[int, int], int]  # (address, bytes) -> CUDA error number, 0 for success


class HostBuffer:
    """`nbytes` of zeroed anonymous memory as a uint8 tensor; `pinned` says if CUDA knows it."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, max(nbytes, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):  # 512 times fewer page faults, faster registration
            with suppress(OSError):  # advice, which some kernels do not take
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]
        self.pinned = False

    def touch(self) -> None:
        """Zeros, written by all of torch's threads. The system gives pages when they are touched,
        and a registration touches them one by one: 1 GB/s, seen beside an H100."""
        self.bytes.zero_()

    def pin(self, nbytes: int | None = None, register: Register | None = None) -> bool:
        """Register the first `nbytes` (all of them by default) with CUDA; False if refused."""
        size = self.bytes.numel() if nbytes is None else nbytes
        status = (register or _register)(self.bytes.data_ptr(), size)
        self.pinned = status == 0
        return self.pinned

    def close(self) -> None:
        """Unregister. The memory itself goes with the last tensor that looks at it."""
        if self.pinned:
            cuda_runtime().cudaHostUnregister(self.bytes.data_ptr())
            self.pinned = False
        self.bytes = torch.empty(0, dtype=torch.uint8)


def pinned_ring(
    wanted: int, least: int, register: Register | None = None
) -> tuple[HostBuffer, int]:
    """A pinned buffer of `wanted` bytes, of less (down to `least`), or a pageable one.

    Returns the buffer and its usable bytes; `buffer.pinned` tells a pageable one.
    """
    size = wanted
    while True:
        buffer = HostBuffer(size)
        buffer.touch()
        if buffer.pin(register=register):
            return buffer, size
        if size <= least:
            return buffer, size
        size = max(least, size // 2)


def _register(address: int, nbytes: int) -> int:
    status = int(cuda_runtime().cudaHostRegister(address, nbytes, 0))
    if status:
        clear_cuda_error("cuda")
    return status


def cuda_runtime() -> Any:
    """The CUDA runtime library, as torch has loaded it."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def clear_cuda_error(device: str) -> None:
    """A failed registration leaves its error behind, and the next kernel launch reports it as its
    own; launching one here takes the error away."""
    try:
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
    except RuntimeError:
        return

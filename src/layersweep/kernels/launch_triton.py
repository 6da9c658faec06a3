"""What our Triton kernels share: their launch, and what a device has room for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

BIG_SHARED = 200 * 1024  # bytes of shared memory per block: sm_90 has them, sm_80 and sm_89 do not


class Launcher:
    """Launches a Triton kernel, compiled once for each `key`: all that makes compiled kernels
    differ. Triton's own launch looks at every argument to find the compiled one, which takes the
    host 3 times as long."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], args: Sequence[object], key: tuple[object, ...], *,
        warps: int, stages: int,
    ) -> None:  # fmt: skip
        """`args`: all that the kernel takes, constants included."""
        key = (*key, warps, stages)
        compiled = self._compiled.get(key)  # Triton's interpreter compiles nothing: None
        if compiled is not None:
            compiled[grid](*args)
        else:
            launch = self._kernel[grid]
            self._compiled[key] = launch(*args, num_warps=warps, num_stages=stages)


@cache
def has_big_shared(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_block_optin >= BIG_SHARED)

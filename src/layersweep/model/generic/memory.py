"""torch's allocator where transformers' modules take memory from it for every step."""

from __future__ import annotations

import os
import warnings

import torch

from layersweep.errors import Fallback

_CHOSEN = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_TRIED = 32 * 2**20  # bytes; more than what shares a segment with others


def let_segments_grow(device: torch.device) -> Fallback | None:
    """Let torch map memory into one segment as it is needed: tensors of a layer have many sizes,
    and segments that are cut to some of them fit no others. With those, 14.2 GB were held on an
    H200 where 9.4 GB were planned. What the user's environment says of the allocator stands.
    Returns the fallback where the driver cannot do it."""
    if device.type != "cuda" or any(name in os.environ for name in _CHOSEN):
        return None
    try:
        _grow("True")
        torch.empty(_TRIED, dtype=torch.uint8, device=device)
    except RuntimeError as failure:  # of the driver
        _grow("False")
        why = str(failure).splitlines()[0]
        used = "segments of fixed sizes, which may hold more than the plan says"
        return Fallback("memory", "segments that grow", used, why)
    return None


def _grow(whether: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions have another name for it
        torch.cuda.memory._set_allocator_settings(f"expandable_segments:{whether}")

"""How weights are stored: one module a format, see `storage.py` for what each has to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage import (
    awq_gptq,
    bitsandbytes,
    fp8,
    ggml,
    latent,
    mxfp4,
    nvfp4,
    packed,
)
from layersweep.checkpoint.storage.settings import NO_SETTINGS, Settings, read_settings
from layersweep.checkpoint.storage.storage import Format, Headers, Packed, Storage

__all__ = [
    "FORMATS",
    "NO_SETTINGS",
    "Format",
    "Headers",
    "Packed",
    "Settings",
    "Storage",
    "formats_of",
    "read_settings",
]

# A weight is of the first format that takes one of its tensors. The last one takes every tensor:
# it reads floats too, and says what is wrong with those that are neither.
FORMATS: tuple[Format, ...] = (
    awq_gptq, packed, nvfp4, mxfp4, fp8, latent, ggml, bitsandbytes,
)  # fmt: skip


def formats_of(tensors: Mapping[str, StoredTensor]) -> dict[str, Format]:
    """The format of every weight, by the name of the weight. `tensors`: by names that may differ
    from those in the file."""
    found: dict[str, tuple[int, Format]] = {}
    for name, tensor in tensors.items():
        named = tensor if tensor.name == name else replace(tensor, name=name)
        for rank, one in enumerate(FORMATS):
            base = one.base(named)
            if base is not None:
                if base not in found or rank < found[base][0]:
                    found[base] = rank, one
                break
    return {base: one for base, (_, one) in found.items()}

"""How weights are stored: one module a format, see `storage.py` for what each has to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage import bitsandbytes, ggml, latent
from layersweep.checkpoint.storage.storage import Format, Headers, Packed, Storage

__all__ = ["FORMATS", "Format", "Headers", "Packed", "Storage", "formats_of"]

# A tensor is of the first format that takes it. The last one takes every tensor: it reads floats
# too, and says what is wrong with those that are neither.
FORMATS: tuple[Format, ...] = (latent, ggml, bitsandbytes)


def formats_of(tensors: Mapping[str, StoredTensor]) -> dict[str, Format]:
    """The format of every weight, by the name of the weight. `tensors`: by names that may differ
    from those in the file."""
    found: dict[str, Format] = {}
    for name, tensor in tensors.items():
        named = tensor if tensor.name == name else replace(tensor, name=name)
        for one in FORMATS:
            base = one.base(named)
            if base is not None:
                found.setdefault(base, one)
                break
    return found

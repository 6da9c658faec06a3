"""Scales beside the data of a weight, in whatever dtype: which numbers they are, and whether they
can be. None may be negative, NaN or infinite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage.storage import Look
from layersweep.errors import CheckpointError
from layersweep.problems import DOWNLOAD_AGAIN

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_SCALES = ("F32", "BF16", "F16")
E8M0, E4M3 = "U8", "F8_E4M3"  # a power of two, as its exponent + 127; 8 bits with a sign
# The least bits that are infinite or NaN; those of negative numbers are greater.
_NO_NUMBER = {"F16": 0x7C00, "BF16": 0x7F80, E4M3: 0x7F, E8M0: 0xFF}
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn"}


def look_at(piece: int, scale: StoredTensor) -> Look:
    """The glance that tells whether a closer look is needed."""
    count = math.prod(scale.shape)
    if scale.dtype == "F32":
        return Look(piece, "f4", count)
    dtype: Literal["u1", "u2"] = "u1" if scale.dtype in (E4M3, E8M0) else "u2"
    return Look(piece, dtype, count, step=int(dtype[1]), below=_NO_NUMBER[scale.dtype])


def floats(part: Tensor, scale: StoredTensor) -> Tensor:
    """float32 of bytes as they were read; exact."""
    import torch

    if scale.dtype == E8M0:
        power = part.int()  # 2^-127, which is denormal, or the exponent of a float32
        return torch.where(power == 0, 0x00400000, power << 23).view(torch.float32)
    return part.view(getattr(torch, TORCH_NAMES[scale.dtype])).float()


def check_scales(part: Tensor, scale: StoredTensor, least: float = 0.0) -> None:
    """A closer look. Raises CheckpointError for what is no number, or less than `least`."""
    values = floats(part, scale)
    bad = ~(values.isfinite() & (values >= least))
    if bad.any():
        index = int(bad.int().argmax())
        raise CheckpointError(
            f"{scale.file.name}: {scale.name}: found a scale of {values[index].item()} at index "
            f"{index}, needed finite scales "
            + (f"from {least} on" if least else "that are not negative"),
            hint=DOWNLOAD_AGAIN,
        )

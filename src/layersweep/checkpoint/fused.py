"""Several weights in one tensor, all experts of a layer for example: each is a slice of it.

Flat, row by row, a slice is consecutive elements, so its bytes lie together, packed or float. Its
scales do too, where no block of them covers elements of two slices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from layersweep.checkpoint.storage import Storage
from layersweep.checkpoint.storage.floats import Floats
from layersweep.checkpoint.weights import Weight
from layersweep.families.names import Fused


def straddled_elements(fused: Fused, storage: Storage) -> int | None:
    """Elements of a slice that its blocks do not divide; None where they divide all."""
    counts = (part.rows * fused.shape[-1] for part in fused.parts)
    return next((count for count in counts if count % storage.block), None)


def weights_of(whole: Weight, fused: Fused) -> Iterator[Weight]:
    """Every weight of a fused one whose blocks straddle none of them."""
    columns = fused.shape[-1] if len(fused.shape) > 1 else 1
    storage = whole.storage
    if fused.transposed:
        assert isinstance(storage, Floats)
        storage = replace(storage, transposed=True)
    for part in fused.parts:
        count = math.prod(part.shape)
        yield Weight(part.name, part.shape, storage.cut(part.first * columns, count, part.shape))

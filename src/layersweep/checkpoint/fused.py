"""Several weights in one tensor, all experts of a layer for example: each is a slice of it.

Flat, row by row, a slice is consecutive elements, so its bytes lie together, packed or float. Its
scales do too, where no block of them covers elements of two slices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.weights import Nested, Quant, Weight
from layersweep.families.names import Fused


def straddled_elements(fused: Fused, quant: Quant) -> int | None:
    """Elements of a slice that the blocks of `quant` do not divide; None where they divide all."""
    counts = (part.rows * fused.shape[-1] for part in fused.parts)
    return next((count for count in counts if count % quant.blocksize), None)


def weights_of(whole: Weight, fused: Fused) -> Iterator[Weight]:
    """Every weight of a fused one whose blocks straddle none of them."""
    columns = fused.shape[-1] if len(fused.shape) > 1 else 1
    for part in fused.parts:
        shape = part.shape[::-1] if fused.transposed else part.shape
        start = part.first * columns
        yield _slice(whole, part.name, shape, start, transposed=fused.transposed)


def _slice(
    whole: Weight, name: str, shape: tuple[int, ...], start: int, *, transposed: bool
) -> Weight:
    count, quant = math.prod(shape), whole.quant
    if quant is None:
        data = _cut(whole.data, start, count).reshaped(shape)
        return Weight(name, shape[::-1] if transposed else shape, data, None, transposed)
    data = _cut(whole.data.as_bytes(), start // 2, count // 2)
    first, blocks = start // quant.blocksize, count // quant.blocksize
    scales = replace(
        quant,
        absmax=_cut(quant.absmax, first, blocks),
        nested=quant.nested and _nested_slice(quant.nested, first, blocks),
        other_nbytes=0,
    )
    return Weight(name, shape, data, scales)


def _nested_slice(nested: Nested, first: int, blocks: int) -> Nested:
    """The scales of scales [first, first + blocks): the first block may begin before them."""
    block, skip = divmod(first, nested.blocksize)
    absmax = _cut(nested.absmax, block, -(-(skip + blocks) // nested.blocksize))
    return replace(nested, absmax=absmax, skip=skip)


def _cut(tensor: StoredTensor, start: int, count: int) -> StoredTensor:
    """Elements [start, start + count) of a tensor taken flat, as its name then says."""
    flat = tensor.reshaped((math.prod(tensor.shape),))
    return replace(flat.rows(start, count), name=f"{tensor.name}[{start}:{start + count}]")

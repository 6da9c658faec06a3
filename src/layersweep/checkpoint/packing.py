"""One tensor's way from a file into a shard, a million elements at a time: packed, or copied.

The bytes are those of bitsandbytes' `quantize_4bit` of the whole weight: blocks do not depend on
each other, and the scales, which do where they are quantized too, are put together first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layersweep.checkpoint import nf4
from layersweep.checkpoint.header import FLOAT_NAMES, ITEM_BYTES, StoredTensor
from layersweep.checkpoint.linear import Planned
from layersweep.checkpoint.nf4_numba import pack_blocks
from layersweep.checkpoint.shard_file import Row, ShardFile
from layersweep.checkpoint.storage.bitsandbytes import STATE
from layersweep.checkpoint.writer import DTYPE_NAMES, bytes_of
from layersweep.problems import DOWNLOAD_AGAIN, FileProblem, Problem

PIECE = 1 << 20  # elements: a multiple of two blocks of any size
_STATE_PART = f".{STATE}nf4"
_NESTED_LEVELS = 256

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Format:
    """Elements to a scale, and whether the scales are quantized too (double quantization)."""

    blocksize: int
    nested: bool

    def blocks(self, stored: StoredTensor) -> int:
        return -(-math.prod(stored.shape) // self.blocksize)

    def parts(self, tensor: Planned, absmax: Tensor | None) -> dict[str, Tensor]:
        """The tensors of a linear weight under their names, the packed one without memory.

        `absmax` f32 [blocks]; None where only dtypes and shapes are asked for. Then the size of
        the state is not the final one: it spells the scales' mean in decimal digits.
        """
        stored = tensor.stored
        count, blocks = math.prod(stored.shape), self.blocks(stored)
        packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device="meta")
        if absmax is not None:
            quantized = nf4.with_scales(packed, absmax, self.blocksize, self.nested)
        elif self.nested:
            outer = torch.empty(-(-blocks // nf4.NESTED_BLOCKSIZE), device="meta")
            table = torch.empty(_NESTED_LEVELS, device="meta")
            nested = nf4.NestedScales(outer, table, nf4.NESTED_BLOCKSIZE, 0.0)
            levels = torch.empty(blocks, dtype=torch.uint8, device="meta")
            quantized = nf4.QuantizedTensor(packed, levels, self.blocksize, nested)
        else:
            plain = torch.empty(blocks, device="meta")
            quantized = nf4.QuantizedTensor(packed, plain, self.blocksize, None)
        dtype = getattr(torch, FLOAT_NAMES[stored.dtype])
        return nf4.to_tensors(tensor.name, quantized, dtype, stored.shape)


@dataclass(frozen=True)
class Job:
    """A tensor, what a header says of its parts, and the one whose size is found on the way."""

    tensor: Planned
    rows: tuple[Row, ...]
    state: str | None

    @classmethod
    def of(cls, tensor: Planned, form: Format) -> Job:
        stored = tensor.stored
        if not tensor.linear:
            return cls(tensor, ((tensor.name, stored.dtype, stored.shape),), None)
        state = tensor.name + _STATE_PART
        rows = (
            (name, DTYPE_NAMES[part.dtype], tuple(part.shape))
            for name, part in form.parts(tensor, None).items()
            if name != state
        )
        return cls(tensor, tuple(rows), state)

    @property
    def nbytes(self) -> int:
        """Of all but the state."""
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in self.rows)


def pack(job: Job, file: int, shard: ShardFile, form: Format, advance: Advance) -> bytes:
    """Write a linear weight, read from descriptor `file`, to `shard`; returns its state.

    `advance` hears of each piece's bytes. Raises FileProblem for NaN and infinite weights.
    """
    name, stored = job.tensor.name, job.tensor.stored
    absmax = torch.empty(form.blocks(stored))
    for start, values in _pieces(stored, file):
        _check_finite(values, stored, start)
        scales = absmax[start // form.blocksize :]
        shard.write(name, bytes_of(_pack_piece(values.float(), scales, form)), start // 2)
        advance(values.nbytes)
    parts = form.parts(job.tensor, absmax)
    for part, _, _ in job.rows:
        if part != name:
            shard.write(part, bytes_of(parts[part]))
    return bytes(bytes_of(parts[f"{name}{_STATE_PART}"]))


def copy(job: Job, file: int, shard: ShardFile, advance: Advance) -> None:
    """Write a tensor that stays as it is. Raises FileProblem for NaN and infinite values."""
    stored = job.tensor.stored
    for start, values in _pieces(stored, file):
        if values.is_floating_point():
            _check_finite(values, stored, start)
        shard.write(job.tensor.name, bytes_of(values), start * ITEM_BYTES[stored.dtype])
        advance(values.nbytes)


def _pack_piece(values: Tensor, absmax: Tensor, form: Format) -> Tensor:
    """Packed u8 of f32 `values` [n], whose scales go to the start of `absmax`."""
    full = len(values) - len(values) % form.blocksize
    blocks = full // form.blocksize
    packed = torch.empty((len(values) + 1) // 2, dtype=torch.uint8)
    if blocks:
        pack_blocks(
            values[:full].numpy(), nf4.level_bounds().numpy(), np.float32(nf4.SMALLEST_SCALE),
            packed[: full // 2].numpy(), absmax[:blocks].numpy(),
        )  # fmt: skip
    if full < len(values):
        rest = nf4.quantize(values[full:], form.blocksize, nested=False)
        packed[full // 2 :] = rest.packed
        absmax[blocks] = rest.absmax[0]
    return packed


def _pieces(stored: StoredTensor, file: int) -> Iterator[tuple[int, Tensor]]:
    """(first element, values) of consecutive pieces; bytes where the dtype is no floating one."""
    count, itemsize = math.prod(stored.shape), ITEM_BYTES[stored.dtype]
    dtype = getattr(torch, FLOAT_NAMES.get(stored.dtype, "uint8"))
    for start in range(0, count, PIECE):
        piece = torch.empty(min(PIECE, count - start) * itemsize, dtype=torch.uint8)
        left, offset = bytes_of(piece), stored.offset + start * itemsize
        while left:
            read = os.preadv(file, [left], offset)
            if not read:
                found, needed = f"the end of the file at byte {offset}", f"{stored.nbytes} bytes"
                raise FileProblem(
                    Problem(str(stored.file), stored.name, found, needed, DOWNLOAD_AGAIN)
                )
            left, offset = left[read:], offset + read
        yield start, piece.view(dtype)


def _check_finite(values: Tensor, stored: StoredTensor, start: int) -> None:
    if math.isfinite(values.sum(dtype=torch.float32)):  # 5 times as fast as to look at each
        return
    bad = ~torch.isfinite(values)
    if not bad.any():  # finite ones, whose sum is not
        return
    first = int(bad.int().argmax())
    place = [int(index) for index in np.unravel_index(start + first, stored.shape)]
    found = f"{values[first].item()} at {place}"
    hint = "the model is damaged: download it again, or take another revision"
    raise FileProblem(Problem(str(stored.file), stored.name, found, "finite weights", hint))

"""Products of several experts with their rows in one launch, in Triton (sm_80 on).

Its oracle is TorchOps.products, a product per expert. Each element is one sum over K in the same
order and tile, whatever the other rows and parts are and wherever the row lies, so a row's numbers
depend on that row alone.
Importing this file imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from subprocess import CalledProcessError

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from layersweep.kernels.launch_triton import Launcher, has_big_shared
from layersweep.kernels.nvrtc import KernelError

MIN_PARTS = 16  # smaller groups do not need a kernel of their own
ROW_TILES_TOGETHER = 8  # they share a column's weights in the L2 cache


@dataclass(frozen=True)
class Tile:
    """What a program computes at once, [rows, columns] summed in steps of `depth`.

    `persistent`: one program per multiprocessor takes tile after tile, and loads for the next one
    while it ends the last. `descriptors`: the copy engine loads blocks (TMA, sm_90), of weights and
    of rows that lie one after the other.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    persistent: bool = True
    descriptors: bool = True


LARGE = Tile(128, 256, 64, stages=3, warps=8)  # 4 stages take 7 % longer on an H200 (qwen3)
GATHERING = replace(LARGE, stages=4)  # 3 stages take 3 to 4 % longer (qwen3, gpt-oss)
SMALL = Tile(128, 128, 64, stages=4, warps=8, persistent=False, descriptors=False)  # 96 KiB


def grouped_products(
    x_NK: Tensor,
    index: Tensor | None,
    weights_POK: Tensor,
    biases_PO: Tensor | None,
    spans: Sequence[tuple[int, int]],
    ends: Tensor,
    out_NO: Tensor,
    tile: Tile | None = None,
) -> None:
    """out[first:last] = x[first:last] @ weights[p].T (+ biases[p]) for the span of each part p.

    With an `index`, int64 [rows], x[index] stands for x, which may have any number of rows.
    float16 or bfloat16, summed in float32 and rounded once. Weights, each contiguous, may have
    numbers of others between them, and so may biases. Spans follow one another from row 0;
    `ends` [parts], integers on the device, are where they end, counted from anywhere. K and row
    strides are multiples of 8, at 16-byte-aligned addresses.
    """
    (parts, width, depth), rows, dtype = weights_POK.shape, spans[-1][1], x_NK.dtype
    x_row, out_row, part_step = x_NK.stride(0), out_NO.stride(0), weights_POK.stride(0)
    assert dtype == out_NO.dtype == weights_POK.dtype and dtype in (torch.float16, torch.bfloat16)
    assert x_NK.shape[1] == depth and out_NO.shape == (rows, width)
    assert len(x_NK) == rows if index is None else index.shape == (rows,) and index.is_contiguous()
    assert x_NK.stride(1) == out_NO.stride(1) == 1 and weights_POK.stride()[1:] == (depth, 1)
    assert parts == len(spans) == ends.shape[0] and ends.stride(0) == 1 and spans[0][0] == 0
    assert biases_PO is None or (biases_PO.dtype == dtype and biases_PO.stride(1) == 1)
    assert not any(one.data_ptr() % 16 for one in (x_NK, weights_POK, out_NO))
    tile = tile or _tile(x_NK.device, gathers=index is not None)
    row_tiles = sum((last - first + tile.rows - 1) // tile.rows for first, last in spans)
    if not row_tiles:
        return
    programs = row_tiles * -(-width // tile.columns)
    if tile.persistent:
        programs = min(programs, _multiprocessors(x_NK.device))
    x: Tensor | TensorDescriptor = x_NK
    weight: Tensor | TensorDescriptor = weights_POK
    if tile.descriptors:
        if index is None:
            x = TensorDescriptor(x_NK, [rows, depth], [x_row, 1], [tile.rows, tile.depth])
        weight = TensorDescriptor(
            weights_POK, [parts, width, depth], [part_step, depth, 1],
            [1, tile.columns, tile.depth],
        )  # fmt: skip
    bias, bias_part = (out_NO, 0) if biases_PO is None else (biases_PO, biases_PO.stride(0))
    fixed = (
        width, depth, x_row, part_step, out_row, max(MIN_PARTS, 1 << (parts - 1).bit_length()),
        tile.rows, tile.columns, tile.depth, ROW_TILES_TOGETHER, tile.persistent, tile.descriptors,
        index is not None, depth % tile.depth > 0,
    )  # fmt: skip
    biased = width if biases_PO is not None else 0
    where = ends if index is None else index
    args = x, where, weight, bias, out_NO, ends, parts, rows, row_tiles, biased, bias_part, *fixed
    key = x_NK.device, dtype, where.dtype, ends.dtype, *fixed
    _launch((programs, 1, 1), args, key, warps=tile.warps, stages=tile.stages)


def prove(device: torch.device, dtype: torch.dtype) -> None:
    """Compile, and try on a small input. Raises KernelError where that fails."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator) for size in ((300, 96), (2, 80, 96)))
    x, weight = x.to(device, dtype), weight.to(device, dtype)
    spans, (plain, gathered) = ((0, 130), (130, 300)), x.new_empty(2, 300, 80)
    ends = torch.tensor([130, 300], device=device)
    index = torch.arange(299, -1, -1, device=device)
    try:
        with torch.cuda.device(device):
            for _ in range(2):  # compiled, then launched as it was compiled
                grouped_products(x, None, weight, None, spans, ends, plain)
                grouped_products(x.flip(0), index, weight, None, spans, ends, gathered)
            same, found = torch.equal(plain, gathered), plain.float().cpu()
    except (TritonError, CalledProcessError, RuntimeError, OSError) as failure:
        raise KernelError(f"Triton: {failure}") from failure
    for own, (first, last) in zip(weight.float().cpu(), spans, strict=True):
        wanted = x[first:last].float().cpu() @ own.t()
        if not same or not torch.allclose(found[first:last], wanted, rtol=0.02, atol=0.1):
            raise KernelError("Triton's grouped products differ from torch's on this device")


def _tile(device: torch.device, *, gathers: bool) -> Tile:
    if not has_big_shared(device):
        return SMALL
    return GATHERING if gathers else LARGE


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(
    do_not_specialize=["parts", "rows", "row_tiles", "biased", "bias_part"],
    do_not_specialize_on_alignment=["index", "ends", "bias"],
)
def _multiply(
    x, index, weight, bias, out, ends, parts, rows, row_tiles, biased, bias_part,
    width, depth, x_row, weight_part, out_row,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr, PERSISTENT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    GATHERS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Tiles program_id, program_id + programs, ... of all parts, those of a part in a run.

    Loads may reach into the rows of the next part; only a part's own rows are stored. `biased`:
    columns that have a bias, all or none. `index` counts where it GATHERS. RAGGED: the last step
    reaches beyond `depth`.
    """
    columns = tl.cdiv(width, COLUMNS)
    first = tl.load(ends + parts - 1).to(tl.int32) - rows  # what the ends are counted from
    for tile in tl.range(
        tl.program_id(0), row_tiles * columns, tl.num_programs(0), flatten=PERSISTENT
    ):
        part, start, stop, within = 0, 0, 0, 0
        seen, begin = 0, 0
        for p in tl.static_range(PARTS):
            end = tl.load(ends + tl.minimum(p, parts - 1)).to(tl.int32) - first
            count = tl.cdiv(end - begin, ROWS) * columns
            here = (tile >= seen) & (tile < seen + count)
            part, within = tl.where(here, p, part), tl.where(here, tile - seen, within)
            start, stop = tl.where(here, begin, start), tl.where(here, end, stop)
            seen, begin = seen + count, end
        # a few row tiles, column after column, so that they use the same weights
        run = within // (TOGETHER * columns)
        tall = tl.minimum(tl.cdiv(stop - start, ROWS) - run * TOGETHER, TOGETHER)
        place = within % (TOGETHER * columns)
        row = start + (run * TOGETHER + place % tall) * ROWS
        column = place // tall * COLUMNS

        down, at = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        step = tl.arange(0, DEPTH)
        if GATHERS or not DESCRIPTORS:
            whose = tl.minimum(down, rows - 1)
            if GATHERS:
                whose = tl.load(index + whose)
            some_at = x + whose.to(tl.int64)[:, None] * x_row + step[None, :]
        if not DESCRIPTORS:
            own_at = weight + part.to(tl.int64) * weight_part
            own_at += tl.minimum(at, width - 1)[None, :] * depth + step[:, None]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            there = k + step < depth
            if DESCRIPTORS and not GATHERS:
                some = x.load([row, k])
            elif RAGGED:
                some = tl.load(some_at + k, mask=there[None, :], other=0.0)
            else:
                some = tl.load(some_at + k)
            if DESCRIPTORS:
                own = weight.load([part, column, k]).reshape(COLUMNS, DEPTH).T
            elif RAGGED:
                own = tl.load(own_at + k, mask=there[:, None], other=0.0)
            else:
                own = tl.load(own_at + k)
            total = tl.dot(some, own, total)

        added = tl.load(bias + part.to(tl.int64) * bias_part + at, mask=at < biased, other=0.0)
        total += added.to(tl.float32)[None, :]
        tl.store(
            out + down[:, None].to(tl.int64) * out_row + at[None, :],
            total.to(out.dtype.element_ty),
            mask=(down < stop)[:, None] & (at < width)[None, :],
        )


_launch = Launcher(_multiply)

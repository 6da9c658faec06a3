"""Random weights in the formats that synthetic checkpoints are written in.

A matrix of n columns gets a standard deviation of gain / sqrt(n), and a mean of 0. The levels of
NF4 are drawn for that: equally likely ones have a mean of 0.023. In a matrix of 4096 columns that
is a rank-one part larger than all the noise, every token is pulled into its direction, and from
layer 14 on two experts get them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layersweep.checkpoint import nf4
from layersweep.checkpoint.storage.e2m1 import LEVELS
from layersweep.checkpoint.synth_shapes import Weights
from layersweep.checkpoint.writer import Pieces, PlannedTensor, bytes_of

POOL_BYTES = 64 * 2**20
NORMAL_PIECE = 2**20  # values drawn at once
NESTED_SPREAD = 0.1  # NF4's scales of a weight vary by up to this share
FP8_BLOCK = 128
E2M1_STD = math.sqrt(sum(level * level for level in LEVELS) / 16)


def _level_counts() -> list[int]:
    """How many of 256 random bytes become each level: p ~ exp(-tilt x level), whose mean is 0."""
    levels = np.array(nf4.NF4_CODE)
    low, high = 0.0, 10.0
    for _ in range(60):
        tilt = (low + high) / 2
        share = np.exp(-tilt * levels)
        low, high = (tilt, high) if (share * levels).sum() > 0 else (low, tilt)
    ends = np.round(256 * np.cumsum(share) / share.sum()).astype(int)
    return [int(count) for count in np.diff(ends, prepend=0)]


LEVEL_COUNTS = _level_counts()
LEVELS_STD = math.sqrt(
    sum(n * x * x for n, x in zip(LEVEL_COUNTS, nf4.NF4_CODE, strict=True)) / 256
)


@dataclass(frozen=True)
class Pool:
    """Random data, cut at random places: drawing 24 GB afresh would take longer than writing."""

    data: memoryview
    generator: torch.Generator

    @classmethod
    def draw(cls, seed: int, weights: Weights) -> Pool:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(
            torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, (POOL_BYTES // 4,),
            generator=generator,
        )  # fmt: skip
        table = _bytes_of_two(weights, generator)
        return cls(table[words.numpy().view(np.uint16)].data, generator)

    def seed(self) -> int:
        """For a generator of its own, of what is drawn while it is written."""
        return int(torch.randint(2**62, (1,), generator=self.generator))

    def take(self, count: int) -> Pieces:
        """`count` bytes: the pool from a random place on, around as often as it takes.

        The place is drawn now, so that it does not depend on who writes when; nothing is copied.
        """
        first = int(torch.randint(POOL_BYTES, (1,), generator=self.generator))

        def pieces() -> Iterator[memoryview]:
            start, left = first, count
            while left:
                piece = self.data[start : start + left]
                yield piece
                start, left = 0, left - len(piece)

        return pieces


def _bytes_of_two(weights: Weights, generator: torch.Generator) -> NDArray[np.uint8]:
    """[65536]: what two random bytes become, a byte of data."""
    if weights == "nf4":
        level = np.repeat(np.arange(16, dtype=np.uint8), LEVEL_COUNTS)
        return (level[:, None] << 4 | level).reshape(-1).astype(np.uint8)
    if weights == "fp8":
        values = torch.randn(1 << 16, generator=generator)
        return (values / values.std()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return np.tile(np.arange(256, dtype=np.uint8), 256)  # two numbers of mean 0


def normal(like: Tensor, std: float, seed: int) -> Pieces:
    """Normal values of the dtype and shape of `like`, drawn a piece at a time by a generator of
    this tensor's own."""

    def pieces() -> Iterator[memoryview]:
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, like.numel(), NORMAL_PIECE):
            size = min(NORMAL_PIECE, like.numel() - start)
            yield bytes_of(torch.randn(size, generator=generator).mul_(std).to(like.dtype))

    return pieces


def nf4_tensors(
    name: str, rows: int, columns: int, gain: float, pool: Pool
) -> Iterator[PlannedTensor]:
    """As bitsandbytes writes them, with nested scales."""
    elements = rows * columns
    blocks = -(-elements // 64)
    scale = gain / math.sqrt(columns) / LEVELS_STD
    groups = -(-blocks // nf4.NESTED_BLOCKSIZE)
    nested = nf4.NestedScales(
        torch.full((groups,), NESTED_SPREAD * scale), nf4.dynamic_map(), nf4.NESTED_BLOCKSIZE, scale
    )
    sizes = ((elements + 1) // 2, blocks)
    packed, absmax = (torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes)
    quantized = nf4.QuantizedTensor(packed, absmax, 64, nested)
    for part, tensor in nf4.to_tensors(name, quantized, torch.float16, (rows, columns)).items():
        if tensor.is_meta:
            yield PlannedTensor(part, tensor, pool.take(tensor.nbytes))
        else:
            yield PlannedTensor.of(part, tensor)


def fp8_tensors(
    name: str, rows: int, columns: int, gain: float, pool: Pool
) -> Iterator[PlannedTensor]:
    """As DeepSeek-V3 has them: a scale for 128 x 128 numbers."""
    like = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device="meta")
    yield PlannedTensor(name, like, pool.take(like.nbytes))
    grid = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    yield PlannedTensor.of(f"{name}_scale_inv", torch.full(grid, gain / math.sqrt(columns)))


def mxfp4_tensors(
    name: str, shape: tuple[int, int, int], gain: float, pool: Pool
) -> Iterator[PlannedTensor]:
    """As gpt-oss has them, of [experts, rows, columns]; `name` ends in "_blocks". Scales are two
    neighbouring powers of two, as many of each as give the standard deviation."""
    experts, rows, columns = shape
    groups = experts, rows, columns // 32
    blocks, scales = (
        torch.empty(size, dtype=torch.uint8, device="meta") for size in ((*groups, 16), groups)
    )
    yield PlannedTensor(name, blocks, pool.take(blocks.nbytes))
    wanted = gain / math.sqrt(columns) / E2M1_STD
    power = math.floor(math.log2(wanted))
    doubled = round(256 * ((wanted / 2.0**power) ** 2 - 1) / 3)  # of 256 groups
    drawn = pool.take(scales.nbytes)

    def pieces() -> Iterator[memoryview]:
        for piece in drawn():
            twice = np.frombuffer(piece, np.uint8) < doubled
            yield (twice + np.uint8(127 + power)).data

    yield PlannedTensor(name.removesuffix("_blocks") + "_scales", scales, pieces)

"""Hadamard rotation of head vectors, as additions alone.

Legend: D head size, N vectors. Work happens transposed, [D, N], so that every step is one long
row operation. A matrix product would do, but its rounding changes with the number of rows (seen
on CPU BLAS between 1 and 13 rows), and an encoding must not depend on the batch that it is in.
Sums and differences round the same everywhere, on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# 128 KiB of floats: a codec's few buffers stay in a core's own cache, and torch runs an operation
# on so few elements in the calling thread. Its threads would meet at a barrier after each of a
# hundred short operations: with another job on the machine, a factor of 20 was lost that way. Two
# Python threads gained nothing either.
_CPU_ELEMENTS = 2**15
_GPU_ELEMENTS = 2**24


def block_sizes(dim: int) -> list[int]:
    """Powers of two that add up to `dim`, largest first: 128 -> [128], 80 -> [64, 16]."""
    return [1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1]


def random_signs(dim: int) -> list[float]:
    """`dim` fixed signs, the same on every machine and in every version of any library."""
    bits = hashlib.shake_128(f"layersweep signs {dim}".encode()).digest((dim + 7) // 8)
    return [1.0 - 2.0 * (bits[i // 8] >> i % 8 & 1) for i in range(dim)]


@cache
def rotation_weights(dim: int, randomized: bool, device: torch.device) -> Tensor:
    """[D, 1] float32: sign and 1 / sqrt(block) of every coordinate.

    With W = diag(weights) and S the unnormalized Sylvester matrices on the diagonal, S W is
    orthonormal and W S its inverse, because S is symmetric and S S = block x identity.
    """
    signs = random_signs(dim) if randomized else [1.0] * dim
    norms = [size**-0.5 for size in block_sizes(dim) for _ in range(size)]
    weights = [sign * norm for sign, norm in zip(signs, norms, strict=True)]
    return torch.tensor(weights, dtype=torch.float32, device=device).unsqueeze(1)


def row_chunks(count: int, dim: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `count` vectors of `dim`. Chunk sizes change no result, only the speed."""
    step = max(1, (_CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS) // dim)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _hadamard(y_DN: Tensor) -> Tensor:
    """Unnormalized block-diagonal Sylvester transform along D; overwrites its input."""
    spare_DN, vectors = torch.empty_like(y_DN), y_DN.shape[1]
    start, blocks = 0, block_sizes(y_DN.shape[0])
    for size in blocks:
        source, target = y_DN[start : start + size], spare_DN[start : start + size]
        for stage in range(size.bit_length() - 1):
            shape = (-1, 2, 2**stage, vectors)
            left, right = source.view(shape).unbind(1)
            sums, differences = target.view(shape).unbind(1)
            torch.add(left, right, out=sums)
            torch.sub(left, right, out=differences)
            source, target = target, source
        if len(blocks) == 1:
            return source
        if size.bit_length() % 2 == 0:  # an odd number of stages ends in the spare buffer
            y_DN[start : start + size] = source
        start += size
    return y_DN


def rotate(x_ND: Tensor, randomized: bool) -> Tensor:
    """x [N, D] floating -> rotated [D, N] float32."""
    y_DN = torch.empty(x_ND.shape[::-1], dtype=torch.float32, device=x_ND.device)
    y_DN.copy_(x_ND.t())
    return _hadamard(y_DN.mul_(rotation_weights(x_ND.shape[1], randomized, x_ND.device)))


def rotate_back(y_DN: Tensor, randomized: bool) -> Tensor:
    """Inverse of rotate, [D, N] -> [N, D] view; overwrites its input."""
    weights = rotation_weights(y_DN.shape[0], randomized, y_DN.device)
    return _hadamard(y_DN).mul_(weights).t()


def add_rows(rows: Tensor, dim: int = 0) -> Tensor:
    """Sum along `dim` in a fixed tree of additions, so that it rounds alike for any shape."""
    while (count := rows.shape[dim]) > 1:
        half = count // 2
        folded = rows.narrow(dim, 0, half) + rows.narrow(dim, half, half)
        if count % 2:
            folded.select(dim, 0).add_(rows.select(dim, count - 1))
        rows = folded
    return rows.select(dim, 0)


def max_rows(rows: Tensor, dim: int = 0) -> Tensor:
    """Maximum along `dim`, NaN where one is NaN; folded by halves (faster than amax here)."""
    while (count := rows.shape[dim]) > 1:
        half = (count + 1) // 2
        rows = torch.maximum(rows.narrow(dim, 0, half), rows.narrow(dim, count - half, half))
    return rows.select(dim, 0)

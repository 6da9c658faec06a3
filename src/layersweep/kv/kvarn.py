"""`kvarn`: tiles of 128 tokens (or `@group=64`), rotated, scaled along both axes, min and max.

Of a tile, D channels x S tokens, rotated by the Sylvester Hadamard matrix over sqrt(D):
    16 times: divide every column by its standard deviation, then every row by its own. The products
        of the divisors are the scales c and r, kept within exp(-0.3) ... exp(10), each divisor
        within 1e-3 ... 1e3. Those of the most even tile so far are taken: with the smallest
        max / min of the columns' deviations + max / min of the rows'.
    zero = min, scale = (max - min) / (2^bits - 1) of every row of what is left
    code = round((y - zero) / scale);   x^ = rotate_back((code * r scale + r zero) * c)
Rows are the channels of keys and the tokens of values. Stored are, as fp16, r scale and r zero for
every row and c for every column. Tokens stay exact until their tile is full. Bits per element of a
full tile: keys bits + 32 / S + 16 / D, values bits + 16 / S + 32 / D.

Source: KVarN, arXiv 2606.03458, and its code for vLLM (kv_cache_dtype kvarn_k4v2_g128, sinkhorn.py,
kvarn_store.py). The program multiplies scales as sums of logarithms. It keeps the first tile of a
text exact, too: write @sink=128. Keys come before RoPE, there after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layersweep.kv.codec import Codec, Grouping
from layersweep.kv.groups import GroupCodec
from layersweep.kv.identity import Identity
from layersweep.kv.packing import pack_bits, unpack_bits
from layersweep.kv.rotate import add_rows, max_rows, rotate, rotate_back
from layersweep.kv.stream import Role
from layersweep.kv.uniform import ROUNDER, halves
from layersweep.kv.vector_codec import VectorCodec

ROUNDS = 16
_DEVIATIONS = (1e-3, 1e3)
_SCALES = (math.exp(-0.3), math.exp(10))
_SMALLEST_STEP = 1e-10
_SMALLEST_DEVIATION = 1e-8
_CHANNELS, _TOKENS = 0, 2  # dimensions of y [D, N, S]


@dataclass(frozen=True)
class KVarN(GroupCodec):
    """See the module's text. A tile holds codes, then r scale, r zero and c."""

    key_bits: int
    value_bits: int
    group: str = "128"
    rows: int = _CHANNELS

    method = "kvarn"

    @property
    def how(self) -> Grouping:
        return Grouping(int(self.group))

    def for_role(self, role: Role) -> VectorCodec:
        return replace(self, rows=_TOKENS) if role == "value" else self

    def width(self, dim: int, bits: int) -> int:
        return dim * self.how.group * bits // 8 + sum(self._scale_bytes(dim))

    def encode_tiles(self, x_NSD: Tensor, bits: int) -> Tensor:
        count, group, dim = x_NSD.shape
        y = rotate(x_NSD.reshape(-1, dim), randomized=False).view(dim, count, group)
        row, column = balanced(y, self.rows)
        left, along, last = y / column / row, _TOKENS - self.rows, 2**bits - 1
        low, high = -_most(-left, along), _most(left, along)
        step = ((high - low) / last).clamp_(min=_SMALLEST_STEP)
        codes = left.sub_(low).div_(step).add_(ROUNDER).sub_(ROUNDER).clamp_(0, last).int()
        # a row's or a column's number, [D, N, 1] or [1, N, S] -> bytes [N, 2 D or 2 S]
        scales = [
            part.half().movedim(1, 0).reshape(count, -1).contiguous().view(torch.uint8)
            for part in (row * step, row * low, column)
        ]
        packed = pack_bits(codes.view(dim, -1), bits).view(count, -1)
        return torch.cat([packed, *scales], dim=1)

    def decode_tiles(self, codes: Tensor, dim: int, bits: int) -> Tensor:
        count, group = len(codes), self.how.group
        sizes = [dim * group * bits // 8, *self._scale_bytes(dim)]
        packed, *scales = torch.split(codes, sizes, dim=1)
        rows, columns = ((dim, 1), (1, group)) if self.rows == _CHANNELS else ((1, group), (dim, 1))
        step, low, column = (
            halves(part).float().view(count, *shape).movedim(0, 1)
            for part, shape in zip(scales, (rows, rows, columns), strict=True)
        )
        y = unpack_bits(packed.reshape(count * group, -1), bits).float().view(dim, count, group)
        y = y.mul_(step).add_(low).mul_(column)
        return rotate_back(y.view(dim, -1), randomized=False).reshape(count, group, dim)

    def identity(self) -> Codec:
        return Identity(of=self.method, randomized=False)

    def _scale_bytes(self, dim: int) -> list[int]:
        """Of r scale, r zero and c."""
        group = self.how.group
        rows, columns = (dim, group) if self.rows == _CHANNELS else (group, dim)
        return [2 * rows, 2 * rows, 2 * columns]


def balanced(y: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Tiles y [D, N, S], `rows` the dimension of their rows -> scales of rows and of columns, which
    divide y. One of them [D, N, 1], the other [1, N, S]. Nothing non-finite gets into them."""
    columns = _TOKENS - rows
    row, column = (torch.ones_like(_most(y, along)) for along in (columns, rows))
    of_rows, of_columns = _deviation(y, columns), _deviation(y, rows)
    best, least = (row, column), _spread(of_rows, rows) + _spread(of_columns, columns)
    for _ in range(ROUNDS):
        column = (column * of_columns.clamp(*_DEVIATIONS)).clamp_(*_SCALES)
        of_rows = _deviation(y / column / row, columns)
        row = (row * of_rows.clamp(*_DEVIATIONS)).clamp_(*_SCALES)
        left = y / column / row
        of_rows, of_columns = _deviation(left, columns), _deviation(left, rows)
        spread = _spread(of_rows, rows) + _spread(of_columns, columns)
        better = spread <= least
        least = torch.where(better, spread, least)
        best = torch.where(better, row, best[0]), torch.where(better, column, best[1])
    return best


def _spread(deviation: Tensor, along: int) -> Tensor:
    """The largest over the smallest one of each tile, [1, N, 1]."""
    return _most(deviation, along) / -_most(-deviation, along).clamp(max=-_SMALLEST_DEVIATION)


def _most(x: Tensor, along: int) -> Tensor:
    """Maximum along a dimension, which stays as 1."""
    return max_rows(x, along).unsqueeze(along)


def _deviation(x: Tensor, along: int) -> Tensor:
    """Standard deviation along a dimension, which stays as 1; of a sample, so n - 1."""
    count = x.shape[along]
    mean = add_rows(x, along) / count
    around = (add_rows(x * x, along) - mean * mean * count) / (count - 1)
    # a square root by rsqrt, for the reason in kv/lloyd.py
    return (around * around.clamp(min=1e-36).rsqrt()).clamp(min=0).unsqueeze(along)

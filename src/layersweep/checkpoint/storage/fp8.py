"""FP8: e4m3 numbers, and a scale for all, for each row, or for each block of 128 x 128.

data F8_E4M3 [rows, columns] | weight_scale_inv F32 [ceil(rows / 128), ceil(columns / 128)]
data F8_E4M3 [rows, columns] | weight_scale F32, F16 or BF16: one, [rows, 1], or such a grid

    value = e4m3 * scale        in float32, then one cast; both names mean a factor

DeepSeek-V3 and Qwen3 publish the first; compressed-tensors, modelopt and fbgemm write the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage import scales
from layersweep.checkpoint.storage.storage import Headers, Look, Storage, cut_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from layersweep.kernels.kernels import Kernels
    from layersweep.kernels.weights import Alike

SUFFIXES = ("_scale_inv", "_scale")
_PIECE = 1 << 20  # elements that are decoded at once on the CPU


@dataclass(frozen=True)
class Fp8(Storage):
    """`tile`: rows and columns that share a scale, no more than there are."""

    data: StoredTensor
    scale: StoredTensor
    tile: tuple[int, int]

    @property
    def kind(self) -> str:
        return "fp8"

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.data, self.scale

    @property
    def block(self) -> int:
        """Weights are cut between rows of scales."""
        rows, columns = self.data.shape
        return columns * (1 if self.tile[0] == rows else self.tile[0])

    @property
    def words(self) -> str:
        rows, columns = self.data.shape
        if self.tile == (rows, columns):
            return "one scale"
        return (
            "a scale per row"
            if self.tile == (1, columns)
            else "blocks of {} x {}".format(*self.tile)
        )

    @property
    def layout(self) -> tuple[object, ...]:
        return self.kind, self.tile, self.scale.dtype

    @property
    def looks(self) -> tuple[Look, ...]:
        return (scales.look_at(1, self.scale),)

    def check(self, parts: Sequence[Tensor]) -> None:
        scales.check_scales(parts[1], self.scale)

    def packed(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tiles:
        return Tiles(parts[0].view(shape), parts[1], self.scale, self.tile)

    def cut(self, start: int, count: int, shape: tuple[int, ...]) -> Fp8:
        rows, columns = self.data.shape
        scale, (height, width) = self.scale, self.tile
        if height < rows:
            across = -(-columns // width)
            first, many = start // columns // height, -(-(count // columns) // height)
            scale = cut_tensor(scale, first * across, many * across)
        data = cut_tensor(self.data, start, count).reshaped(shape)
        return replace(self, data=data, scale=scale, tile=(min(height, shape[0]), width))


@dataclass(frozen=True)
class Tiles:
    """codes uint8 [rows, columns]; scales uint8, the bytes of `stored`."""

    codes: Tensor
    scales: Tensor
    stored: StoredTensor
    tile: tuple[int, int]

    def decode(self, out: Tensor) -> None:
        import torch

        rows, columns = self.codes.shape
        height, width = self.tile
        grid = scales.floats(self.scales, self.stored).view(-(-rows // height), -1)
        step = rows if self.codes.is_cuda else max(1, _PIECE // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            own = grid[torch.arange(start, stop, device=grid.device) // height]
            spread = own.repeat_interleave(width, dim=1)[:, :columns]
            values = self.codes[start:stop].view(torch.float8_e4m3fn).float()
            out.view(rows, columns)[start:stop] = values * spread

    def launch(self, kernels: Kernels, out: Tensor) -> None:
        kernels.fp8_dequantize(self.codes, self.scales, self.stored.dtype, self.tile, out)

    def launch_alike(self, kernels: Kernels, out: Tensor, alike: Alike) -> bool:
        kernels.fp8_dequantize(self.codes, self.scales, self.stored.dtype, self.tile, out, alike)
        return True


def base(tensor: StoredTensor) -> str | None:
    return tensor.name if tensor.dtype == "F8_E4M3" and not tensor.name.endswith(SUFFIXES) else None


def companions(base: str) -> tuple[str, ...]:
    return tuple(base + suffix for suffix in SUFFIXES)


def match(headers: Headers, base: str, shape: tuple[int, ...]) -> Storage | None:
    data = headers.tensors[base]
    there = [base + suffix for suffix in SUFFIXES if base + suffix in headers.tensors]
    if len(there) != 1:
        found = f"FP8 data with {' and '.join(there) or 'no scale'}"
        headers.problem(data, found, f"{base}_scale_inv or {base}_scale in one of the shards")
        return None
    if data.shape != shape or len(shape) != 2:
        headers.problem(data, data.describe(), f"F8_E4M3 {list(shape)}, by config.json")
        return None
    scale = headers.tensors[there[0]]
    tile = _tile_of(scale, shape, headers.settings.block)
    if tile is None or scale.dtype not in scales.FLOAT_SCALES:
        height, width = headers.settings.block
        grid = [-(-shape[0] // height), -(-shape[1] // width)]
        needed = (
            f"F32, F16 or BF16: [1], [{shape[0]}, 1], or {grid} for blocks of {height} x {width}"
        )
        headers.problem(scale, scale.describe(), needed)
        return None
    return Fp8(data, scale, tile)


def _tile_of(
    scale: StoredTensor, shape: tuple[int, ...], block: tuple[int, int]
) -> tuple[int, int] | None:
    """Rows and columns to a scale, by how many there are."""
    rows, columns = shape
    if math.prod(scale.shape) == 1:
        return rows, columns
    if scale.shape in ((rows,), (rows, 1)):
        return 1, columns
    height, width = block
    if scale.shape == (-(-rows // height), -(-columns // width)):
        return min(height, rows), min(width, columns)
    return None

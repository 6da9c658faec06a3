"""Kernels that make FP8, MXFP4, NVFP4 and 4-bit integers dense, one weight or several alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kernels.codecs import CodecKernels, same
from layersweep.kernels.runtime import Argument

ALIKE = 32  # weights that one launch decodes together, as in the sources
_INT4 = f"5P6iq{ALIKE}q"
SCALED_LAYOUTS = {
    "fp8": {"fp8_tiles": f"3P6iq{ALIKE}q"},
    "fp4": {"mxfp4": f"3Piq{ALIKE}q", "nvfp4": f"4P2iq{ALIKE}q"},
    "int4": {f"int4_{packing}": _INT4 for packing in ("rows", "gptq", "awq")},
}
_KINDS = {"F16": 0, "BF16": 1, "F32": 2}  # of scales
_EIGHTS = 256 * 2  # of a thread block
_SIDE = 64  # of a tile of weights that lie turned


@dataclass(frozen=True)
class Alike:
    """Quantized weights that lie as a first one does, `shifts` bytes after it, with the nested
    `offsets` of each (0 where there are none); dense they lie `step` elements apart."""

    shifts: Sequence[int]
    offsets: Sequence[float]
    step: int


class ScaledKernels(CodecKernels):
    """The part of `Kernels` that serves stream/ with formats of other quantizers. T: the module's
    compute dtype.

    Each fills `out` (T, [rows, columns]) as the format's file in checkpoint/storage/ does, bit for
    bit, and what lies `alike`, if it is given. Bytes come as uint8 at addresses that are multiples
    of 8; columns are a multiple of 8.
    """

    def fp8_dequantize(
        self, codes: Tensor, scales: Tensor, dtype: str, tile: tuple[int, int], out: Tensor,
        alike: Alike | None = None,
    ) -> None:  # fmt: skip
        """codes [rows, columns] e4m3; scales of `dtype` ("F32"), one for each `tile` of rows and
        columns. A width that is no multiple of 8 is that of all columns."""
        columns = out.shape[1]
        height, width = tile
        self._same((codes, scales), out)
        assert codes.numel() == out.numel() and (width % 8 == 0 or width == columns)
        across = columns // 8
        sizes = across, height, -(-width // 8), -(-columns // width), _KINDS[dtype]
        for start, parts, shifts in _launches(out, alike):
            eights = out.numel() // 8
            args = (codes, scales, start, eights, *sizes, *shifts)
            self._module("fp8").launch("fp8_tiles", (-(-eights // _EIGHTS), parts, 1), 256, args)

    def mxfp4_dequantize(
        self, codes: Tensor, scales: Tensor, out: Tensor, alike: Alike | None = None
    ) -> None:
        """codes, two numbers a byte; scales, an exponent for 32 numbers."""
        self._same((codes, scales), out)
        assert codes.numel() * 2 == out.numel() == scales.numel() * 32
        for start, parts, shifts in _launches(out, alike):
            eights = out.numel() // 8
            args = (codes, scales, start, eights, *shifts)
            self._module("fp4").launch("mxfp4", (-(-eights // _EIGHTS), parts, 1), 256, args)

    def nvfp4_dequantize(
        self, codes: Tensor, scales: Tensor, whole: Tensor, divides: bool, out: Tensor,
        alike: Alike | None = None,
    ) -> None:  # fmt: skip
        """codes, two numbers a byte; scales, an e4m3 for 16 numbers; whole, a float32 that
        multiplies these, or divides them."""
        self._same((codes, scales, whole), out)
        assert codes.numel() * 2 == out.numel() == scales.numel() * 16 and whole.numel() == 4
        for start, parts, shifts in _launches(out, alike):
            eights = out.numel() // 8
            args = (codes, scales, whole, start, eights, int(divides), *shifts)
            self._module("fp4").launch("nvfp4", (-(-eights // _EIGHTS), parts, 1), 256, args)

    def int4_dequantize(
        self, packing: str, words: Tensor, scales: Tensor, dtype: str, zeros: Tensor | None,
        index: Tensor | None, group: int, less: int, out: Tensor, alike: Alike | None = None,
    ) -> None:  # fmt: skip
        """words of eight numbers, as `packing` ("rows", "gptq", "awq") has them; scales of
        `dtype`, for `group` columns of a row each; zeros in words, stored `less` too low; index
        int32 [columns], the group of each."""
        rows, columns = out.shape
        self._same([one for one in (words, scales, zeros, index) if one is not None], out)
        groups = columns // group
        assert words.numel() * 2 == out.numel() and group % 8 == 0 and groups * group == columns
        assert scales.numel() == rows * groups * (4 if dtype == "F32" else 2)
        assert zeros is None or zeros.numel() == -(-rows // 8) * groups * 4
        assert index is None or index.numel() == 4 * columns
        assert packing == "rows" or rows % 8 == 0
        grid = -(-rows * columns // 8 // _EIGHTS)
        if packing != "rows":
            grid = -(-rows // _SIDE) * -(-columns // _SIDE)
        sizes = rows, columns, _KINDS[dtype], group, groups, less
        for start, parts, shifts in _launches(out, alike):
            args = (words, scales, zeros, index, start, *sizes, *shifts)
            self._module("int4").launch(f"int4_{packing}", (grid, parts, 1), 256, args)

    def _same(self, parts: Sequence[Tensor], out: Tensor) -> None:
        for part in parts:
            same(part, torch.uint8)
            assert part.data_ptr() % 8 == 0
        same(out, self.dtype)
        assert out.dim() == 2 and out.shape[1] % 8 == 0 and out.data_ptr() % 16 == 0
        assert out.numel() < 2**31


def _launches(out: Tensor, alike: Alike | None) -> Iterator[tuple[int, int, list[Argument]]]:
    """(address of the first dense weight, how many, step and shifts) of each launch."""
    step, shifts = (alike.step, alike.shifts) if alike else (0, [0])
    assert step % 8 == 0 and not any(shift % 8 for shift in shifts)
    for first in range(0, len(shifts) if out.numel() else 0, ALIKE):
        some = [*shifts[first : first + ALIKE]]
        start = out.data_ptr() + first * step * out.itemsize
        yield start, len(some), [step, *some, *[0] * (ALIKE - len(some))]

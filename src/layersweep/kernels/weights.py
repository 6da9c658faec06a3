"""Kernels that make weights dense, one or several of equal layout: NF4, FP4 and GGML's types."""

from __future__ import annotations

import torch
from torch import Tensor

from layersweep.kernels.codecs import same
from layersweep.kernels.runtime import Argument
from layersweep.kernels.scaled import ALIKE, SCALED_LAYOUTS, Alike, ScaledKernels

__all__ = ["GGML_KINDS", "WEIGHT_LAYOUTS", "Alike", "Nested", "WeightKernels"]

GGML_KINDS = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    *("iq4_nl", "iq4_xs", "mxfp4"),
)
WEIGHT_LAYOUTS = {
    "nf4": {
        "nf4_wide": "6Pq2if",
        "nf4_alike": f"6Pq2iq{ALIKE}q{ALIKE}f",
        "nf4_any": "6P3qf",
    },
    "ggml": {f"ggml_{kind}": f"2P2qiq{ALIKE}q" for kind in GGML_KINDS},
    **SCALED_LAYOUTS,
}
_NF4_WIDE = 256 * 8 * 4
_GGML_EIGHTS = 256 * 8 * 2

Nested = tuple[Tensor, Tensor, int, float]


class WeightKernels(ScaledKernels):
    """The part of `Kernels` that serves stream/. T: the module's compute dtype."""

    def nf4_dequantize(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested: Nested | None,
        blocksize: int,
        code: Tensor,
        out: Tensor,
    ) -> None:
        """Fill `out` (T, any shape) as checkpoint.nf4.dequantize does, bit for bit.

        packed uint8 [ceil(n / 2)], any shape; absmax float32 [blocks], or uint8 [blocks] with
        `nested` = (nested_absmax float32, quant_map float32 [256], nested_blocksize, offset);
        code float32 [16]. Block sizes that are powers of two from 8 on take the fast kernel.
        """
        pointers, sizes, wide = self._nf4(packed, absmax, nested, blocksize, code, out)
        count, offset = out.numel(), nested[3] if nested else 0.0
        if count == 0:
            return
        name, grid = ("nf4_wide", -(-count // _NF4_WIDE)) if wide else ("nf4_any", -(-count // 256))
        args = (*pointers, count, *sizes, offset)
        self._module("nf4").launch(name, (grid, 1, 1), 256, args)

    def nf4_dequantize_alike(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested: Nested | None,
        blocksize: int,
        code: Tensor,
        out: Tensor,
        alike: Alike,
    ) -> bool:
        """The same for weights that lie in memory as the one given does, in one launch; False where
        the fast kernel cannot, and nothing is done. The offset in `nested` counts for nothing."""
        count, parts = out.numel(), len(alike.shifts)
        pointers, sizes, wide = self._nf4(packed, absmax, nested, blocksize, code, out)
        if not wide or any(shift % 16 for shift in alike.shifts) or alike.step % 8 or not count:
            return False
        for first in range(0, parts, ALIKE):
            shifts, offsets = (
                [*values[first : first + ALIKE]] for values in (alike.shifts, alike.offsets)
            )
            unused = [0] * (ALIKE - len(shifts))
            start = out.data_ptr() + first * alike.step * out.itemsize
            args = (*pointers[:5], start, count, *sizes, alike.step)
            grid = -(-count // _NF4_WIDE), len(shifts), 1
            args = (*args, *shifts, *unused, *offsets, *unused)
            self._module("nf4").launch("nf4_alike", grid, 256, args)
        return True

    def ggml_dequantize(
        self, data: Tensor, kind: str, out: Tensor, head: int = 0, alike: Alike | None = None
    ) -> None:
        """Fill `out` (T, [rows, columns] or flat) as checkpoint.storage.ggml_blocks does, bit for
        bit, and what lies `alike`, if it is given.

        data uint8, whole blocks of `kind` ("q4_k"). `head`: rows of a head whose RoPE pairs lie
        side by side, 0 for rows in order. Addresses and shifts are multiples of 16.
        """
        same(data, torch.uint8)
        same(out, self.dtype)
        assert data.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0 and out.numel() % 32 == 0
        assert head % 2 == 0 and (not head or out.shape[0] % head == 0)
        count, columns = out.numel(), out[0].numel() if out.dim() > 1 else out.numel()
        if count == 0:
            return
        step, shifts = (alike.step, alike.shifts) if alike else (0, [0])
        for first in range(0, len(shifts), ALIKE):
            some = [*shifts[first : first + ALIKE]]
            start = out.data_ptr() + first * step * out.itemsize
            unused = [0] * (ALIKE - len(some))
            args: list[Argument] = [data, start, count, columns, head, step, *some, *unused]
            grid = -(-count // _GGML_EIGHTS), len(some), 1
            self._module("ggml").launch(f"ggml_{kind}", grid, 256, args)

    def _nf4(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested: Nested | None,
        blocksize: int,
        code: Tensor,
        out: Tensor,
    ) -> tuple[tuple[Argument, ...], tuple[int, int], bool]:
        """Pointers and sizes as the kernels take them, and whether the fast one does."""
        count = out.numel()
        outer, table, outer_size, _ = nested or (None, None, 1, 0.0)
        same(packed, torch.uint8)
        same(absmax, torch.uint8 if nested else torch.float32)
        same(code, torch.float32)
        same(out, self.dtype)
        assert packed.numel() == (count + 1) // 2 and absmax.numel() == -(-count // blocksize)
        if outer is not None and table is not None:
            same(outer, torch.float32)
            same(table, torch.float32)
            assert outer.numel() * outer_size >= absmax.numel() and table.numel() == 256
        wide = blocksize >= 8 and _power_of_two(blocksize) and _power_of_two(outer_size)
        wide = wide and packed.data_ptr() % 4 == 0 and out.data_ptr() % 16 == 0
        sizes = blocksize, outer_size
        if wide:
            sizes = blocksize.bit_length() - 1, outer_size.bit_length() - 1
        return (packed, absmax, table, outer, code, out), sizes, wide


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0

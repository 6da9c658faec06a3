"""compressed-tensors' 4-bit integers ("pack-quantized"): words along a row.

weight_packed I32 [rows, columns / 8] | weight_scale [rows, groups]
    | weight_zero_point I32 [rows / 8, groups], eight rows to a word | weight_g_idx I32 [columns]

`weight_shape` repeats the shape. Numbers and zero points are stored from 0 to 15; signed ones
would be 8 less, which makes no difference between them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage import scales
from layersweep.checkpoint.storage.int4 import WORD, Int4, Integers, fits, group_of, unpacked
from layersweep.checkpoint.storage.storage import Headers, Storage, cut_tensor

if TYPE_CHECKING:
    from torch import Tensor

DATA, SCALE, ZEROS, INDEX, SHAPE = "_packed", "_scale", "_zero_point", "_g_idx", "_shape"


@dataclass(frozen=True)
class Packed(Int4):
    shape_nbytes: int = 0

    @property
    def kind(self) -> str:
        return "int4"

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def block(self) -> int:
        columns = self.data.shape[1] * WORD
        return columns if self.zeros is None else columns * WORD

    @property
    def other_nbytes(self) -> int:
        return self.shape_nbytes

    def packed(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> AlongRows:
        return AlongRows(self.views(parts), self, (shape[0], shape[1]))

    def cut(self, start: int, count: int, shape: tuple[int, ...]) -> Packed:
        columns = self.data.shape[1] * WORD
        first, rows, groups = start // columns, count // columns, self.groups
        zeros = self.zeros and cut_tensor(self.zeros, first // WORD * groups, rows // WORD * groups)
        return replace(
            self,
            data=cut_tensor(self.data, start // WORD, count // WORD).reshaped(
                (rows, columns // WORD)
            ),
            scale=cut_tensor(self.scale, first * groups, rows * groups),
            zeros=zeros,
            shape_nbytes=0,
        )


@dataclass(frozen=True)
class AlongRows(Integers):
    packing: ClassVar[str] = "rows"

    def numbers(self, start: int, stop: int) -> Tensor:
        import torch

        words = self.views.words.view(torch.int32).view(self.shape[0], -1)
        return unpacked(words[start:stop]).view(stop - start, -1)

    def zeros(self) -> Tensor:
        import torch

        assert self.views.zeros is not None
        words = self.views.zeros.view(torch.int32).view(-(-self.shape[0] // WORD), -1)
        return unpacked(words).transpose(1, 2).reshape(-1, words.shape[1])[: self.shape[0]]

    def scales(self) -> Tensor:
        return scales.floats(self.views.scales, self.stored.scale).view(self.shape[0], -1)


def base(tensor: StoredTensor) -> str | None:
    packed = tensor.dtype == "I32" and tensor.name.endswith(DATA)
    return tensor.name.removesuffix(DATA) if packed else None


def companions(base: str) -> tuple[str, ...]:
    return tuple(base + suffix for suffix in (DATA, SCALE, ZEROS, INDEX, SHAPE))


def match(headers: Headers, base: str, shape: tuple[int, ...]) -> Storage | None:
    find = headers.tensors.get
    data, zeros, index, stated = (find(base + name) for name in (DATA, ZEROS, INDEX, SHAPE))
    assert data is not None
    scale = find(base + SCALE)
    if scale is None:
        headers.problem(
            data, "4-bit integers without scales", f"{base}{SCALE} in one of the shards"
        )
        return None
    if len(shape) != 2 or shape[1] % WORD or data.shape != (shape[0], shape[1] // WORD):
        needed = f"I32 {[*shape[:-1], shape[-1] // WORD]} for {list(shape)}, by config.json"
        headers.problem(data, data.describe(), needed)
        return None
    rows, columns = shape
    groups = math.prod(scale.shape) // rows
    fit = fits(headers, scale, scales.FLOAT_SCALES, (rows, max(groups, 1)))
    fit = fits(headers, zeros, ("I32",), (-(-rows // WORD), groups)) and fit
    fit = fits(headers, index, ("I32",), (columns,)) and fit
    fit = _shape_fits(headers, stated, shape) and fit
    group = group_of(headers, scale, columns, groups) if fit else None
    if group is None:
        return None
    return Packed(data, scale, zeros, index, group, shape_nbytes=stated.nbytes if stated else 0)


def _shape_fits(headers: Headers, stated: StoredTensor | None, shape: tuple[int, ...]) -> bool:
    if stated is None:
        return True
    if stated.dtype not in ("I64", "I32") or stated.shape != (len(shape),):
        headers.problem(stated, stated.describe(), f"I64 [{len(shape)}]")
        return False
    if headers.read is None:
        return True
    kind = "q" if stated.dtype == "I64" else "i"
    found = struct.unpack(f"<{len(shape)}{kind}", headers.read(stated))
    if found != shape:
        headers.problem(stated, f"{list(found)}", f"{list(shape)}, the shape in config.json")
    return found == shape

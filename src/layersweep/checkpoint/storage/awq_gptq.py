"""The 4-bit integers of AWQ and GPTQ, whose weights lie turned: columns of the file are rows.

AWQ ("gemm")  qweight I32 [columns, rows / 8]
GPTQ          qweight I32 [columns / 8, rows] | g_idx I32 [columns]
both          scales F16 [groups, rows] | qzeros I32 [groups, rows / 8]

The places of AWQ's words hold rows 0, 2, 4, 6, 1, 3, 5, 7; those of GPTQ's hold neighbours in
order. GPTQ's first version stores zero points less 1. Names and dtypes of both are the same, so
config.json tells which it is, and shapes must agree. `g_idx` is always followed: where columns
were sorted by activation ("desc_act") it is no plain count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage import scales
from layersweep.checkpoint.storage.int4 import WORD, Int4, Integers, fits, group_of, unpacked
from layersweep.checkpoint.storage.storage import Headers, Storage

if TYPE_CHECKING:
    from torch import Tensor

DATA, SCALES, ZEROS, INDEX = "qweight", "scales", "qzeros", "g_idx"
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of rows 0 to 7 in a word
Method = Literal["awq", "gptq"]


@dataclass(frozen=True)
class Turned(Int4):
    method: Method = "awq"

    @property
    def kind(self) -> str:
        return self.method

    @property
    def rows(self) -> int:
        return self.scale.shape[1]

    @property
    def block(self) -> int:
        """Rows are strewn over the file: no part can be cut out."""
        return math.prod(self.data.shape) * WORD

    def packed(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Integers:
        kind = AwqIntegers if self.method == "awq" else GptqIntegers
        return kind(self.views(parts), self, (shape[0], shape[1]))

    def cut(self, start: int, count: int, shape: tuple[int, ...]) -> Turned:
        assert (start, count) == (0, self.block)
        return self


class TurnedIntegers(Integers):
    places: ClassVar[Sequence[int]] = range(WORD)

    def zeros(self) -> Tensor:
        import torch

        assert self.views.zeros is not None
        words = self.views.zeros.view(torch.int32).view(-1, self.shape[0] // WORD)
        return unpacked(words, self.places).view(-1, self.shape[0]).t()

    def scales(self) -> Tensor:
        return scales.floats(self.views.scales, self.stored.scale).view(-1, self.shape[0]).t()


class AwqIntegers(TurnedIntegers):
    packing: ClassVar[str] = "awq"
    places: ClassVar[Sequence[int]] = AWQ_PLACES

    def numbers(self, start: int, stop: int) -> Tensor:
        import torch

        words = self.views.words.view(torch.int32).view(self.shape[1], -1)
        some = unpacked(words[:, start // WORD : stop // WORD], self.places)
        return some.view(self.shape[1], -1).t()


class GptqIntegers(TurnedIntegers):
    packing: ClassVar[str] = "gptq"

    def numbers(self, start: int, stop: int) -> Tensor:
        import torch

        words = self.views.words.view(torch.int32).view(-1, self.shape[0])
        return unpacked(words[:, start:stop]).transpose(0, 1).reshape(stop - start, -1)


def base(tensor: StoredTensor) -> str | None:
    """ "....weight", as if it were stored."""
    named = tensor.dtype == "I32" and tensor.name.endswith(f".{DATA}")
    return tensor.name.removesuffix(DATA) + "weight" if named else None


def companions(base: str) -> tuple[str, ...]:
    module = base.removesuffix("weight")
    return tuple(module + name for name in (DATA, SCALES, ZEROS, INDEX))


def match(headers: Headers, base: str, shape: tuple[int, ...]) -> Storage | None:
    data, scale, zeros, index = map(headers.tensors.get, companions(base))
    assert data is not None
    stated = headers.settings.method
    method: Method | None = "awq" if stated == "awq" else "gptq" if stated == "gptq" else None
    if method is None:
        needed = 'quantization_config.quant_method "awq" or "gptq" in config.json'
        headers.problem(data, f"{DATA} without a method that packs so", needed)
        return None
    if scale is None or zeros is None:
        module = base.removesuffix("weight")
        needed = f"{module}{SCALES} and {module}{ZEROS} in one of the shards"
        headers.problem(data, f"{data.describe()} without scales or zero points", needed)
        return None
    rows, columns = shape if len(shape) == 2 else (0, 0)
    packed = (columns, rows // WORD) if method == "awq" else (columns // WORD, rows)
    if not rows or rows % WORD or columns % WORD or data.shape != packed:
        needed = f"I32 {list(packed)} for {list(shape)}, by config.json"
        headers.problem(data, data.describe(), needed)
        return None
    groups = scale.shape[0] if scale.shape else 0
    fit = fits(headers, scale, scales.FLOAT_SCALES, (groups, rows))
    fit = fits(headers, zeros, ("I32",), (groups, rows // WORD)) and fit
    fit = fits(headers, index, ("I32",), (columns,)) and fit
    group = group_of(headers, scale, columns, groups) if fit else None
    if group is None:
        return None
    less = headers.settings.zeros_less if method == "gptq" else 0
    return Turned(data, scale, zeros, index, group, less, method)

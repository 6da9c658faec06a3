"""NF4 and FP4 as bitsandbytes writes them; the arithmetic is in checkpoint/nf4.py.

data U8, two elements a byte | absmax F32 [blocks]
data | absmax U8 [blocks] | nested_absmax F32 [ceil(blocks / 256)] | nested_quant_map F32 [256]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage.floats import Floats
from layersweep.checkpoint.storage.storage import (
    PLAUSIBLE,
    Look,
    Piece,
    ReadTensor,
    Storage,
    cut_tensor,
)

if TYPE_CHECKING:
    from torch import Tensor

    from layersweep.checkpoint.nf4 import QuantizedTensor

MADE_BLOCK = 64  # elements, where floats become NF4 while they are read


@dataclass(frozen=True)
class Nested:
    """Scales of the scales: absmax F32 [ceil((skip + blocks) / blocksize)], quant_map F32 [256].

    `skip`: scales in the first nested block that belong to the weight before this one, where both
    are slices of fused experts.
    """

    absmax: StoredTensor
    quant_map: StoredTensor
    blocksize: int
    offset: float
    skip: int = 0


@dataclass(frozen=True)
class FourBit(Storage):
    """absmax: F32 [blocks], or U8 [blocks] where `nested`. The data may lie in the file under any
    dtype. `checked_nbytes`: of companions that are checked at opening and never read again."""

    type: Literal["nf4", "fp4"]
    data: StoredTensor
    blocksize: int
    absmax: StoredTensor
    nested: Nested | None
    checked_nbytes: int

    @property
    def kind(self) -> str:
        return self.type

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        if self.nested is None:
            return (self.data, self.absmax)
        return (self.data, self.absmax, self.nested.absmax, self.nested.quant_map)

    @property
    def block(self) -> int:
        return self.blocksize

    @property
    def companions(self) -> int:
        return 2 if self.nested is None else 4

    @property
    def other_nbytes(self) -> int:
        return self.checked_nbytes

    @property
    def words(self) -> str:
        kind = "nested" if self.nested else "plain"
        stored = "" if self.data.dtype == "U8" else f", packed in {self.data.dtype}"
        return f"{kind}, blocks of {self.blocksize}{stored}"

    @property
    def layout(self) -> tuple[object, ...]:
        return self.type, self.blocksize, self.nested.blocksize if self.nested else 0

    @property
    def expands(self) -> bool:
        """Whether scales start inside a nested block, which no kernel takes: they become plain."""
        return self.nested is not None and self.nested.skip > 0

    @property
    def offset(self) -> float:
        return 0.0 if self.nested is None or self.expands else self.nested.offset

    @property
    def pieces(self) -> tuple[Piece, ...]:
        if not self.expands:
            return super().pieces
        plain = Piece(None, 4 * math.prod(self.absmax.shape))
        return Piece(self.data, self.data.nbytes), plain

    @property
    def looks(self) -> tuple[Look, ...]:
        if self.expands:  # they were checked before they were expanded
            return ()
        if self.nested is None:
            return (Look(1, "f4", self.absmax.nbytes // 4),)
        outer, table = self.nested.absmax.nbytes // 4, self.nested.quant_map.nbytes // 4
        return Look(2, "f4", outer), Look(3, "f4", table, least=-PLAUSIBLE)

    def packed(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> QuantizedTensor:
        import torch

        from layersweep.checkpoint import nf4

        if self.nested is None or self.expands:
            absmax = parts[1].view(torch.float32)
            return nf4.QuantizedTensor(parts[0], absmax, self.blocksize, None, self.type)
        outer, table = (part.view(torch.float32) for part in parts[2:])
        scales = nf4.NestedScales(outer, table, self.nested.blocksize, self.nested.offset)
        return nf4.QuantizedTensor(parts[0], parts[1], self.blocksize, scales, self.type)

    def check(self, parts: Sequence[Tensor]) -> None:
        import torch

        from layersweep.checkpoint import nf4

        if self.expands:
            return
        if self.nested is None:
            scales, source = parts[1].view(torch.float32), self.absmax
            nf4.check_scales(scales, file=source.file.name, tensor=source.name, signed=False)
        else:
            check_nested(self.nested, *(part.view(torch.float32) for part in parts[2:]))

    def make(self, read: ReadTensor, parts: Sequence[Tensor], shape: tuple[int, ...]) -> int:
        """Scales whose first lies inside a nested block, expanded to plain ones and checked."""
        import torch

        from layersweep.checkpoint import nf4

        assert self.nested is not None
        nested, sources = self.nested, self.stored[1:]
        absmax, *others = (read(source) for source in sources)
        outer, table = (one.view(torch.float32) for one in others)
        check_nested(nested, outer, table)
        scales = nf4.expand_absmax(
            absmax, outer, table, nested.blocksize, nested.offset, nested.skip
        )
        parts[1].copy_(scales.view(torch.uint8))
        return sum(source.nbytes for source in sources)

    def cut(self, start: int, count: int, shape: tuple[int, ...]) -> FourBit:
        first, blocks = start // self.blocksize, count // self.blocksize
        return replace(
            self,
            data=cut_tensor(self.data.as_bytes(), start // 2, count // 2),
            absmax=cut_tensor(self.absmax, first, blocks),
            nested=self.nested and _nested_cut(self.nested, first, blocks),
            checked_nbytes=0,
        )


@dataclass(frozen=True)
class MadeNf4(Storage):
    """Floats that become plain NF4 while they are read: blocks of 64, float32 absmax."""

    floats: Floats

    @property
    def kind(self) -> str:
        return "nf4"

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.floats.stored

    @property
    def pieces(self) -> tuple[Piece, ...]:
        elements = math.prod(self.floats.data.shape)
        return Piece(None, -(-elements // 2)), Piece(None, 4 * -(-elements // MADE_BLOCK))

    def packed(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> QuantizedTensor:
        import torch

        from layersweep.checkpoint import nf4

        return nf4.QuantizedTensor(parts[0], parts[1].view(torch.float32), MADE_BLOCK, None)

    def make(self, read: ReadTensor, parts: Sequence[Tensor], shape: tuple[int, ...]) -> int:
        import torch

        from layersweep.checkpoint import nf4

        packed = self.floats.packed([read(self.floats.data)], shape)
        weight = packed.values
        if not self.floats.plain:
            weight = torch.empty_like(packed.values)
            packed.decode(weight)
        quantized = nf4.quantize(weight, blocksize=MADE_BLOCK, nested=False)
        for part, made in zip(parts, (quantized.packed, quantized.absmax), strict=True):
            part.copy_(made.reshape(-1).view(torch.uint8))
        return self.floats.data.nbytes

    def cut(self, start: int, count: int, shape: tuple[int, ...]) -> MadeNf4:
        return MadeNf4(self.floats.cut(start, count, shape))


def check_nested(nested: Nested, outer: Tensor, table: Tensor) -> None:
    """Raises CheckpointError for values that are not finite, or whose product is not."""
    from layersweep.checkpoint import nf4

    for source, values, signed in (
        (nested.absmax, outer, False),
        (nested.quant_map, table, True),
    ):
        nf4.check_scales(values, file=source.file.name, tensor=source.name, signed=signed)
    source = nested.absmax
    nf4.check_products(outer, table, nested.offset, file=source.file.name, tensor=source.name)


def _nested_cut(nested: Nested, first: int, blocks: int) -> Nested:
    """The scales of scales [first, first + blocks): the first block may begin before them."""
    block, skip = divmod(first, nested.blocksize)
    absmax = cut_tensor(nested.absmax, block, -(-(skip + blocks) // nested.blocksize))
    return replace(nested, absmax=absmax, skip=skip)

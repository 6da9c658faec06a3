"""GGML's types, in which the weights of GGUF files are stored; the arithmetic is in ggml_blocks.py.

A row is whole blocks, and a block is `elements` weights in `nbytes` bytes, its scales among them:
Q4_K has two halves, eight pairs of 6-bit scales and 256 nibbles in 144 bytes. Blocks of a weight
lie one after the other, so a weight lies in an arena as in its file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage.floats import FLOATS, Floats
from layersweep.checkpoint.storage.storage import Headers, Look, Storage
from layersweep.errors import CheckpointError
from layersweep.problems import DOWNLOAD_AGAIN

if TYPE_CHECKING:
    from torch import Tensor

    from layersweep.checkpoint.storage.ggml_blocks import Blocks


@dataclass(frozen=True)
class GgmlType:
    """`number`: in files. `halves`: offsets of the float16 scales in a block, neighbours; `powers`:
    of those that are a byte, a power of two. `decoded`: whether this package decodes it; its size
    is known in any case."""

    name: str
    number: int
    elements: int
    nbytes: int
    halves: tuple[int, ...] = ()
    powers: tuple[int, ...] = ()
    decoded: bool = True


TYPES = {
    one.name: one
    for one in (
        GgmlType("F32", 0, 1, 4),
        GgmlType("F16", 1, 1, 2),
        GgmlType("Q4_0", 2, 32, 18, (0,)),
        GgmlType("Q4_1", 3, 32, 20, (0, 2)),
        GgmlType("Q5_0", 6, 32, 22, (0,)),
        GgmlType("Q5_1", 7, 32, 24, (0, 2)),
        GgmlType("Q8_0", 8, 32, 34, (0,)),
        GgmlType("Q8_1", 9, 32, 40, decoded=False),
        GgmlType("Q2_K", 10, 256, 84, (80, 82)),
        GgmlType("Q3_K", 11, 256, 110, (108,)),
        GgmlType("Q4_K", 12, 256, 144, (0, 2)),
        GgmlType("Q5_K", 13, 256, 176, (0, 2)),
        GgmlType("Q6_K", 14, 256, 210, (208,)),
        GgmlType("Q8_K", 15, 256, 292, decoded=False),
        GgmlType("IQ2_XXS", 16, 256, 66, decoded=False),
        GgmlType("IQ2_XS", 17, 256, 74, decoded=False),
        GgmlType("IQ3_XXS", 18, 256, 98, decoded=False),
        GgmlType("IQ1_S", 19, 256, 50, decoded=False),
        GgmlType("IQ4_NL", 20, 32, 18, (0,)),
        GgmlType("IQ3_S", 21, 256, 110, decoded=False),
        GgmlType("IQ2_S", 22, 256, 82, decoded=False),
        GgmlType("IQ4_XS", 23, 256, 136, (0,)),
        GgmlType("I8", 24, 1, 1, decoded=False),
        GgmlType("I16", 25, 1, 2, decoded=False),
        GgmlType("I32", 26, 1, 4, decoded=False),
        GgmlType("I64", 27, 1, 8, decoded=False),
        GgmlType("F64", 28, 1, 8, decoded=False),
        GgmlType("IQ1_M", 29, 256, 56, decoded=False),
        GgmlType("BF16", 30, 1, 2),
        GgmlType("TQ1_0", 34, 256, 54, decoded=False),
        GgmlType("TQ2_0", 35, 256, 66, decoded=False),
        GgmlType("MXFP4", 39, 32, 17, powers=(0,)),
        GgmlType("NVFP4", 40, 64, 36, decoded=False),
        GgmlType("Q1_0", 41, 128, 18, decoded=False),
    )
}
DECODED = tuple(name for name, one in TYPES.items() if one.decoded and name not in FLOATS)
LARGEST_POWER = 250  # of two, counted from -127: beyond, a product overflows float32
SUFFIX = ".gguf"  # of a file; safetensors calls some of its types as ggml does
REQUANTIZE = "take the model in another type, Q4_K for example; llama-quantize makes it"


@dataclass(frozen=True)
class Ggml(Storage):
    """`turned`: width of a head whose rows lie as llama.cpp turns them, coordinates of a RoPE pair
    side by side; 0 where rows lie as they are multiplied."""

    data: StoredTensor
    turned: int = 0

    @property
    def type(self) -> GgmlType:
        return TYPES[self.data.dtype]

    @property
    def kind(self) -> str:
        return self.data.dtype.lower()

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.data,)

    @property
    def block(self) -> int:
        return self.type.elements

    @property
    def words(self) -> str:
        bits = 8 * self.type.nbytes / self.type.elements
        return f"in blocks of {self.type.elements}, {bits:.4g} bits each"

    @property
    def layout(self) -> tuple[object, ...]:
        return self.kind, self.turned

    @property
    def looks(self) -> tuple[Look, ...]:
        count, step = self.data.nbytes // self.type.nbytes, self.type.nbytes
        if self.type.powers:
            return (Look(0, "u1", count, self.type.powers[0], step, below=LARGEST_POWER),)
        return (
            Look(
                0, "2f2" if len(self.type.halves) == 2 else "f2", count, self.type.halves[0], step
            ),
        )

    def packed(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Blocks:
        from layersweep.checkpoint.storage.ggml_blocks import Blocks

        return Blocks(parts[0], self.type, self.turned)

    def check(self, parts: Sequence[Tensor]) -> None:
        import torch

        blocks = parts[0].view(-1, self.type.nbytes)
        for first in self.type.halves:
            scales = blocks[:, first : first + 2].contiguous().view(torch.float16).view(-1)
            self._refuse(~scales.isfinite(), scales, "")
        for first in self.type.powers:
            powers = blocks[:, first].int()
            self._refuse(powers >= LARGEST_POWER, powers - 127, "2^")

    def _refuse(self, bad: Tensor, scales: Tensor, prefix: str) -> None:
        """Raises CheckpointError for the first bad scale, if there is one."""
        if bad.any():
            index = int(bad.int().argmax())
            raise CheckpointError(
                f"{self.data.file.name}: {self.data.name}: found a scale of {prefix}"
                f"{scales[index].item()} in block {index}, needed finite scales",
                hint=DOWNLOAD_AGAIN,
            )

    def cut(self, start: int, count: int, shape: tuple[int, ...]) -> Ggml:
        size = self.type.nbytes
        data = replace(
            self.data,
            name=f"{self.data.name}[{start}:{start + count}]",
            shape=shape,
            offset=self.data.offset + start // self.block * size,
            nbytes=count // self.block * size,
        )
        return Ggml(data, self.turned)


def base(tensor: StoredTensor) -> str | None:
    return tensor.name if tensor.file.suffix == SUFFIX else None


def companions(base: str) -> tuple[str, ...]:
    return ()


def match(headers: Headers, base: str, shape: tuple[int, ...]) -> Storage | None:
    data = headers.tensors[base]
    if not TYPES[data.dtype].decoded:
        needed = f"a type that is decoded here: {', '.join((*FLOATS, *DECODED))}"
        headers.problem(data, f"type {data.dtype}", needed, REQUANTIZE)
    elif data.shape != shape:
        headers.problem(data, data.describe(), f"{list(shape)}, by the metadata")
    else:
        return Floats(data) if data.dtype in FLOATS else Ggml(data)
    return None


def nbytes(type: GgmlType, shape: tuple[int, ...]) -> int:
    """Of a tensor whose rows are whole blocks."""
    return math.prod(shape) // type.elements * type.nbytes

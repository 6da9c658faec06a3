"""Weights whose bytes are their values: bfloat16, float16 and float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layersweep.checkpoint.header import FLOAT_NAMES, StoredTensor
from layersweep.checkpoint.storage.storage import Storage, cut_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from layersweep.kernels.kernels import Kernels
    from layersweep.kernels.weights import Alike

FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Floats(Storage):
    """`transposed`: the file has columns of the matrix where it has rows."""

    data: StoredTensor
    transposed: bool = False

    @property
    def kind(self) -> str:
        return FLOAT_NAMES[self.data.dtype]

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.data,)

    @property
    def plain(self) -> bool:
        return True

    @property
    def layout(self) -> tuple[object, ...]:
        return self.kind, self.transposed

    def packed(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Values:
        import torch

        values = parts[0].view(getattr(torch, self.kind))
        return Values(values.view(shape[::-1]).t() if self.transposed else values.view(shape))

    def cut(self, start: int, count: int, shape: tuple[int, ...]) -> Floats:
        stored = shape[::-1] if self.transposed else shape
        return Floats(cut_tensor(self.data, start, count).reshaped(stored), self.transposed)


@dataclass(frozen=True)
class Values:
    """The weight itself, a view in the dtype of the file."""

    values: Tensor

    def decode(self, out: Tensor) -> None:
        out.copy_(self.values)

    def launch(self, kernels: Kernels, out: Tensor) -> None:
        self.decode(out)

    def launch_alike(self, kernels: Kernels, out: Tensor, alike: Alike) -> bool:
        return False

"""Weights whose bytes are their values: bfloat16, float16 and float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """`transposed`: the file has columns of the matrix where it has rows.

    Two things that GGUF does to some: `turned`, see Ggml, and `less`, what it has added to each.
    """

    data: StoredTensor
    transposed: bool = False
    turned: int = 0
    less: float = 0.0

    @property
    def kind(self) -> str:
        return FLOAT_NAMES[self.data.dtype]

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.data,)

    @property
    def plain(self) -> bool:
        return not self.turned and not self.less

    @property
    def layout(self) -> tuple[object, ...]:
        return self.data.dtype, self.transposed, self.turned, self.less

    def packed(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Values:
        import torch

        values = parts[0].view(getattr(torch, self.kind))
        if not self.plain:
            return Changed(values.view(shape), self.turned, self.less)
        return Values(values.view(shape[::-1]).t() if self.transposed else values.view(shape))

    def cut(self, start: int, count: int, shape: tuple[int, ...]) -> Floats:
        stored = shape[::-1] if self.transposed else shape
        return replace(self, data=cut_tensor(self.data, start, count).reshaped(stored))


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


@dataclass(frozen=True)
class Changed(Values):
    """Values that are put in order, or less something, where they are copied."""

    turned: int
    less: float

    def decode(self, out: Tensor) -> None:
        values = self.values if not self.less else self.values.float() - self.less
        if self.turned:
            copy_turned(values, out, self.turned)
        else:
            out.copy_(values)


def copy_turned(turned: Tensor, out: Tensor, head: int) -> None:
    """Rows whose RoPE pairs lie side by side, to rows whose pairs are half a `head` apart."""
    columns = turned[0].numel()
    pairs = turned.view(-1, head // 2, 2, columns)
    out.view(-1, 2, head // 2, columns).copy_(pairs.transpose(1, 2))

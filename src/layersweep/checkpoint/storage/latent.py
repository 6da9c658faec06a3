"""DeepSeek's kv_b_proj in two tensors, as llama.cpp keeps it: keys are made by one, values by the
other.

keys [heads, rank, nope], turned | values [heads, value, rank]    each stored on its own
dense [heads x (nope + value), rank]: rows of a head's keys, then of its values
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage import ggml
from layersweep.checkpoint.storage.storage import Headers, Look, Packed, Storage

if TYPE_CHECKING:
    from torch import Tensor

    from layersweep.kernels.kernels import Kernels
    from layersweep.kernels.weights import Alike

KEYS, VALUES = ".of_keys", ".of_values"  # behind the weight's name
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LatentParts(Storage):
    keys: Storage
    values: Storage
    shapes: tuple[Shape, Shape]

    @property
    def kind(self) -> str:
        same = self.keys.kind == self.values.kind
        return self.keys.kind if same else f"{self.keys.kind}+{self.values.kind}"

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (*self.keys.stored, *self.values.stored)

    @property
    def words(self) -> str:
        return "keys and values apart"

    @property
    def layout(self) -> tuple[object, ...]:
        return self.keys.layout, self.values.layout, self.shapes

    @property
    def looks(self) -> tuple[Look, ...]:
        behind = (replace(one, piece=one.piece + 1) for one in self.values.looks)
        return *self.keys.looks, *behind

    def packed(self, parts: Sequence[Tensor], shape: Shape) -> Joined:
        halves = zip((self.keys, self.values), parts, self.shapes, strict=True)
        keys, values = (one.packed([part], own) for one, part, own in halves)
        return Joined(keys, values, self.shapes)

    def check(self, parts: Sequence[Tensor]) -> None:
        self.keys.check(parts[:1])
        self.values.check(parts[1:])

    def cut(self, start: int, count: int, shape: Shape) -> Storage:
        raise AssertionError("a latent's projection is no part of a fused tensor")


@dataclass(frozen=True)
class Joined:
    keys: Packed
    values: Packed
    shapes: tuple[Shape, Shape]

    def decode(self, out: Tensor) -> None:
        keys, values = self._dense(out)
        self.keys.decode(keys)
        self.values.decode(values)
        self._join(keys, values, out)

    def launch(self, kernels: Kernels, out: Tensor) -> None:
        keys, values = self._dense(out)
        self.keys.launch(kernels, keys)
        self.values.launch(kernels, values)
        self._join(keys, values, out)

    def launch_alike(self, kernels: Kernels, out: Tensor, alike: Alike) -> bool:
        return False

    def _dense(self, out: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (out.new_empty(shape) for shape in self.shapes)
        return keys, values

    def _join(self, keys: Tensor, values: Tensor, out: Tensor) -> None:
        heads, rank, nope = keys.shape
        rows = out.view(heads, nope + values.shape[1], rank)
        rows[:, :nope].copy_(keys.transpose(1, 2))
        rows[:, nope:].copy_(values)


def base(tensor: StoredTensor) -> str | None:
    return tensor.name.removesuffix(KEYS) if tensor.name.endswith(KEYS) else None


def companions(base: str) -> tuple[str, ...]:
    return base + KEYS, base + VALUES


def match(headers: Headers, base: str, shape: Shape) -> Storage | None:
    keys, values = (headers.tensors.get(name) for name in companions(base))
    assert keys is not None
    if values is None:
        headers.problem(keys, "what makes keys alone", "what makes values, too")
        return None
    sizes = keys.shape, values.shape
    fit = all(len(size) == 3 for size in sizes) and sizes[0][:2] == (sizes[1][0], sizes[1][2])
    if not fit or (sizes[0][0] * (sizes[0][2] + sizes[1][1]), sizes[0][1]) != shape:
        found = f"{keys.describe()} and {values.describe()}"
        headers.problem(keys, found, f"the keys and values of {list(shape)}")
        return None
    first, second = (
        ggml.match(headers, name, size) for name, size in zip(companions(base), sizes, strict=True)
    )
    return None if first is None or second is None else LatentParts(first, second, sizes)

"""Four-bit integers in groups with a scale and a zero point each: what three packings share.

    value = (number - zero) * scale[group, row]     in float32, then one cast

Words of 32 bits hold eight numbers, the lowest bits first. Which numbers those are, and where
their zero points lie, is a packing's matter: packed.py (compressed-tensors), awq.py, gptq.py.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage import scales
from layersweep.checkpoint.storage.storage import Headers, Look, Storage
from layersweep.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from layersweep.kernels.kernels import Kernels
    from layersweep.kernels.weights import Alike

WORD = 8  # numbers in 32 bits
MIDDLE = 8  # the zero point where none are stored
_PIECE = 1 << 20  # elements that are decoded at once on the CPU


@dataclass(frozen=True)
class Int4(Storage):
    """`group`: columns of the weight that share a scale. `index`: the group of each column, I32,
    where columns were sorted before they were grouped. `less`: how much too low zeros are stored.
    """

    data: StoredTensor
    scale: StoredTensor
    zeros: StoredTensor | None
    index: StoredTensor | None
    group: int
    less: int = 0

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        beside = (one for one in (self.zeros, self.index) if one is not None)
        return (self.data, self.scale, *beside)

    @property
    def words(self) -> str:
        zeros = "" if self.zeros is None else ", zero points"
        return f"groups of {self.group}{zeros}{', sorted columns' if self.index else ''}"

    @property
    def layout(self) -> tuple[object, ...]:
        beside = self.zeros is None, self.index is None, self.less
        return self.kind, self.group, self.scale.dtype, *beside

    @property
    def groups(self) -> int:
        """Of a row."""
        return math.prod(self.scale.shape) // self.rows

    @property
    @abstractmethod
    def rows(self) -> int:
        """Of the weight."""

    @property
    def looks(self) -> tuple[Look, ...]:
        found = scales.look_at(1, self.scale)
        if self.index is None:
            return (found,)
        place = len(self.stored) - 1
        return found, Look(place, "i4", math.prod(self.index.shape), below=self.groups)

    def check(self, parts: Sequence[Tensor]) -> None:
        import torch

        scales.check_scales(parts[1], self.scale)
        if self.index is None:
            return
        index = parts[-1].view(torch.int32)
        bad = (index < 0) | (index >= self.groups)
        if bad.any():
            at = int(bad.int().argmax())
            raise CheckpointError(
                f"{self.index.file.name}: {self.index.name}: found group {index[at].item()} of "
                f"column {at}, needed 0 to {self.groups - 1}",
                hint="the file is damaged; download it again",
            )

    def views(self, parts: Sequence[Tensor]) -> Views:
        """The pieces as they are, by what they are."""
        beside = list(parts[2:])
        zeros = beside.pop(0) if self.zeros is not None else None
        return Views(parts[0], parts[1], zeros, beside[0] if beside else None)


@dataclass(frozen=True)
class Views:
    """uint8."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    index: Tensor | None


@dataclass(frozen=True)
class Integers:
    """A weight as it lies in memory. Subclasses say where its numbers are."""

    packing: ClassVar[str]

    views: Views
    stored: Int4
    shape: tuple[int, int]

    @abstractmethod
    def numbers(self, start: int, stop: int) -> Tensor:
        """int32 [stop - start, columns], of rows from `start` on; a multiple of 8."""

    @abstractmethod
    def zeros(self) -> Tensor:
        """int32 [rows, groups]."""

    @abstractmethod
    def scales(self) -> Tensor:
        """float32 [rows, groups]."""

    def decode(self, out: Tensor) -> None:
        import torch

        rows, columns = self.shape
        stored, scales = self.stored, self.scales()
        if self.views.zeros is None:
            zeros = torch.full_like(scales, MIDDLE, dtype=torch.int32)
        else:
            zeros = self.zeros() + stored.less
        if self.views.index is None:
            group = torch.arange(columns, device=scales.device) // stored.group
        else:
            group = self.views.index.view(torch.int32).long()
        step = rows if scales.is_cuda else max(WORD, _PIECE // columns // WORD * WORD)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            numbers = self.numbers(start, stop) - zeros[start:stop, group]
            out.view(rows, columns)[start:stop] = numbers.float() * scales[start:stop, group]

    def launch(self, kernels: Kernels, out: Tensor) -> None:
        self._launch(kernels, out, None)

    def launch_alike(self, kernels: Kernels, out: Tensor, alike: Alike) -> bool:
        self._launch(kernels, out, alike)
        return True

    def _launch(self, kernels: Kernels, out: Tensor, alike: Alike | None) -> None:
        views, stored = self.views, self.stored
        kernels.int4_dequantize(
            self.packing, views.words, views.scales, stored.scale.dtype, views.zeros, views.index,
            stored.group, stored.less, out, alike,
        )  # fmt: skip


def unpacked(words: Tensor, order: Sequence[int] = range(WORD)) -> Tensor:
    """int32 [..., 8] of int32 [...]: of number i, the four bits at place order[i]."""
    import torch

    shifts = torch.tensor([4 * place for place in order], dtype=torch.int32, device=words.device)
    return words[..., None] >> shifts & 15


def fits(
    headers: Headers, tensor: StoredTensor | None, dtypes: Sequence[str], shape: tuple[int, ...]
) -> bool:
    """Whether a tensor that may be missing is what it should be; else that is a problem."""
    if tensor is None or (tensor.dtype in dtypes and tensor.shape == shape):
        return True
    headers.problem(tensor, tensor.describe(), f"{' or '.join(dtypes)} {list(shape)}")
    return False


def group_of(headers: Headers, scale: StoredTensor, columns: int, groups: int) -> int | None:
    """Columns to a group, by the number of groups."""
    group = columns // groups if groups else 0
    if not group or group * groups != columns or group % WORD:
        needed = f"groups of a multiple of {WORD} that divide {columns} columns"
        headers.problem(scale, scale.describe(), needed)
        return None
    return group

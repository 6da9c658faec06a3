"""Which parts of a layer let tokens see each other outside of attention.

Convolutions and recurrent states do; a sweep computes them sequence by sequence. A part is asked by
calling it again with one row spoilt: does any other row come out differently? NaN goes wherever a
number goes, however little it weighs there; another number finds what masks leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Of a rehearsal; no other size of a model is likely to be the same.
ROWS = 23
_CHANGED = 11


@dataclass(frozen=True)
class Called:
    """A call of a module in a rehearsal, and what came out."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    found: Any

    def mixes(self) -> bool:
        return any(map(self._reaches, (_poisoned, _other)))

    def counts(self) -> bool:
        """Whether it counts the rows that it is called with. It would take their places in a tile
        for positions, which no number need show at so few rows."""
        watch = _RangesMade()
        with watch:
            self.module(*self.args, **self.kwargs)
        return ROWS in watch.lengths

    def _reaches(self, spoil: Callable[[Tensor], Tensor]) -> bool:
        """Whether other rows come out differently where one is spoilt."""
        change = partial(_with_row, spoil)
        again = self.module(*mapped(self.args, change), **mapped(self.kwargs, change))
        return any(
            not _others_equal(before, after)
            for before, after in zip(tensors_in(self.found), tensors_in(again), strict=True)
        )


class _RangesMade(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how long ranges of integers are that somebody makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lengths: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.arange:
            self.lengths.add(found.numel())
        return found


def _poisoned(row: Tensor) -> Tensor:
    return torch.full_like(row, torch.nan)


def _other(row: Tensor) -> Tensor:
    return row * -1.5 + 0.3


def row_axis(x: Tensor, rows: int) -> int | None:
    """The axis along which a tensor has a row per token."""
    return next((axis for axis, size in enumerate(x.shape) if size == rows), None)


def mapped(value: Any, change: Any) -> Any:
    """`value` with each tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(mapped(part, change) for part in value)
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def _with_row(spoil: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    axis = row_axis(x, ROWS)
    if axis is None or not x.is_floating_point():
        return x
    x = x.clone()
    row = x.select(axis, _CHANGED)
    row.copy_(spoil(row))
    return x


def _others_equal(before: Tensor, after: Tensor) -> bool:
    axis = row_axis(before, ROWS)
    if axis is None or not before.is_floating_point():
        return True
    keep = torch.arange(ROWS) != _CHANGED
    keep_rows = keep.nonzero()[:, 0]
    one, other = (x.index_select(axis, keep_rows) for x in (before, after))
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))

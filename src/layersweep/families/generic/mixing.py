"""Which parts of a layer let tokens see each other outside of attention.

Convolutions and recurrent states do; a sweep computes them sequence by sequence. A part is asked by
calling it again with one row changed: does any other row come out differently?
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
        args = tuple(_changed(value) for value in self.args)
        kwargs = {key: _changed(value) for key, value in self.kwargs.items()}
        again = self.module(*args, **kwargs)
        return any(
            not _others_equal(before, after)
            for before, after in zip(tensors_in(self.found), tensors_in(again), strict=True)
        )


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


def _changed(value: Any) -> Any:
    def change(x: Tensor) -> Tensor:
        axis = row_axis(x, ROWS)
        if axis is None or not x.is_floating_point():
            return x
        x = x.clone()
        x.select(axis, _CHANGED).mul_(-1.5).add_(0.3)
        return x

    return mapped(value, change)


def _others_equal(before: Tensor, after: Tensor) -> bool:
    axis = row_axis(before, ROWS)
    if axis is None or not before.is_floating_point():
        return True
    keep = torch.arange(ROWS) != _CHANGED
    keep_rows = keep.nonzero()[:, 0]
    one, other = (x.index_select(axis, keep_rows) for x in (before, after))
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))

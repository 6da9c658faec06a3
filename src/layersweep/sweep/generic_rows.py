"""A tile's rows under transformers' layers: which sequence and which branch each belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from layersweep.families.generic.interfaces import Attend
from layersweep.families.generic.mixing import mapped
from layersweep.kv.stream import Stream
from layersweep.model.compute import Compute, Scratch
from layersweep.model.generic.turning import Turner, Turners
from layersweep.model.generic.walk import Args, Kwargs
from layersweep.stream.shapes import CPU_EXPERT_ROWS, DENSE_ROWS
from layersweep.sweep.attention import attend_group
from layersweep.sweep.context import LayerContext, RopeTables
from layersweep.sweep.heads import Projected
from layersweep.sweep.sequences import Group, Tile
from layersweep.sweep.streams import streams_of


def tile_positions(tile: Tile) -> Tensor:
    """The place of each row in its sequence, [rows]."""
    parts = []
    for sequence in tile.sequences:
        before = len(sequence.prefix)
        parts.append(torch.arange(before))
        parts += [torch.arange(before, before + len(b.ids)) for b in sequence.branches]
    return torch.cat(parts)


@dataclass
class GenericContext(LayerContext):
    """Of a layer whose keys come as attention sees them."""

    turner: Turner | None = None

    @cached_property
    def plain_streams(self) -> tuple[Stream, ...]:
        keys, values = streams_of(self.attention)
        return replace(keys, rope=self.turner is not None, rotation=self.turner), values


class TileRows:
    """See model/generic/walk.Rows. `layer_of`: which layer a module attends in; `context` makes
    the context of a layer, given what its weights are."""

    def __init__(
        self,
        tile: Tile,
        groups: list[Group],
        layer_of: Mapping[nn.Module, int],
        context: Callable[[int, Mapping[str, Tensor]], GenericContext],
        *,
        cpu: bool,
    ) -> None:
        self.tile, self._every, self._now = tile, groups, groups
        self._layer_of, self._context = layer_of, context
        self._at_once = CPU_EXPERT_ROWS if cpu else DENSE_ROWS

    @property
    def _rows(self) -> slice:
        """Those that modules are called with now."""
        return slice(self._now[0].start, self._now[-1].stop)

    def attend(
        self, module: nn.Module, q_1QND: Tensor, k_1GND: Tensor, v_1GND: Tensor, call: Attend
    ) -> Tensor:
        weights = {} if call.sinks is None else {"sinks": call.sinks}
        context = self._context(self._layer_of[module], weights)
        heads, rows, width = q_1QND.shape[1], q_1QND.shape[2], v_1GND.shape[3]
        out = q_1QND.new_empty(rows, heads * width)
        for group in self._now:
            own = slice(group.start - self._rows.start, group.stop - self._rows.start)
            q, k, v = (_sequences(x[0, :, own], group) for x in (q_1QND, k_1GND, v_1GND))
            with context.scratch.frame():
                attend_group(self.tile, group, Projected(q, (k, v)), out[own], context)
        return out.view(1, rows, heads, width).transpose(1, 2)

    def by_group(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        whole, results = self._rows, None
        for group in self._every:
            self._now = [group]
            found = self._cut(forward, args, kwargs, whole, self._rows)
            results = _placed(results, found, self._rows, whole)
        self._now = self._every
        return results

    def by_row(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        whole, results = self._rows, None
        if whole.stop - whole.start <= self._at_once:
            return forward(*args, **kwargs)
        for first in range(whole.start, whole.stop, self._at_once):
            some = slice(first, min(first + self._at_once, whole.stop))
            found = self._cut(forward, args, kwargs, whole, some)
            results = _placed(results, found, some, whole)
        return results

    def by_sequence(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """A prefix is computed again with each of its branches; its rows come from the first."""
        whole, results = self._rows, None
        for group in self._now:
            before = start = len(group.sequences[0].prefix)
            first = torch.arange(len(group.sequences))[:, None] * group.rows_each + group.start
            for number, branch in enumerate(group.sequences[0].branches):
                own = torch.arange(start, start + len(branch.ids))
                rows_BT = first - whole.start + torch.cat((torch.arange(before), own))

                def take(x: Tensor, rows_BT: Tensor = rows_BT) -> Tensor:
                    axis, rows = _row_axis(x, whole), rows_BT.to(x.device)
                    if axis == 2:
                        return x[0][:, rows].transpose(0, 1)
                    return x if axis is None else x[0][rows]

                found = forward(*mapped(args, take), **mapped(kwargs, take))
                new = slice(before if number else 0, None)
                results = _spread(results, found, rows_BT, new, whole.stop - whole.start)
                start += len(branch.ids)
        return results

    def _cut(
        self, forward: Callable[..., Any], args: Args, kwargs: Kwargs, whole: slice, some: slice
    ) -> Any:
        def cut(x: Tensor) -> Tensor:
            axis = _row_axis(x, whole)
            start = some.start - whole.start
            return x if axis is None else x.narrow(axis, start, some.stop - some.start)

        return forward(*mapped(args, cut), **mapped(kwargs, cut))


def _sequences(x_HND: Tensor, group: Group) -> Tensor:
    """[H, rows, D] of a group -> [B, H, rows of a sequence, D], a view where x is one in memory."""
    heads, _, width = x_HND.shape
    return x_HND.reshape(heads, len(group.sequences), group.rows_each, width).transpose(0, 1)


def _row_axis(x: Tensor, whole: slice) -> int | None:
    """Where a tensor has a row per token: [1, N, ...], [1, 1, N, ...] or [N, ...]."""
    rows = whole.stop - whole.start
    if x.ndim > 2 and x.shape[:3] == (1, 1, rows):
        return 2
    if x.ndim > 1 and x.shape[:2] == (1, rows):
        return 1
    return 0 if x.ndim > 0 and x.shape[0] == rows else None


def _placed(results: Any, found: Any, some: slice, whole: slice) -> Any:
    """`found` for `some` rows written into what is returned for the `whole` of them."""
    if isinstance(found, tuple | list):
        before = results or [None] * len(found)
        return type(found)(
            _placed(one, part, some, whole) for one, part in zip(before, found, strict=True)
        )
    axis = _row_axis(found, some) if isinstance(found, Tensor) else None
    if axis is None:
        return found
    if results is None:
        sizes = list(found.shape)
        sizes[axis] = whole.stop - whole.start
        results = found.new_empty(sizes)
    results.narrow(axis, some.start - whole.start, some.stop - some.start).copy_(found)
    return results


def _spread(results: Any, found: Any, rows_BT: Tensor, new: slice, total: int) -> Any:
    """The `new` tokens of `found` [B, T, ...] written to their rows of [1, N, ...]."""
    if isinstance(found, tuple | list):
        before = results or [None] * len(found)
        return type(found)(
            _spread(one, part, rows_BT, new, total) for one, part in zip(before, found, strict=True)
        )
    if not isinstance(found, Tensor) or found.shape[:2] != rows_BT.shape:
        return found
    if results is None:
        results = found.new_empty(1, total, *found.shape[2:])
    results[0][rows_BT[:, new].to(found.device)] = found[:, new]
    return results


def context_maker(
    decoder: Any, compute: Compute, scratch: Scratch, bits: dict[tuple[str, str], list[float]],
    turners: Turners, longest: int,
) -> Callable[[int, Mapping[str, Tensor]], GenericContext]:  # fmt: skip
    """Contexts of the layers of a sweep, for sequences of up to `longest` tokens."""
    tables = RopeTables(0, compute)
    layers = decoder.generic.layers

    def context(index: int, weights: Mapping[str, Tensor]) -> GenericContext:
        turner = turners.of(layers[index].turning, longest)
        return GenericContext(
            decoder, index, weights, tables, compute, scratch, bits, turner=turner
        )

    return context

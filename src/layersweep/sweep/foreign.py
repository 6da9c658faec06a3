"""A tile's rows under transformers' layers: sequences, branches and arms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from layersweep.kv.arms import Arm
from layersweep.kv.codec import key_group
from layersweep.kv.store import KvStore
from layersweep.kv.stream import Stream
from layersweep.model.generic import plain
from layersweep.model.generic.interfaces import Attend
from layersweep.model.generic.mixing import mapped, row_axis
from layersweep.model.generic.rehearsal import AttentionSite
from layersweep.sweep.sequences import Branch, Group, Tile

STREAMING_MEAN = 128

Pair = tuple[Tensor, Tensor]


def tile_positions(tile: Tile) -> Tensor:
    """The place of each row in its sequence, [rows]."""
    parts = []
    for sequence in tile.sequences:
        before = len(sequence.prefix)
        parts.append(torch.arange(before))
        parts += [torch.arange(before, before + len(b.ids)) for b in sequence.branches]
    return torch.cat(parts)


class TileRows:
    """Attention of a tile, and modules that are called sequence by sequence.

    `sites`: (layer, what is known of it) of each attention module. `count(arm, bits, elements)` is
    told what each arm stores.
    """

    def __init__(
        self,
        tile: Tile,
        groups: list[Group],
        sites: Mapping[nn.Module, tuple[int, AttentionSite]],
        num_layers: int,
        count: Callable[[Arm, float, int], None] = lambda arm, bits, elements: None,
    ) -> None:
        self.tile, self.groups, self.sites = tile, groups, sites
        self.num_layers, self.count = num_layers, count

    def attend(
        self, module: nn.Module, q_1QND: Tensor, k_1GND: Tensor, v_1GND: Tensor, call: Attend
    ) -> Tensor:
        out = q_1QND.new_empty(*q_1QND.shape[:3], v_1GND.shape[3])
        layer, site = self.sites[module]
        for group in self.groups:
            q, k, v, found = (_by_sequence(x, group) for x in (q_1QND, k_1GND, v_1GND, out))
            _attend_group(self, group, layer, site, call, (q, k, v), found)
        return out

    def by_sequence(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`forward` for each prefix with one branch of it, as sequences of their own; the prefix's
        rows come from the first branch."""
        whole: list[Tensor | None] = []

        def put(found: Any, rows: Tensor, keep: slice) -> Any:
            """Where the rows of a call belong; makes room at the first one."""
            place = iter(range(len(whole), 10**9)) if not whole else iter(range(len(whole)))
            raise NotImplementedError

        results: Any = None
        for group in self.groups:
            before = len(group.sequences[0].prefix)
            start = before
            for number, branch in enumerate(group.sequences[0].branches):
                own = torch.cat((torch.arange(before), torch.arange(start, start + len(branch.ids))))
                first = torch.arange(len(group.sequences))[:, None] * group.rows_each + group.start
                rows = first + own  # [B, T]
                take = _taking(rows, self.tile.rows)
                found = forward(*mapped(args, take), **mapped(kwargs, take))
                skip = before if number else 0
                results = _placed(results, found, rows, skip, self.tile.rows)
                start += len(branch.ids)
        return results


def _taking(rows: Tensor, total: int) -> Callable[[Tensor], Tensor]:
    """[1, N, ...] -> [B, T, ...] of `rows`."""

    def take(x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != total or x.shape[0] != 1:
            return x
        return x[0][rows.to(x.device)]

    return take


def _placed(results: Any, found: Any, rows: Tensor, skip: int, total: int) -> Any:
    """`found` [B, T, ...] written to its rows of [1, N, ...], in whatever it is packed in."""
    if isinstance(found, Tensor):
        if found.shape[:2] != rows.shape:
            return found
        if results is None:
            results = found.new_zeros(1, total, *found.shape[2:])
        results[0][rows[:, skip:].to(found.device)] = found[:, skip:]
        return results
    if isinstance(found, tuple | list):
        before = results or [None] * len(found)
        return type(found)(
            _placed(one, part, rows, skip, total) for one, part in zip(before, found, strict=True)
        )
    return found


def _by_sequence(x_1HND: Tensor, group: Group) -> Tensor:
    """[1, H, N, D] -> the group's [B, H, rows of a sequence, D], a view."""
    rows = x_1HND[0, :, group.start : group.stop]
    return rows.unflatten(1, (len(group.sequences), group.rows_each)).transpose(0, 1)


def _attend_group(
    rows: TileRows,
    group: Group,
    layer: int,
    site: AttentionSite,
    call: Attend,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
) -> None:
    q, k, v = qkv
    sequence, prefix = group.sequences[0], len(group.sequences[0].prefix)
    at = torch.arange(sequence.longest, device=q.device)
    if prefix:
        own = slice(0, prefix)
        out[:, :, own] = _attended(q[:, :, own], k[:, :, own], v[:, :, own], at[own], at[own], site, call)
    kept = prefix if site.window is None else min(prefix, site.window - 1)
    past = slice(prefix - kept, prefix)
    readers = [b.arm for b in sequence.branches if not b.streaming]
    table = site.rotation.table(at) if site.rotation else None
    store = None
    if kept and readers:
        store = _stored(rows, readers, layer, site, _unturned(site, (k[:, :, past], v[:, :, past]), table, past), past.start)
        for index, arm in enumerate(readers):
            rows.count(arm, store.nbits(index), store.elements(index))
    start, reader = prefix, 0
    for branch in sequence.branches:
        own = slice(start, start + len(branch.ids))
        here = at[prefix : prefix + len(branch.ids)]
        pair = k[:, :, own], v[:, :, own]
        if branch.streaming:
            out[:, :, own] = _streaming(rows, branch, layer, site, call, q[:, :, own], pair, table)
        else:
            seen = (k[:, :, past], v[:, :, past])
            if store is not None and branch.arm.codec is not None:
                seen = _turned(site, store.decoded(reader), table, past)
            reader += 1
            keys, values = (torch.cat((a.to(b.dtype), b), dim=2) for a, b in zip(seen, pair, strict=True))
            key_at = torch.cat((at[past], here))
            out[:, :, own] = _attended(q[:, :, own], keys, values, here, key_at, site, call)
        start = own.stop


def _attended(q: Tensor, k: Tensor, v: Tensor, query_at: Tensor, key_at: Tensor, site: AttentionSite, call: Attend) -> Tensor:
    seen = plain.may_look(query_at, key_at, site.window, site.chunk)
    return plain.attend(q, k, v, seen, scale=call.scale, softcap=call.softcap, sinks_Q=call.sinks)


def _streams(site: AttentionSite) -> tuple[Stream, Stream]:
    turned = site.rotation is not None and len(site.rotation.first) > 0
    return (
        Stream("k", site.kv_heads, site.key_dim, "key", turned, site.window),
        Stream("v", site.kv_heads, site.value_dim, "value", False, site.window),
    )


def _stored(rows: TileRows, arms: list[Arm], layer: int, site: AttentionSite, kv: Pair, skipped: int, mean_tokens: int | None = None) -> KvStore:
    """Keys and values as each arm keeps them, `skipped` older tokens being out of the window."""
    streams = _streams(site)
    kept = [(replace(arm, sink=max(arm.sink - skipped, 0)), streams) for arm in arms]
    return KvStore.empty(kept, layer, rows.num_layers, mean_tokens).appended(kv)


def _unturned(site: AttentionSite, kv: Pair, table: Pair | None, at: slice) -> Pair:
    """Keys before RoPE."""
    if site.rotation is None or table is None:
        return kv
    return site.rotation.turned(kv[0], (table[0][at], table[1][at]), back=True), kv[1]


def _turned(site: AttentionSite, kv: tuple[Tensor, ...], table: Pair | None, at: slice) -> Pair:
    if site.rotation is None or table is None:
        return kv[0], kv[1]
    return site.rotation.turned(kv[0], (table[0][at], table[1][at]), back=False), kv[1]


def _streaming(rows: TileRows, branch: Branch, layer: int, site: AttentionSite, call: Attend, q: Tensor, kv: Pair, table: Pair | None) -> Tensor:
    """Every token reads the decoded keys and values of every earlier token and of itself."""
    tokens, arm = q.shape[2], branch.arm
    at = torch.arange(tokens, device=q.device)
    group = 1 if arm.codec is None else key_group(arm.codec)
    plain_kv = _unturned(site, kv, table, slice(0, tokens))
    stored = _stored(rows, [arm], layer, site, plain_kv, 0, STREAMING_MEAN)
    rows.count(arm, stored.nbits(0), stored.elements(0))
    if arm.codec is None:
        return _attended(q, *kv, at, at, site, call)
    if group == 1 and not arm.window:
        return _attended(q, *_turned(site, stored.decoded(0), table, slice(0, tokens)), at, at, site, call)
    raise NotImplementedError

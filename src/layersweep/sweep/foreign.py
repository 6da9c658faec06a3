"""A tile's rows under transformers' layers: sequences, branches and arms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from layersweep.kv.arms import Arm
from layersweep.kv.codec import key_group
from layersweep.kv.store import KvStore
from layersweep.kv.stream import Stream
from layersweep.model.generic import plain
from layersweep.model.generic.interfaces import Attend
from layersweep.model.generic.mixing import mapped
from layersweep.model.generic.rehearsal import AttentionSite
from layersweep.sweep.attention import STREAMING_MEAN
from layersweep.sweep.caches import Pair
from layersweep.sweep.sequences import Branch, Group, Tile

Count = Callable[[Arm, float, int], None]


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
        count: Count = lambda arm, bits, elements: None,
    ) -> None:
        self.rows, self.groups, self.sites = tile.rows, groups, sites
        self.num_layers, self.count = num_layers, count

    def attend(
        self, module: nn.Module, q_1QND: Tensor, k_1GND: Tensor, v_1GND: Tensor, call: Attend
    ) -> Tensor:
        """See walk.Attention. Each branch attends to its history, as its arm keeps it, and to
        itself."""
        out = q_1QND.new_empty(*q_1QND.shape[:3], v_1GND.shape[3])
        layer, site = self.sites[module]
        for group in self.groups:
            q, k, v, found = (_sequences(x, group) for x in (q_1QND, k_1GND, v_1GND, out))
            at = torch.arange(group.sequences[0].longest, device=q.device)
            _Attention(site, call, layer, self.num_layers, at, self.count)(
                group.sequences[0].branches, q, (k, v), found
            )
        return out

    def by_sequence(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See walk.SequenceWise: a call for each prefix with one branch of it, as whole sequences;
        the prefix's rows come from the first branch's."""
        results: Any = None
        for group in self.groups:
            before = start = len(group.sequences[0].prefix)
            first = torch.arange(len(group.sequences))[:, None] * group.rows_each + group.start
            for number, branch in enumerate(group.sequences[0].branches):
                own = torch.arange(start, start + len(branch.ids))
                rows = first + torch.cat((torch.arange(before), own))  # [B, T]

                def take(x: Tensor, rows: Tensor = rows) -> Tensor:
                    packed = x.ndim > 1 and x.shape[:2] == (1, self.rows)
                    return x[0][rows.to(x.device)] if packed else x

                found = forward(*mapped(args, take), **mapped(kwargs, take))
                results = _placed(results, found, rows, before if number else 0, self.rows)
                start += len(branch.ids)
        return results


def _placed(results: Any, found: Any, rows_BT: Tensor, skip: int, total: int) -> Any:
    """`found` [B, T, ...] but its first `skip` tokens written to its rows of [1, N, ...], in
    whatever it is packed in."""
    if isinstance(found, tuple | list):
        before = results or [None] * len(found)
        return type(found)(
            _placed(one, part, rows_BT, skip, total)
            for one, part in zip(before, found, strict=True)
        )
    if not isinstance(found, Tensor) or found.shape[:2] != rows_BT.shape:
        return found
    if results is None:
        results = found.new_empty(1, total, *found.shape[2:])
    results[0][rows_BT[:, skip:].to(found.device)] = found[:, skip:]
    return results


def _sequences(x_1HND: Tensor, group: Group) -> Tensor:
    """A group's [B, H, rows of a sequence, D], a view of [1, H, N, D]."""
    rows = x_1HND[0, :, group.start : group.stop]
    sizes = (len(rows), len(group.sequences), group.rows_each, rows.shape[2])
    return rows.view(sizes).transpose(0, 1)


@dataclass
class _Attention:
    """One layer's attention of a group; `at` [longest] are the positions of its sequences."""

    site: AttentionSite
    call: Attend
    layer: int
    num_layers: int
    at: Tensor
    count: Count

    def __call__(self, branches: Sequence[Branch], q: Tensor, kv: Pair, out: Tensor) -> None:
        """q, out [B, Q, rows of a sequence, D] and keys and values [B, G, rows, D]."""
        start = prefix = q.shape[2] - sum(len(branch.ids) for branch in branches)
        if prefix:
            own = slice(0, prefix)
            out[:, :, own] = self._looked(q[:, :, own], _cut(kv, own), self.at[own], self.at[own])
        window = self.site.window
        past = slice(0 if window is None else max(0, prefix - window + 1), prefix)
        views = self._views([b.arm for b in branches if not b.streaming], _cut(kv, past), past)
        for branch in branches:
            own = slice(start, start + len(branch.ids))
            new, here = _cut(kv, own), self.at[prefix : prefix + len(branch.ids)]
            if branch.streaming:
                out[:, :, own] = self._streamed(branch.arm, q[:, :, own], new)
            else:
                both = [torch.cat(pair, dim=2) for pair in zip(next(views), new, strict=True)]
                key_at = torch.cat((self.at[past], here))
                out[:, :, own] = self._looked(q[:, :, own], (both[0], both[1]), here, key_at)
            start = own.stop

    def _views(self, arms: Sequence[Arm], past: Pair, place: slice) -> Iterator[Pair]:
        """Keys and values of the tokens in `place` as each arm's branch reads them."""
        if place.stop == place.start or not arms:
            yield from (past for _ in arms)
            return
        store = self._stored(arms, past, place)
        for index, arm in enumerate(arms):
            # exact ones are what the model made, not turned back and forth
            yield past if arm.codec is None else self._decoded(store, index, past, place)

    def _stored(
        self, arms: Sequence[Arm], kv: Pair, place: slice, mean_tokens: int | None = None
    ) -> KvStore:
        """Tokens in `place` as each arm keeps them; `sink` counts from the first of a sequence."""
        kept = [(replace(arm, sink=max(arm.sink - place.start, 0)), self.streams) for arm in arms]
        keys = self._turned(kv[0], place, back=True)
        empty = KvStore.empty(kept, self.layer, self.num_layers, mean_tokens)
        store = empty.appended((keys, kv[1]))
        for index, arm in enumerate(arms):
            self.count(arm, store.nbits(index), store.elements(index))
        return store

    def _decoded(self, store: KvStore, index: int, like: Pair, place: slice) -> Pair:
        keys, values = store.decoded(index)
        keys = self._turned(keys.to(like[0].dtype), place, back=False)
        return keys, values.to(like[1].dtype)

    def _turned(self, keys: Tensor, place: slice, *, back: bool) -> Tensor:
        rotation = self.site.rotation
        if rotation is None:  # nobody knows how
            return keys
        return rotation.turned(keys, rotation.table(self.at[place]), back=back)

    def _streamed(self, arm: Arm, q: Tensor, kv: Pair) -> Tensor:
        """Every token reads the decoded keys and values of every earlier token and of itself; see
        sweep/attention.py."""
        at, place = self.at[: q.shape[2]], slice(0, q.shape[2])
        stored = self._stored([arm], kv, place, STREAMING_MEAN)
        if arm.codec is None:
            return self._looked(q, kv, at, at)
        group, seen = key_group(arm.codec), self._seen(at, at)
        if group > 1 or arm.window:  # all of them coded, whatever is exact is laid beside it
            inside = KvStore.empty(
                [(replace(arm, window=0), self.streams)], self.layer, self.num_layers,
                STREAMING_MEAN,
            )  # fmt: skip
            stored = inside.appended((self._turned(kv[0], place, back=True), kv[1]))
        coded = self._decoded(stored, 0, kv, place)
        if group == 1 and not arm.window:
            return self._masked(q, coded, seen)
        left = (at[:, None] + 1 - arm.sink - arm.window).clamp(min=0)  # that left the window
        far, near = at < arm.sink + left // group * group, at >= arm.sink + left
        keys = torch.cat((coded[0], kv[0], kv[0]), dim=2)
        values = torch.cat((coded[1], coded[1], kv[1]), dim=2)
        mask = torch.cat((seen & far, seen & ~far & ~near, seen & near), dim=1)
        return self._masked(q, (keys, values), mask)

    def _seen(self, query_at: Tensor, key_at: Tensor) -> Tensor:
        return plain.may_look(query_at, key_at, self.site.window, self.site.chunk)

    def _looked(self, q: Tensor, kv: Pair, query_at: Tensor, key_at: Tensor) -> Tensor:
        return self._masked(q, kv, self._seen(query_at, key_at))

    def _masked(self, q: Tensor, kv: Pair, mask_TS: Tensor) -> Tensor:
        call = self.call
        return plain.attend(
            q, *kv, mask_TS, scale=call.scale, softcap=call.softcap, sinks_Q=call.sinks
        )

    @cached_property
    def streams(self) -> tuple[Stream, Stream]:
        site = self.site
        turns = site.rotation is not None and len(site.rotation.first) > 0
        return (
            Stream("k", site.kv_heads, site.key_dim, "key", turns, site.window),
            Stream("v", site.kv_heads, site.value_dim, "value", False, site.window),
        )


def _cut(kv: Pair, tokens: slice) -> Pair:
    return kv[0][:, :, tokens], kv[1][:, :, tokens]

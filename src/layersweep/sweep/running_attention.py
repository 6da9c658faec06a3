"""Attention of texts that grow, over the rows that sweep/running.py keeps of them.

A step is one token of each text: launches decide, so the texts of a shelf are one call. Longer
pieces, prompts above all, are attended text by text, or together where they are equally long and
nothing came before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layersweep.families.spec import Rope
from layersweep.kv.arms import EXACT, Arm
from layersweep.kv.methods import FIRST_BLOCK
from layersweep.kv.store import KvStore
from layersweep.model.attention import attend_one
from layersweep.sweep.context import LayerContext, Table
from layersweep.sweep.heads import Projected, Streams, read, rotary_part
from layersweep.sweep.running import Ride, Rows, RunningCaches, Text, Waiting
from layersweep.sweep.sequences import Group, Tile


def attend_running(
    tile: Tile, group: Group, projected: Projected, out: Tensor, context: LayerContext
) -> None:
    """Of a group's rows, into `out` [rows, Q D]; their keys and values are kept."""
    caches = context.caches
    assert isinstance(caches, RunningCaches)
    count = len(group.sequences)
    ride = caches.rides[tile.first]
    arm = _arm(ride.texts[group.first].arm, context)
    if group.sequences[0].is_step:
        _step(tile, group, projected, out.view(count, context.attention.num_heads, -1), context)
    else:
        out = out.view(count, group.rows_each, context.attention.num_heads, -1).transpose(1, 2)
        texts = ride.texts[group.first : group.first + count]
        _pieces(texts, arm, projected, out, caches, context)


def _arm(arm: Arm, context: LayerContext) -> Arm:
    """What the layer keeps under it: exactly everything, where its window leaves no more."""
    own = arm.in_layer(context.index, context.decoder.num_hidden_layers)
    return EXACT if own.codec is None or own.keeps_window(context.attention.window) else own


def _step(
    tile: Tile, group: Group, projected: Projected, out: Tensor, context: LayerContext
) -> None:
    """`out` [B, Q, D]. The queries and streams of all texts turn as if they were one text's, whose
    positions are theirs."""
    caches = context.caches
    assert isinstance(caches, RunningCaches)
    ride, one = caches.rides[tile.first], context.attention
    some = slice(group.first, group.first + len(group.sequences))
    table = _table_of_each(ride, some, context)
    q, *streams = (x.transpose(0, 2) for x in (projected.q, *projected.streams))  # [1, H, B, D]
    rotary = rotary_part(q, context)
    context.turn(rotary, table, 0, rotary)
    views = tuple(streams) if one.latent else read([tuple(streams)], 0, table, context)
    for rows in caches.rows_of(tile, group.first, len(group.sequences)):
        own = slice(rows.first, rows.first + len(rows.rows))
        texts = ride.texts[group.first : group.first + len(group.sequences)][own]
        held = caches.at[texts[0]].views(context.index, streams)
        _put(held, rows, [x[0, :, own].transpose(0, 1) for x in views])
        arm = _arm(texts[0].arm, context)
        if arm.codec is not None:
            new = tuple(x[:, :, own].clone() for x in streams)  # of all texts: copies are launches
            for at, (text, row) in enumerate(zip(texts, rows.rows, strict=True)):
                _append(text, arm, (new, at, at + 1), text.end + 1, held, row, context)
        out[own] = _attended(rows, q[0, :, own].transpose(0, 1), held, context)


def _table_of_each(ride: Ride, some: slice, context: LayerContext) -> Table | None:
    """A row of cos and sin for each text, of the position of its next token; once for all layers
    that turn alike."""
    rope = context.attention.rope
    if rope is None:
        return None
    known = rope, some.start, some.stop
    if known not in ride.turned:
        ride.turned[known] = _turned(rope, ride, some, context)
    return ride.turned[known]


def _turned(rope: Rope, ride: Ride, some: slice, context: LayerContext) -> Table:
    if not rope.depends_on_length:
        cos, sin = context.tables.of(rope, context.tables.longest)
        at = ride.positions[some]
        return cos[at], sin[at]
    tables = [(context.tables.of(rope, text.end + 1), text.end) for text in ride.texts[some]]
    cos, sin = (torch.stack([table[part][at] for table, at in tables]) for part in (0, 1))
    return cos, sin


def _put(held: Sequence[Tensor], rows: Rows, new: Sequence[Tensor]) -> None:
    """The new tokens [texts, H, D], each behind the others of its text."""
    row, end = rows.places
    for view, x in zip(held, new, strict=True):
        view[row, :, end] = x


def _attended(rows: Rows, q_BQD: Tensor, held: Sequence[Tensor], context: LayerContext) -> Tensor:
    """[B, Q, D] of the texts that ride."""
    count, columns = len(rows.shelf.texts), rows.columns
    seen = tuple(view[:count, :, :columns] for view in held)
    queries = q_BQD
    if not rows.every:
        queries = q_BQD.new_zeros(count, *q_BQD.shape[1:])
        queries[rows.places[0]] = q_BQD
    with context.scratch.frame():
        if context.attention.latent:
            seen = read([seen], 0, context.table(columns), context)
        bias = rows.bias(context.attention.window, q_BQD)
        keys, values = seen
        found = attend_one(queries, keys, values, bias, context.rule.masked(), context.sinks)
    found = found.reshape(count, *q_BQD.shape[1:2], -1)
    return found if rows.every else found[rows.places[0]]


def _append(
    text: Text, arm: Arm, new: Waiting, end: int, held: Sequence[Tensor], row: int,
    context: LayerContext,
) -> None:  # fmt: skip
    """Tokens up to `end` behind what the text has. Where some leave the arm's window, all that wait
    go to the store, and the text's row of what is `held` shows what it gives."""
    index = context.index
    waiting, store = text.pending[index], text.stores[index]
    waiting.append(new)
    coded = arm.coded_until(end)
    if coded <= text.coded[index]:
        return
    if store is None:
        layers = context.decoder.num_hidden_layers
        store = KvStore.empty([(arm, context.streams(arm))], index, layers, FIRST_BLOCK)
    parts = ([x[:, :, first:last] for x in streams] for streams, first, last in waiting)
    store = store.appended([torch.cat(of, dim=2) for of in zip(*parts, strict=True)])
    waiting.clear()
    rows = [view[row : row + 1] for view in held]
    _show(store.decoded(0), store.end - store.tokens, rows, context)
    store = store.since(context.plain_streams[0].first_held(store.end))
    text.keep(index, store.moved(torch.clone), coded)  # exact tokens are views of what goes


def _show(streams: Streams, first: int, rows: Sequence[Tensor], context: LayerContext) -> None:
    """What a store gives, from position `first` on, in a text's row."""
    end = first + streams[0].shape[2]
    if context.attention.latent:
        for row, x in zip(rows, streams, strict=True):
            row[:, :, first:end] = x
        return
    (keys, values), (row_keys, row_values) = streams, rows
    context.turn(keys, context.table(end), first, row_keys[:, :, first:end])
    row_values[:, :, first:end] = values


def _pieces(
    texts: Sequence[Text], arm: Arm, projected: Projected, out: Tensor, caches: RunningCaches,
    context: LayerContext,
) -> None:  # fmt: skip
    """`out` [B, Q, T, D]: texts of equal past and own tokens."""
    q, streams = projected.q, projected.streams
    past, tokens = texts[0].end, q.shape[2]
    end = past + tokens
    table = context.table(end)
    rotary = rotary_part(q, context)
    context.turn(rotary, table, past, rotary)
    attention, rule, sinks = context.compute.attention, context.rule, context.sinks
    latent = context.attention.latent
    with context.scratch.frame():
        views = streams if latent else read([streams], past, table, context)
        for index, text in enumerate(texts):
            shelf = caches.at[text]
            row, one = shelf.texts.index(text), slice(index, index + 1)
            held = shelf.views(context.index, streams)
            rows = [view[row : row + 1] for view in held]
            for view, x in zip(rows, views, strict=True):
                view[:, :, past:end] = x[one]
            if arm.codec is not None:
                new = tuple(x[one].clone() for x in streams)
                _append(text, arm, (new, 0, tokens), end, held, row, context)
            elif not past and not latent:
                continue
            seen = tuple(view[:, :, :end] for view in rows)
            with context.scratch.frame():
                keys, values = read([seen], 0, table, context) if latent else seen
                attention(q[one], keys, values, rule=rule, sinks=sinks, out=out[one])
        if arm.codec is None and not past and not latent:
            attention(q, *views, rule=rule, sinks=sinks, out=out)

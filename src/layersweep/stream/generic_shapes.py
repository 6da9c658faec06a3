"""Bytes and operations of a tile where transformers' own layers compute; see stream/shapes.py.

Their modules take memory from torch's allocator for every step. What keeps that bounded is how they
are called: attention for a few sequences at a time, all that looks at single rows for some rows at
a time, one tile after the other. families/generic/costs.py measures what lives at once.
"""

from __future__ import annotations

import math

from layersweep.families.generic.costs import Costs, Moment, costs_of
from layersweep.families.spec import Decoder
from layersweep.stream.shapes import (
    CPU_EXPERT_ROWS,
    DENSE_ROWS,
    Machine,
    TileShape,
    experts_at_once,
    rows_at_once,
)

HEAD_ROWS = 256  # whose logits the head computes at once

_ROW = 32  # bytes of a row's id, position and place
_HEAD = 5  # [rows, V] float32: products, scaled and capped


def held_bytes(decoder: Decoder, tile: TileShape, element: int) -> int:
    """What a tile holds through the whole sweep, and while it waits for experts."""
    known = costs(decoder, element)
    routing = decoder.experts_per_token * 40 + decoder.num_experts * 12
    return math.ceil(tile.rows * (max(known.between, known.at_experts) + _ROW + routing))


def module_bytes(decoder: Decoder, tile: TileShape, machine: Machine, *, attending: int) -> int:
    """What the modules of one tile hold while they compute, beside what it holds. `attending`:
    what its attention needs besides."""
    element, cpu = machine.element, machine.cpu
    known = costs(decoder, element, kernels=machine.kernels and not cpu)
    at_once = CPU_EXPERT_ROWS if cpu else DENSE_ROWS
    most = max(_bytes_at(moment, tile, at_once, known.chunk) for moment in known.moments)
    attends = max(_bytes_at(moment, tile, at_once, known.chunk) for moment in known.attending)
    most = max(most, attends + attending) - held_bytes(decoder, tile, element)
    for layer in decoder.distinct_layers:
        if layer.feed.experts:
            rows = min(rows_at_once(layer.feed, "expert", tile.rows, cpu=cpu), tile.rows)
            together = experts_at_once(decoder, layer, element, cpu=cpu)
            row = decoder.hidden_size * element
            gathered = rows * row * (1 if machine.grouped else together)
            most = max(most, gathered + rows * together * known.expert)
            if cpu:  # products before they are put in their places, and rows as they are added
                made = row + known.expert + 2 * layer.feed.inner * element
                most = max(most, rows * made, rows * 3 * row)
    return max(math.ceil(most), HEAD_ROWS * decoder.vocab_size * 4 * _HEAD)


def _bytes_at(moment: Moment, tile: TileShape, at_once: int, chunk: int) -> float:
    """All that a tile has at a moment. What calls return is put together in a tensor of its own
    wherever one call does not do."""
    padded = math.ceil(tile.longest / chunk) * chunk
    cut_rows, cut_group = tile.rows > at_once, tile.rows > tile.rows_at_once
    whole = moment.tile + moment.out_sequences
    whole += moment.out_rows * cut_rows + moment.out_group * cut_group
    return (
        tile.rows * whole
        + tile.rows_at_once * moment.group
        + min(tile.rows, at_once) * moment.rows
        + tile.sequences_at_once * padded * moment.sequences
    )


def costs(decoder: Decoder, element: int, *, kernels: bool = False) -> Costs:
    """Of its modules, in numbers of `element` bytes."""
    parts = decoder.generic
    assert parts is not None
    after = tuple(parts.blocks[-1].weights)
    return costs_of(parts.config, parts.layers, after, element, kernels)


def module_flops(decoder: Decoder, tile: TileShape) -> float:
    """Multiply-adds of matrices and attention, counted twice."""
    assert decoder.generic is not None
    total = 0
    for block in decoder.generic.blocks:
        matrices = sum(math.prod(shape) for shape in block.weights.values() if len(shape) > 1)
        if block.role == "attention" and block.layer is not None:
            total += 2 * tile.rows * matrices
        elif block.role == "expert" and block.layer is not None:
            feed = decoder.layers[block.layer].feed
            assert feed.router is not None
            total += 2 * tile.rows * matrices * feed.router.top_k // feed.experts
    for layer, count in decoder.distinct_layers.items():
        one = layer.attention
        width = one.query_width + one.out_width
        total += 2 * count * width * tile.attended(one.window)
    return float(total + 2 * decoder.hidden_size * decoder.vocab_size * tile.read_rows)

"""Bytes and operations of a tile where transformers' own layers compute; see stream/shapes.py.

Their modules take memory from torch's allocator for every step. What keeps that bounded is how they
are called: attention for a few sequences at a time, all that looks at single rows for some rows at
a time, one tile after the other. The counts are of tensors that live at once, found by measuring.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from layersweep.families.generic.parts import GenericLayer
from layersweep.families.spec import Decoder
from layersweep.families.weights import BlockShape
from layersweep.stream.shapes import CPU_EXPERT_ROWS, DENSE_ROWS, TileShape, rows_at_once

HEAD_ROWS = 256  # whose logits the head computes at once

_HELD = 3  # [N, H]: embeddings, hidden states before and after the last layer
_AT_EXPERTS = 2  # [N, H] more: residual, what goes to the experts, their sums
_IN_LAYER = 4  # [N, H]: residual, normed, what attention and MLP add, their sum
_WIDE = 3  # [rows, widest]: activation, up, product
_NORMED = 3  # [rows, H] float32 of a norm
_HEADS = 10  # bytes more per query number: normed in float32, or turned in steps
_MIXED = 12  # [rows, widest] float32 of a recurrence that runs chunk by chunk
_HEAD = 5  # [rows, V] float32: products, scaled and capped


def held_bytes(decoder: Decoder, tile: TileShape, element: int) -> int:
    """What a tile holds through the whole sweep, and while it waits for experts."""
    assert decoder.generic is not None
    layers = decoder.generic.layers
    vectors = _HELD + (_AT_EXPERTS + any(map(_shares, layers))) * bool(decoder.num_experts)
    row = decoder.hidden_size * element * vectors + 32  # ids, positions
    turns = {  # speeds are found anew in each layer, up to rounding
        (layer.turning.first, f"{layer.turning.speed[-1]:.3g}")
        for layer in layers
        if layer.turning and layer.turning.first
    }
    row += sum(4 * len(first) * element for first, _ in turns)  # cos and sin
    row += decoder.experts_per_token * 40 + decoder.num_experts * 12
    return tile.rows * row


def module_bytes(decoder: Decoder, tile: TileShape, element: int, *, cpu: bool) -> int:
    """What the modules of one tile hold while they compute, beside what it holds."""
    assert decoder.generic is not None
    hidden, widest = decoder.hidden_size, widest_output(decoder.generic.blocks)
    # where there are experts, what waits for them has not been made yet
    layer = 0 if decoder.num_experts else tile.rows * hidden * element * _IN_LAYER
    rows = min(tile.rows, CPU_EXPERT_ROWS if cpu else DENSE_ROWS)
    most = rows * (widest * element * _WIDE + hidden * 4 * _NORMED)
    for one in decoder.distinct_layers:
        streams = one.attention.key_width + one.attention.value_width
        wide = one.attention.query_width * (2 * element + _HEADS) + 2 * streams * element
        most = max(most, tile.rows_at_once * wide)
        if one.feed.experts:
            at_once = min(rows_at_once(one.feed, "expert", tile.rows, cpu=cpu), tile.rows)
            most = max(most, at_once * (3 * hidden + 5 * one.feed.inner) * element)
    if any(layer.mixers for layer in decoder.generic.layers):
        most = max(most, tile.sequences_at_once * tile.longest * widest * 4 * _MIXED)
    head = HEAD_ROWS * decoder.vocab_size * 4 * _HEAD
    return max(layer + most, head)


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


def _shares(layer: GenericLayer) -> bool:
    """Whether there is more beside the experts than a router."""
    beside = f"{layer.experts.rpartition('.')[0]}."
    return sum(bool(layer.experts) and part.startswith(beside) for part in layer.rowwise) > 1


def widest_output(blocks: Iterable[BlockShape]) -> int:
    """Of the matrices that all rows of a layer go through."""
    shapes = (
        shape
        for block in blocks
        if block.role == "attention"
        for shape in block.weights.values()
        if len(shape) == 2
    )
    return max((max(shape) for shape in shapes), default=0)

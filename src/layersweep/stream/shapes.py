"""Bytes and operations of a tile, from sizes alone. The sweep takes its memory by these formulas,
so that the plan is what happens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from layersweep.families.spec import Decoder, Feed, Layer
from layersweep.families.weights import BlockShape, Role, blocks

EXPERT_SPREAD = 1.25  # an expert's rows go through at most this many times its even share at once
GROUP_BYTES = 400 * 2**20  # of dense experts that are visited together: less than most heads
GROUP_TILES = 2  # rows of a group of experts, in rows of a tile
FITTED_SCORES = 2**23  # of the reference text that are held at once, unless a KV head has more
LOGITS_BYTES = 512 * 2**20  # of logits that are held at once
FEWEST_POSITIONS = 64  # that one product of the head takes, whatever they need
DENSE_ROWS = 12_800  # of an MLP that all rows go through: enough for full speed
# On the CPU an expert's rows go through in pieces whose activations stay in the cache.
CPU_EXPERT_ROWS = 2048
SCRATCH_ALIGNMENT = 256
VECTOR_ALIGNMENT = 8  # elements between places where dense weights start


@dataclass(frozen=True)
class TileShape:
    """What a plan must know of a tile.

    `rows`: tokens; `longest`: keys of its longest sequence; `spans`: (past, own, how often) of the
    runs of tokens that attend to a past and to themselves, causally; `read_rows`: rows whose
    logits are read, `read_each`: of one sequence; `branches`: most of one sequence;
    `sequences_at_once`, `rows_at_once`: of one attention call; `kept_columns`: keys of all
    branches that a call attends to where their answers are generated.
    """

    name: str
    rows: int
    longest: int
    spans: tuple[tuple[int, int, int], ...]
    read_rows: int
    read_each: int
    branches: int
    sequences_at_once: int
    rows_at_once: int
    kept_columns: int = 0

    def attended(self, window: int | None = None) -> int:
        """Sum over all rows of the keys that a row attends to."""
        return sum(count * _attended(past, own, window) for past, own, count in self.spans)

    @property
    def keys_read(self) -> int:
        """Sum over all spans of the keys that are there."""
        return sum(count * (past + own) for past, own, count in self.spans)


def _attended(past: int, own: int, window: int | None) -> int:
    """Keys of `own` tokens after `past` ones: past + 1, past + 2, ..., at most `window`."""
    if window is None:
        return own * past + own * (own + 1) // 2
    below = min(own, max(0, window - past))  # tokens whose whole past is in the window
    return below * past + below * (below + 1) // 2 + (own - below) * window


@dataclass(frozen=True)
class Machine:
    """Budgets and habits of the device, as far as memory goes.

    `element`: bytes of the compute dtype; `context`: what CUDA itself holds of `vram`;
    `repeats_kv`: attention needs keys and values once per query head (below sm_80); `kernels`:
    our own work there, plain torch takes memory for every step; `grouped`: experts that are visited
    together have one product there, which gathers its rows; `sharers`: processes on this host
    that read the same files: then the page cache is the one copy of them in host memory; `lanes`:
    threads that generate there in turn.
    """

    vram: int
    ram: int
    element: int
    cpu: bool
    context: int = 0
    repeats_kv: bool = False
    kernels: bool = True
    grouped: bool = False
    sharers: int = 1
    lanes: int = 0


def tile_flops(decoder: Decoder, tile: TileShape) -> float:
    """Multiply-adds counted twice: projections, routed experts, attention, head."""
    if decoder.generic:
        from layersweep.stream.generic_shapes import module_flops  # counts by what is here

        return module_flops(decoder, tile)
    hidden = decoder.hidden_size
    layers = sum(
        count * _layer_flops(layer, hidden, tile)
        for layer, count in decoder.distinct_layers.items()
    )
    return float(layers + 2 * hidden * decoder.vocab_size * tile.read_rows)


def _layer_flops(layer: Layer, hidden: int, tile: TileShape) -> int:
    one, feed = layer.attention, layer.feed
    width = one.query_width + one.out_width
    projected, expanded = hidden * (width + one.key_width + one.value_width), 0
    if one.latent:  # keys and values are products of the latent, once per span that reads it
        latent = one.latent
        queries = one.query_width * hidden
        if latent.query_rank:
            queries = latent.query_rank * (hidden + one.query_width)
        projected = queries + hidden * (one.out_width + one.stream_width)
        expanded = one.num_heads * (latent.nope_dim + one.value_dim) * latent.kv_rank
    per_row = 2 * projected
    if feed.router:
        per_row += 2 * hidden * feed.experts + 6 * feed.router.top_k * hidden * feed.inner
        per_row += 6 * hidden * feed.shared_inner
    else:
        per_row += 6 * hidden * feed.inner
    attended = 2 * width * tile.attended(one.window)
    return tile.rows * per_row + attended + 2 * expanded * tile.keys_read


def tile_bytes(
    decoder: Decoder, tile: TileShape, element: int, *, keeps_normed: bool = False
) -> int:
    """Memory that a tile holds through the whole sweep: hidden states, update, routing; and the
    rows that experts see, where it keeps them."""
    if decoder.generic:
        from layersweep.stream.generic_shapes import held_bytes

        return held_bytes(decoder, tile, element)
    routing = tile.rows * decoder.experts_per_token * 16 + tile.rows * 4
    return (2 + keeps_normed) * tile.rows * decoder.hidden_size * element + routing


def fitted_at_once(heads: int, tokens: int, *, cpu: bool) -> int:
    """KV heads, each of which has so many query heads, whose scores over a text are held at once:
    on a GPU they share launches."""
    return 1 if cpu else max(1, FITTED_SCORES // (heads * tokens**2))


def fit_bytes(decoder: Decoder, tile: TileShape, *, cpu: bool) -> int:
    """What torch's allocator holds while a layer's coordinates are fitted to the reference text:
    scores of a KV head's queries, or a few such heads', several times, covariances in float64."""
    most = 0
    for layer in decoder.distinct_layers:
        one = layer.attention
        if one.num_kv_heads and not one.latent:
            heads, width = one.num_heads // one.num_kv_heads, one.stream_width
            at_once = fitted_at_once(heads, tile.rows, cpu=cpu)
            scores = 7 * 4 * min(at_once, one.num_kv_heads) * heads * tile.rows**2
            covariances = 8 * width * (3 * width + 3 * tile.rows + decoder.hidden_size)
            most = max(most, scores, covariances + 12 * tile.rows * one.query_width)
    return most


def rows_at_once(feed: Feed, role: Role, rows: int, *, cpu: bool) -> int:
    """Most rows of a tile of `rows` that go through an MLP or an expert in one product. A function
    of the tile alone, so that budgets change no number."""
    if cpu:
        return CPU_EXPERT_ROWS
    if role != "expert" or feed.router is None:
        return DENSE_ROWS
    share = rows * feed.router.top_k / feed.experts
    return max(64, math.ceil(EXPERT_SPREAD * share))


def experts_at_once(decoder: Decoder, layer: Layer, element: int, *, cpu: bool) -> int:
    """Experts that are dense together and visited in one go, where they are many and small: they
    share launches, and each row is updated once for all of them. Groups are of one size."""
    feed = layer.feed
    if cpu or feed.router is None or feed.inner % 8 or decoder.hidden_size % 8:
        return 1  # rows of 16 bytes are what their products in one launch take
    each = 3 * feed.inner * decoder.hidden_size * element
    most = min(GROUP_TILES * feed.experts // feed.router.top_k, GROUP_BYTES // each)
    groups = math.ceil(feed.experts / max(1, most))
    return math.ceil(feed.experts / groups)


def most_experts_at_once(decoder: Decoder, element: int, *, cpu: bool) -> int:
    """The same over all layers."""
    layers = decoder.distinct_layers
    return max(experts_at_once(decoder, layer, element, cpu=cpu) for layer in layers)


def slots(block: BlockShape, experts: int) -> int:
    """Blocks like this one that are dense together."""
    return experts if block.role == "expert" else 1


def feed_bytes(decoder: Decoder, tile: TileShape, *, cpu: bool, element: int) -> int:
    """Scratch of the rows that go through an MLP at once: its input, later its output, and gate
    and up."""
    most = 0
    for layer in decoder.distinct_layers:
        feed = layer.feed
        if decoder.generic and not feed.experts:  # its modules take theirs elsewhere
            continue
        widths: list[tuple[Role, int]] = [("expert" if feed.experts else "mlp", feed.inner)]
        if feed.shared_inner:
            widths.append(("shared", feed.shared_inner))
        for role, inner in widths:
            rows = min(rows_at_once(feed, role, tile.rows, cpu=cpu), max(tile.rows, 64))
            if role == "expert":
                rows *= experts_at_once(decoder, layer, element, cpu=cpu)
            wide = (1 + feed.shared_gate) * decoder.hidden_size + 2 * inner
            most = max(most, rows * wide * element + 4 * SCRATCH_ALIGNMENT)
    return most


def attention_bytes(decoder: Decoder, tile: TileShape, element: int) -> int:
    """Scratch of one attention call: normed rows, projections, outputs; keys and values of the
    prefix and of a branch, or keys of all branches, where a past is read apart from them. A step
    has a row of each branch (no more than are read), and keys and values of all of them."""
    most, at_once = 0, tile.sequences_at_once * tile.longest
    for layer in decoder.distinct_layers:
        one = layer.attention
        row = decoder.hidden_size + one.query_width + one.out_width + one.stream_width
        if decoder.generic:  # its modules take theirs elsewhere
            row = 0
        norm, added = layer.attention_out_norm is not None, 0
        if norm or one.out_bias or layer.residual != 1.0:  # what is added is made on its own
            added = (1 + norm) * decoder.hidden_size
        keys, values = one.read_widths
        seen, kept = at_once * (2 * keys + values), tile.kept_columns * (keys + values)
        if one.latent:  # the latents of past and own tokens, and their product
            row += one.latent.query_rank or 0
            seen += at_once * (one.stream_width + keys + values)
            kept += tile.kept_columns * (one.stream_width + keys + values)
        else:
            seen = max(seen, tile.rows_at_once * keys + at_once * (keys + values))
        first = tile.rows_at_once * row + max(seen, tile.rows_at_once * added)
        step = tile.read_rows * row + max(kept, tile.read_rows * added)
        most = max(most, first, step)
    return most * element + 16 * SCRATCH_ALIGNMENT


def positions_at_once(branches: int, vocab_size: int) -> int:
    """Positions of one sequence whose logits, float32 under `branches` arms, are held at once: as
    many as fit LOGITS_BYTES. A function of the tile alone, so that budgets change no number."""
    return max(FEWEST_POSITIONS, LOGITS_BYTES // (4 * vocab_size * branches))


def head_bytes(decoder: Decoder, tile: TileShape, element: int) -> int:
    """Scratch of the logits of one sequence that are held at once, and of its normed rows."""
    row = 4 * decoder.vocab_size + 2 * decoder.hidden_size * element
    rows = tile.branches * positions_at_once(tile.branches, decoder.vocab_size)
    return min(tile.read_each, rows) * row + 4 * SCRATCH_ALIGNMENT


def scratch_bytes(decoder: Decoder, tiles: Sequence[TileShape], machine: Machine) -> int:
    """The buffer that attention, experts and head take their memory from, one after the other."""
    element, most = machine.element, 0
    for tile in tiles:
        most = max(
            most,
            attention_bytes(decoder, tile, element),
            feed_bytes(decoder, tile, cpu=machine.cpu, element=element),
            head_bytes(decoder, tile, element),
        )
    return most


def temporary_bytes(decoder: Decoder, tiles: Sequence[TileShape], machine: Machine) -> int:
    """What torch's own allocator holds in one phase: outputs of attention kernels, repeated keys
    and values, codecs at work, sorting of the routing, statistics of logits."""
    width, streams = decoder.query_width, _stream_width(decoder)
    most = 0
    for tile in tiles:
        at_once = tile.sequences_at_once * tile.longest
        attention = at_once * width * machine.element
        if machine.repeats_kv or machine.cpu:
            attention += 2 * at_once * width * machine.element
        codecs = at_once * streams * (4 + 4 + 2 * machine.element * (1 + tile.branches) // 2) // 2
        # logits and what torch makes of them for the routers that no kernel takes; its sort
        routing = tile.rows * (decoder.num_experts * 20 + decoder.experts_per_token * 40)
        if decoder.routes_in_float32:
            routing += 4 * tile.rows_at_once * decoder.hidden_size
        positions = positions_at_once(tile.branches, decoder.vocab_size)
        read = min(tile.read_each, tile.branches * positions)
        logits = 32 * read * math.ceil(decoder.vocab_size / 8192)  # sums of parts, see score.cu
        if machine.cpu or not machine.kernels:
            logits = 4 * (read // tile.branches) * 4 * decoder.vocab_size
        if decoder.generic:
            from layersweep.stream.generic_shapes import module_bytes

            attending, codecs = attention + codecs, 0
            attention = module_bytes(decoder, tile, machine, attending=attending)
        most = max(most, attention + codecs, routing, logits)
    if not machine.cpu and not machine.kernels:  # products and float32 norms beside the scratch
        rows = max((tile.rows for tile in tiles), default=0)
        most += scratch_bytes(decoder, tiles, machine)
        most += 16 * min(rows, DENSE_ROWS) * decoder.hidden_size
    return most


def _stream_width(decoder: Decoder) -> int:
    return max(layer.attention.stream_width for layer in decoder.distinct_layers)


def kept_bytes(decoder: Decoder, tiles: Sequence[TileShape], machine: Machine) -> int:
    """What torch's allocator holds where kept caches are at work, beside what the first sweep left
    in it: exact keys and values that visit, keys as they are decoded (float32) and turned."""
    each = 4 * machine.element + 3 * 4
    keys = max((tile.sequences_at_once * tile.longest for tile in tiles), default=0)
    return keys * decoder.read_width // 2 * each


def dense_bytes(decoder: Decoder, element: int, *, cpu: bool = False) -> int:
    """Weights in the compute dtype: one layer's attention and one MLP or group of experts, or the
    head."""
    attention: dict[int | None, int] = {}
    feed: dict[int | None, int] = {}
    most, before = 0, None
    for block in blocks(decoder):
        if before and block.weights is before.weights:  # one expert of a layer is like the others
            continue
        before = block
        if block.layer is None:
            most = max(most, dense_elements(block, element))
        else:
            part = attention if block.role == "attention" else feed
            at_once = experts_at_once(decoder, decoder.layers[block.layer], element, cpu=cpu)
            size = dense_elements(block, element) * slots(block, at_once)
            part[block.layer] = max(part.get(block.layer, 0), size)
    return max(most, *(attention[layer] + feed.get(layer, 0) for layer in attention)) * element


def dense_total(decoder: Decoder, element: int) -> int:
    """Every block but the embedding, decoded, in bytes."""
    every = (block for block in blocks(decoder) if block.role != "embed")
    return sum(dense_elements(block, element) for block in every) * element


def dense_elements(block: BlockShape, element: int) -> int:
    """Numbers of `element` bytes that a block's dense weights take, each weight at a place where
    kernels load vectors."""
    aligned = VECTOR_ALIGNMENT
    places = (dense_places(block, key, element) for key in block.weights)
    return sum(-(-count // aligned) * aligned for count in places)


def dense_places(block: BlockShape, key: str, element: int) -> int:
    """The same of one weight: those in float32 take two places of 16 bits a number."""
    return math.prod(block.weights[key]) * (4 // element if key in block.float32 else 1)

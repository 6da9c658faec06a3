"""Bytes and operations of a tile, from sizes alone. The sweep takes its memory by these formulas,
so that the plan is what happens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from layersweep.checkpoint.config import ModelConfig

EXPERT_SPREAD = 1.25  # an expert's rows go through at most this many times its even share at once
# On the CPU an expert's rows go through in pieces whose activations stay in the cache.
CPU_EXPERT_ROWS = 2048
SCRATCH_ALIGNMENT = 256


@dataclass(frozen=True)
class TileShape:
    """What a plan must know of a tile.

    `rows`: tokens; `longest`: keys of its longest sequence; `attention_keys`: sum over its rows
    of the keys that a row attends to; `read_rows`: rows whose logits are read, `read_at_once`:
    of one sequence; `branches`: most of one sequence; `sequences_at_once`, `rows_at_once`: of
    one attention call; `kept_columns`: keys of all branches that a call attends to where their
    answers are generated.
    """

    name: str
    rows: int
    longest: int
    attention_keys: int
    read_rows: int
    read_at_once: int
    branches: int
    sequences_at_once: int
    rows_at_once: int
    kept_columns: int = 0


@dataclass(frozen=True)
class Machine:
    """Budgets and habits of the device, as far as memory goes.

    `element`: bytes of the compute dtype; `context`: what CUDA itself holds of `vram`;
    `repeats_kv`: attention needs keys and values once per query head (below sm_80); `kernels`:
    our own work there, plain torch takes memory for every step; `sharers`: processes on this host
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
    sharers: int = 1
    lanes: int = 0


def tile_flops(config: ModelConfig, tile: TileShape) -> float:
    """Multiply-adds counted twice: projections, routed experts, attention, head."""
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    per_row = 2 * config.hidden_size * (2 * heads + 2 * kv + config.num_local_experts)
    per_row += 6 * config.num_experts_per_tok * config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers * (tile.rows * per_row + 4 * heads * tile.attention_keys)
    return float(layers + 2 * config.hidden_size * config.vocab_size * tile.read_rows)


def tile_bytes(config: ModelConfig, tile: TileShape, element: int) -> int:
    """Memory that a tile holds through the whole sweep: hidden states, update, routing."""
    routing = tile.rows * config.num_experts_per_tok * 12 + tile.rows * 4
    return 2 * tile.rows * config.hidden_size * element + routing


def expert_piece(config: ModelConfig, rows: int, *, cpu: bool) -> int:
    """Most rows of one expert and tile that are one product. A function of the tile alone, so
    that budgets change no number."""
    if cpu:
        return CPU_EXPERT_ROWS
    share = rows * config.num_experts_per_tok / config.num_local_experts
    return max(64, math.ceil(EXPERT_SPREAD * share))


def expert_bytes(config: ModelConfig, rows: int, element: int) -> int:
    """Scratch of `rows` rows of one expert: its input, later its output, and gate and up."""
    width = config.hidden_size + 2 * config.intermediate_size
    return rows * width * element + 4 * SCRATCH_ALIGNMENT


def attention_bytes(config: ModelConfig, tile: TileShape, element: int) -> int:
    """Scratch of one attention call: normed rows, projections, outputs; keys and values of the
    prefix and of a branch. A step has a row of each branch (no more than are read), and keys and
    values of all of them."""
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    row = config.hidden_size + 2 * heads + 2 * kv
    first = tile.rows_at_once * row + 3 * tile.sequences_at_once * tile.longest * kv
    step = tile.read_rows * row + 2 * tile.kept_columns * kv
    return max(first, step) * element + 16 * SCRATCH_ALIGNMENT


def head_bytes(config: ModelConfig, tile: TileShape, element: int) -> int:
    """Scratch of one sequence's logits, float32, and its normed rows."""
    row = 4 * config.vocab_size + 2 * config.hidden_size * element
    return tile.read_at_once * row + 4 * SCRATCH_ALIGNMENT


def scratch_bytes(config: ModelConfig, tiles: Sequence[TileShape], machine: Machine) -> int:
    """The buffer that attention, experts and head take their memory from, one after the other."""
    element, most = machine.element, 0
    for tile in tiles:
        rows = expert_piece(config, tile.rows, cpu=machine.cpu)
        most = max(
            most,
            attention_bytes(config, tile, element),
            expert_bytes(config, rows, element),
            head_bytes(config, tile, element),
        )
    return most


def temporary_bytes(config: ModelConfig, tiles: Sequence[TileShape], machine: Machine) -> int:
    """What torch's own allocator holds in one phase: outputs of attention kernels, repeated keys
    and values, codecs at work, sorting of the routing, statistics of logits."""
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    most = 0
    for tile in tiles:
        at_once = tile.sequences_at_once * tile.longest
        attention = at_once * heads * machine.element
        if machine.repeats_kv or machine.cpu:
            attention += 2 * at_once * heads * machine.element
        codecs = at_once * kv * (4 + 4 + 2 * machine.element * (1 + tile.branches) // 2)
        routing = tile.rows * config.num_experts_per_tok * 40
        per_branch = tile.read_at_once // max(1, tile.branches)
        logits = 4 * per_branch * 4 * config.vocab_size
        most = max(most, attention + codecs, routing, logits)
    if not machine.cpu and not machine.kernels:  # products and float32 norms beside the scratch
        rows = max((expert_piece(config, tile.rows, cpu=False) for tile in tiles), default=0)
        most += scratch_bytes(config, tiles, machine) + 16 * rows * config.hidden_size
    return most


def kept_bytes(config: ModelConfig, tiles: Sequence[TileShape], machine: Machine) -> int:
    """What torch's allocator holds where kept caches are at work, beside what the first sweep left
    in it: exact keys and values that visit, keys as they are decoded (float32) and turned."""
    kv = config.num_key_value_heads * config.head_dim
    each = 4 * machine.element + 3 * 4
    keys = max((tile.sequences_at_once * tile.longest for tile in tiles), default=0)
    return keys * kv * each


def dense_bytes(config: ModelConfig, element: int) -> int:
    """Weights in the compute dtype: one layer's attention and one expert, or the head."""
    hidden = config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    attention = hidden * (2 * heads + 2 * kv + config.num_local_experts + 2)
    layer = 3 * hidden * config.intermediate_size + attention
    return max(layer, (config.vocab_size + 1) * hidden) * element

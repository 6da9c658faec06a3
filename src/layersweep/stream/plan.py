"""The plan: where bytes go, how many sweeps it takes, and what that costs. Pure arithmetic.

Everything follows from the checkpoint's headers, the shapes of the tiles and the budgets, so
a request that cannot fit is refused before a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from layersweep.checkpoint.config import ModelConfig
from layersweep.errors import BudgetError
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.store import choose_resident, minimum_ring
from layersweep.units import format_bytes

FIXED_BYTES = 256 * 2**20  # libraries' workspaces, masks, tables, the allocator's slack
EXPERT_SPREAD = 1.5  # an expert may get this much more than its share of a tile's rows
# On the CPU an expert's rows go through in pieces whose activations stay in the cache.
CPU_EXPERT_ROWS = 2048


@dataclass(frozen=True)
class TileShape:
    """What a plan must know of a tile.

    `rows`: tokens; `longest`: keys of its longest sequence; `attention_keys`: sum over its rows
    of the keys that a row attends to; `read_rows`: rows whose logits are read, `read_at_once`:
    of one sequence; `rows_at_once` and `attended_at_once`: rows, and elements of repeated keys,
    of one attention call.
    """

    name: str
    rows: int
    longest: int
    attention_keys: int
    read_rows: int
    read_at_once: int
    rows_at_once: int
    attended_at_once: int


@dataclass(frozen=True)
class Plan:
    """`sweeps[i]` are the tiles (by index) of sweep i. `peaks` sums to `device_bytes`."""

    sweeps: tuple[tuple[int, ...], ...]
    peaks: dict[str, int]
    resident_bytes: int
    ring_bytes: int
    weight_bytes: int
    bytes_to_read: int
    flops: float
    vram: int
    ram: int

    @property
    def device_bytes(self) -> int:
        return sum(self.peaks.values())

    @property
    def host(self) -> str:
        """Where weights come from, in the words of results.json."""
        if self.resident_bytes >= self.weight_bytes:
            return "resident"
        return "disk" if self.resident_bytes == 0 else "ring"


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
    routing = tile.rows * config.num_experts_per_tok * 24 + tile.rows * config.num_local_experts * 8
    return 2 * tile.rows * config.hidden_size * element + routing


def scratch_bytes(
    config: ModelConfig, tiles: Sequence[TileShape], element: int, *, cpu: bool
) -> dict[str, int]:
    """Peak of each phase of a visit; phases follow one another, weights stay meanwhile."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    attention = experts = head = 0
    for tile in tiles:
        projected = tile.rows_at_once * (2 * hidden + 2 * heads + 2 * kv) * element
        attention = max(attention, projected + 6 * tile.attended_at_once * element)
        share = tile.rows * config.num_experts_per_tok / config.num_local_experts
        rows = CPU_EXPERT_ROWS if cpu else math.ceil(EXPERT_SPREAD * share)
        experts = max(experts, rows * (4 * hidden + 2 * inner) * element)
        head = max(head, tile.read_at_once * (hidden * element + 5 * 4 * config.vocab_size))
    dense_expert = 3 * hidden * inner * element
    dense_attention = hidden * (2 * heads + 2 * kv + config.num_local_experts) * element
    dense_head = 2 * config.vocab_size * hidden * element
    return {
        "dense weights": max(dense_expert + dense_attention, dense_head),
        "tile scratch": max(attention, experts, head),
    }


def make_plan(
    config: ModelConfig,
    specs: Sequence[BlockSpec],
    tiles: Sequence[TileShape],
    *,
    element: int,
    vram: int,
    ram: int,
    cpu: bool,
) -> Plan:
    """Cut `tiles` into sweeps that fit `vram`, and place the weights within `ram`.

    `element`: bytes of the compute dtype. On the CPU both budgets are host memory and `vram`
    bounds the working set alone. Raises BudgetError with needed, available and what would fit.
    """
    scratch = scratch_bytes(config, tiles, element, cpu=cpu)
    ring = minimum_ring(specs)
    if ram < ring:
        raise BudgetError(
            f"--ram: available {format_bytes(ram)}, needed {format_bytes(ring)} "
            "for one layer and two blocks ahead",
            hint=f"--ram {format_bytes(ring).replace(' ', '')} or more",
        )
    fixed = FIXED_BYTES + sum(scratch.values()) + (0 if cpu else ring)
    sizes = [tile_bytes(config, tile, element) for tile in tiles]
    biggest = max(sizes, default=0)
    if fixed + biggest > vram:
        raise BudgetError(
            f"--vram: available {format_bytes(vram)}, needed {format_bytes(fixed + biggest)} "
            "for one tile",
            hint=f"--vram {format_bytes(fixed + biggest).replace(' ', '')}, or fewer arms in "
            "--kv, or a smaller --niah-context",
        )
    sweeps = _cut(sizes, vram - fixed)
    weight_bytes = sum(spec.nbytes for spec in specs)
    # one sweep reads every block once whatever stays: a store is filled only for a second
    kept = choose_resident(specs, ram - ring) if len(sweeps) > 1 else frozenset()
    stored = sum(spec.stored_bytes for spec in specs)
    repeated = sum(spec.stored_bytes for index, spec in enumerate(specs) if index not in kept)
    held = max(sum(sizes[index] for index in sweep) for sweep in sweeps)
    return Plan(
        sweeps=sweeps,
        peaks={"hidden states": held, **scratch, "fixed": FIXED_BYTES}
        | ({} if cpu else {"weights in flight": ring}),
        resident_bytes=sum(specs[index].nbytes for index in kept),
        ring_bytes=ring,
        weight_bytes=weight_bytes,
        bytes_to_read=stored + (len(sweeps) - 1) * repeated,
        flops=sum(tile_flops(config, tile) for tile in tiles),
        vram=vram,
        ram=ram,
    )


def _cut(sizes: Sequence[int], room: int) -> tuple[tuple[int, ...], ...]:
    """Consecutive tiles per sweep, as many as fit `room`."""
    sweeps: list[list[int]] = [[]]
    used = 0
    for index, size in enumerate(sizes):
        if sweeps[-1] and used + size > room:
            sweeps.append([])
            used = 0
        sweeps[-1].append(index)
        used += size
    return tuple(tuple(sweep) for sweep in sweeps)

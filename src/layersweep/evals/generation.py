"""Needles whose answers are generated: a visit of all weights for every token.

Transfers decide here, since a token's arithmetic is little. So weights stay on the device as far as
they fit; where they fit several devices together, each holds its share of the layers, and units of
tiles go from one to the next, one on each at a time. Keys and values are kept between the visits,
in host memory where the devices have no room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from layersweep.checkpoint.config import ModelConfig
from layersweep.errors import BudgetError, NoRoomTogether
from layersweep.evals.needle_job import NEW_TOKENS
from layersweep.kv.arms import EXACT, Arm
from layersweep.stream.blocks import BlockSpec, blocks_of
from layersweep.stream.plan import Plan, make_plan
from layersweep.stream.rates import STEP_SECONDS, sweep_seconds
from layersweep.stream.runs import spread_layers
from layersweep.stream.shapes import Machine, TileShape
from layersweep.sweep.sequences import Tile
from layersweep.sweep.shapes import tile_shape
from layersweep.sweep.state import arms_at_once, kept_columns
from layersweep.units import format_bytes

# Bits of an element beside a codec's own, for scales and means. What is arithmetic alone holds
# whole numbers.
OVERHEAD_BITS, SIMULATED_BITS = 1.0, 32.0


class Holder(Protocol):
    """A model on a device, as planning sees it: a sweep.model.Model, or one on a device that is
    not there."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def specs(self) -> list[BlockSpec]: ...
    @property
    def machine(self) -> Machine: ...


@dataclass(frozen=True)
class Stage:
    """The layers that a device holds."""

    layers: range
    plan: Plan

    @property
    def resident(self) -> bool:
        """Whether its weights are read once and stay."""
        return self.plan.device_kept_bytes + self.plan.host_kept_bytes == self.plan.weight_bytes


@dataclass(frozen=True)
class Generation:
    """How the trials of some tiles are generated.

    `units`: tiles that ride together, and whose trials are done together. `offload`: caches wait
    in host memory; `cache_bytes` of them at most.
    """

    stages: list[Stage]
    units: list[list[Tile]]
    offload: bool
    cache_bytes: int

    @property
    def walks(self) -> int:
        """Over all weights: one for each token of each unit."""
        return NEW_TOKENS * len(self.units)

    def seconds(
        self, device: str, gemm_flops: float, h2d: float | None, disk: float | None = None
    ) -> float:
        """First walks, as sweeps are planned from the page cache; then for each further token what
        the host launches, what goes over the bus, weights and caches, or what is read again: the
        longest counts. Rates of one device."""
        lanes, later = self.lanes, NEW_TOKENS - 1
        first = [
            sum(sweep_seconds(stage.plan, device, gemm_flops * lanes, h2d)[::NEW_TOKENS])
            for stage in self.stages
        ]
        visits = later * sum(len(unit) for unit in self.units)
        visits *= sum(len(stage.layers) for stage in self.stages)
        moved, read = (
            max(sum(each) - sum(each[::NEW_TOKENS]) for each in of)
            for of in zip(*((s.plan.copies, s.plan.reads) for s in self.stages), strict=True)
        )
        if self.offload:
            moved += self.unit_cache_bytes * len(self.units) * later // lanes
        over_the_bus = moved / h2d if h2d else 0.0
        again = read / disk if disk else 0.0
        return max(first) + max(STEP_SECONDS[device] * visits, over_the_bus, again)

    @property
    def unit_cache_bytes(self) -> int:
        """Of one unit."""
        return self.cache_bytes // self.lanes

    @property
    def lanes(self) -> int:
        """Units under way at once: one for each stage, so that none is idle."""
        return min(len(self.stages), len(self.units))


def plan_generation(
    models: Sequence[Holder],
    tiles: list[Tile],
    arms: Sequence[Arm],
    at_least: int = 1,
    lead: Sequence[Tile] = (),
) -> Generation:
    """Place weights, caches and tiles; on several devices only if all weights stay there.

    `models`: one checkpoint on each device; `at_least`: units wanted; `lead`: the gate's tile, if
    it rides with the first unit. Raises BudgetError where that cannot be, of them NoRoomTogether
    for several devices.
    """
    tiles = [*lead, *tiles]
    caches = [0] * len(lead) + [_cache_bytes(models[0], tile, arms) for tile in tiles[len(lead) :]]
    if len(models) == 1:
        return _on_one(models[0], tiles, caches, at_least, len(lead))
    for offload in (True,) if models[0].machine.cpu else (False, True):
        if found := _over_layers(models, tiles, caches, at_least, offload, len(lead)):
            return found
    weights = sum(spec.nbytes for spec in models[0].specs)
    rooms = ", ".join(format_bytes(model.machine.vram) for model in models)
    raise NoRoomTogether(
        f"--device: found {len(models)} devices of {rooms}, needed room for "
        f"{format_bytes(weights)} of weights, each its share of the layers, beside what computes",
        hint="one device streams them; or a smaller --niah-context",
    )


def wants_layers_shared(models: Sequence[Holder]) -> bool:
    """Whether several devices should rather hold a share of the layers each than all weights: they
    stay there only so. On the CPU, where that is for tests, always."""
    weights = sum(spec.nbytes for spec in models[0].specs)
    return any(weights > model.machine.vram or model.machine.cpu for model in models)


def _on_one(
    model: Holder, tiles: list[Tile], caches: list[int], at_least: int, leads: int
) -> Generation:
    """As few units as memory allows: each of them visits all weights again for every token."""
    layers = range(model.config.num_hidden_layers)
    failure: BudgetError | None = None
    for count in range(at_least, len(tiles) - leads + 1):
        for offload in (True,) if model.machine.cpu else (False, True):
            held = sum(caches)
            while True:  # the plan of the units whose caches it makes room for
                try:
                    plan = _plan(model, layers, tiles, held, offload, count)
                except BudgetError as error:
                    failure = error
                    break
                most = max(sum(caches[index] for index in unit) for unit in plan.sweeps)
                if most >= held:
                    stages = [Stage(layers, plan)]
                    return Generation(stages, _units(plan, tiles, leads), offload, held)
                held = most
    raise BudgetError(
        f"--niah-mode generate: needed {format_bytes(max(caches))} for the keys and values of one "
        f"tile beside what computes: {failure}",
        hint="--niah-mode teacher keeps none; or a smaller --niah-context, or fewer arms",
    )


def _over_layers(
    models: Sequence[Holder],
    tiles: list[Tile],
    caches: list[int],
    at_least: int,
    offload: bool,
    leads: int,
) -> Generation | None:
    """Each device its share of the layers, all of them resident, and as few units as fit beside
    them, but one for each device; None where that cannot be."""
    trials = len(tiles) - leads
    for units in range(max(at_least, min(len(models), trials)), trials + 1):
        if found := _over_layers_in(models, tiles, caches, offload, leads, units):
            return found
    return None


def _over_layers_in(
    models: Sequence[Holder],
    tiles: list[Tile],
    caches: list[int],
    offload: bool,
    leads: int,
    units: int,
) -> Generation | None:
    config, count = models[0].config, len(models)
    held = min(count, units) * -(-(len(tiles) - leads) // units) * max(caches)
    every = range(config.num_hidden_layers)
    sizes = [
        sum(spec.nbytes for spec in blocks_of(models[0].specs, range(i, i + 1))) for i in every
    ]
    try:
        rooms = [_room(model, every, tiles, held, offload, units, count) for model in models]
        parts = spread_layers(sizes, rooms)
        if parts is None:
            return None
        stages = [
            Stage(layers, _plan(model, layers, tiles, held, offload, units, count))
            for model, layers in zip(models, parts, strict=True)
        ]
    except BudgetError:
        return None
    if not all(stage.resident for stage in stages):
        return None
    return Generation(stages, _units(stages[0].plan, tiles, leads), offload, held)


def _units(plan: Plan, tiles: list[Tile], leads: int) -> list[list[Tile]]:
    """The tiles of each sweep; the gate's is no trial."""
    units = [[tiles[index] for index in sweep if index >= leads] for sweep in plan.sweeps]
    return [unit for unit in units if unit]


def _room(
    model: Holder,
    layers: range,
    tiles: list[Tile],
    held: int,
    offload: bool,
    units: int,
    sharers: int,
) -> int:
    """Bytes of weights that may stay on one of several devices, beside what computes there."""
    plan = _plan(model, layers, tiles, held, offload, units, sharers, visits=1)
    machine = _machine(model, held, offload, sharers)
    if machine.cpu:
        return machine.ram - plan.placement.host_ring
    of_weights = ("weights in flight", "weights kept")
    return machine.vram - sum(size for name, size in plan.peaks.items() if name not in of_weights)


def _plan(
    model: Holder,
    layers: range,
    tiles: list[Tile],
    held: int,
    offload: bool,
    at_least: int,
    sharers: int = 1,
    visits: int = NEW_TOKENS,
) -> Plan:
    machine = _machine(model, held, offload, sharers)
    shapes = [_shape(model, tile) for tile in tiles]
    plan = make_plan(
        model.config, blocks_of(model.specs, layers), shapes, machine, at_least, visits
    )
    if offload:
        return plan
    peaks = {**plan.peaks, "kept caches": held // sharers}
    return replace(plan, peaks=peaks, vram=model.machine.vram)


def _shape(model: Holder, tile: Tile) -> TileShape:
    """With what the steps behind the first sweep take."""
    config = model.config
    columns, arms = _columns(tile), len(tile.sequences[0].branches)
    at_once = arms_at_once(
        len(tile.sequences), columns, config.num_key_value_heads * config.head_dim
    )
    columns *= min(arms, at_once) * len(tile.sequences)
    shape = tile_shape(tile, config.num_attention_heads * config.head_dim)
    return replace(shape, kept_columns=columns)


def _columns(tile: Tile) -> int:
    prefix = max(len(sequence.prefix) for sequence in tile.sequences)
    question = max(len(branch.ids) for s in tile.sequences for branch in s.branches)
    return kept_columns(prefix, question, NEW_TOKENS)


def _machine(model: Holder, held: int, offload: bool, sharers: int) -> Machine:
    """What `held` bytes of caches leave of the budgets; `sharers` stages have one host."""
    machine = replace(model.machine, lanes=sharers)  # a lane for each stage
    if offload:
        return replace(machine, ram=max(0, machine.ram - held) // sharers)
    return replace(machine, vram=machine.vram - held // sharers, ram=machine.ram // sharers)


def _cache_bytes(model: Holder, tile: Tile, arms: Sequence[Arm]) -> int:
    """Upper bound of the keys and values that all branches of a tile keep."""
    config = model.config
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    exact = 8.0 * model.machine.element
    prefix = max(len(sequence.prefix) for sequence in tile.sequences)  # what all are padded to
    own = _columns(tile) - prefix
    each = sum(prefix * _bits(arm, exact) + own * exact for arm in (EXACT, *arms))
    return int(elements * len(tile.sequences) * each / 8)


def _bits(arm: Arm, exact: float) -> float:
    """Bits of an element of a prefix as it is held."""
    if arm.codec is None:
        return exact
    if arm.simulated or arm.key_bits is None or arm.value_bits is None:
        return max(exact, SIMULATED_BITS)
    of = [exact if bits >= 16 else bits + OVERHEAD_BITS for bits in (arm.key_bits, arm.value_bits)]
    return sum(of) / 2

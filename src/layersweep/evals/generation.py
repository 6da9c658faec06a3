"""Needles whose answers are generated: a visit of all weights for every token.

Transfers decide here, since a token's arithmetic is little. So weights stay on the device as far as
they fit; where they fit several devices together, each holds its share of the layers, and units of
tiles go from one to the next, one on each at a time. Keys and values are kept between the visits,
in host memory where the devices have no room.

A unit's first walks, which read prefixes, take as many tiles at a time as memory holds; the further
ones all of them, since a token is next to nothing.
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
from layersweep.stream.plan import Plan, cut, make_plan
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
# Assumed where placements are compared: FLOP/s, bytes/s over the bus and from a disk.
_RATES = 1e14, 1e10, 1e9
_KIND = {True: "cpu", False: "cuda"}


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

    @property
    def on_device(self) -> bool:
        """Whether they stay where they are computed with."""
        return self.resident and not any(self.plan.copies[1:])


@dataclass(frozen=True)
class Unit:
    """Trials that are done together. `first`: the tiles of each of its first walks; the gate may
    ride in one without any."""

    first: list[list[Tile]]

    @property
    def tiles(self) -> list[Tile]:
        return [tile for tiles in self.first for tile in tiles]

    @property
    def walks(self) -> int:
        """Over all weights: the first ones, and one for each further token."""
        return len(self.first) + NEW_TOKENS - 1


@dataclass(frozen=True)
class Generation:
    """How the trials of some tiles are generated. `offload`: caches wait in host memory;
    `cache_bytes` of them at most."""

    stages: list[Stage]
    units: list[Unit]
    offload: bool
    cache_bytes: int

    @property
    def walks(self) -> int:
        return sum(unit.walks for unit in self.units)

    def seconds(
        self, device: str, gemm_flops: float, h2d: float | None, disk: float | None = None
    ) -> float:
        """First walks, as sweeps are planned from the page cache; then for each further one what
        the host launches, what goes over the bus, weights and caches, or what is read again: the
        longest counts. Rates of one device."""
        first = max(
            sum(sweep_seconds(s.plan, device, gemm_flops * self.lanes, h2d)[: len(s.plan.sweeps)])
            for s in self.stages
        )
        further, layer_s = (NEW_TOKENS - 1) * len(self.units), STEP_SECONDS[device]
        steps = sum(layer_s[0] + layer_s[1] * len(unit.tiles) for unit in self.units)
        steps *= (NEW_TOKENS - 1) * sum(len(stage.layers) for stage in self.stages)
        moved = max(sum(s.plan.copies[len(s.plan.sweeps) :]) for s in self.stages)
        read = max(sum(s.plan.reads[len(s.plan.sweeps) :]) for s in self.stages)
        if self.offload:
            moved += self.unit_cache_bytes * further // self.lanes
        over_the_bus = moved / h2d if h2d else 0.0
        again = read / disk if disk else 0.0
        return first + max(steps, over_the_bus, again)

    @property
    def unit_cache_bytes(self) -> int:
        """Of one unit."""
        return self.cache_bytes // self.lanes

    @property
    def lanes(self) -> int:
        """Units under way at once: one for each stage, so that none is idle."""
        return min(len(self.stages), len(self.units))


@dataclass(frozen=True)
class _Job:
    """What is to be placed: tiles, of which the first `leads` are the gate's, and the bytes of keys
    and values that each keeps."""

    models: Sequence[Holder]
    tiles: list[Tile]
    caches: list[int]
    leads: int

    def units(self, count: int) -> list[list[int]]:
        """Tiles of at most `count` units, as even as they can be, by index."""
        own = self.caches[self.leads :]
        parts = [[self.leads + at for at in part] for part in cut(own, sum(own), count)]
        return [[*range(self.leads), *parts[0]], *parts[1:]]


@dataclass(frozen=True)
class _Way:
    """One way to do a job: its units, and at least how many first walks each of them has."""

    job: _Job
    units: list[list[int]]
    first: int
    offload: bool

    @property
    def held(self) -> int:
        """Bytes of the caches of all units that are under way at once."""
        most = max(sum(self.job.caches[index] for index in unit) for unit in self.units)
        return min(len(self.job.models), len(self.units)) * most

    def machine(self, model: Holder) -> Machine:
        """What the caches leave of the budgets. Stages have one host, and a lane each."""
        machine, stages = replace(model.machine, lanes=len(self.job.models)), len(self.job.models)
        if self.offload:
            return replace(machine, ram=max(0, machine.ram - self.held) // stages)
        return replace(machine, vram=machine.vram - self.held // stages, ram=machine.ram // stages)

    def plan(self, model: Holder, layers: range) -> Plan:
        shapes = [_shape(model, tile) for tile in self.job.tiles]
        plan = make_plan(
            model.config, blocks_of(model.specs, layers), shapes, self.machine(model), self.first,
            units=self.units, further=(NEW_TOKENS - 1) * len(self.units),
        )  # fmt: skip
        if self.offload:
            return plan
        peaks = {**plan.peaks, "kept caches": self.held // len(self.job.models)}
        return replace(plan, peaks=peaks, vram=model.machine.vram)

    def generation(self, stages: list[Stage]) -> Generation:
        """With the first walks of the plan; the gate's tile is no trial."""
        sweeps = [
            (sweep[0], [self.job.tiles[index] for index in sweep if index >= self.job.leads])
            for sweep in stages[0].plan.sweeps
        ]
        units = [Unit([tiles for first, tiles in sweeps if first in unit]) for unit in self.units]
        return Generation(stages, units, self.offload, self.held)


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
    caches = [0] * len(lead) + [_cache_bytes(models[0], tile, arms) for tile in tiles]
    job = _Job(models, [*lead, *tiles], caches, len(lead))
    least = max(at_least, min(len(models), len(tiles)))
    found: list[Generation] = []
    failure: BudgetError | None = None
    for offload in (True,) if models[0].machine.cpu else (False, True):
        for units in (job.units(count) for count in range(least, len(tiles) + 1)):
            try:
                found.append(_placed(job, units, offload))
            except BudgetError as error:
                failure = error
                continue
            if not any(sum(s.plan.reads[1:]) for s in found[-1].stages):
                break  # with more units there is only more to do
    if found:
        return min(found, key=lambda one: one.seconds(_KIND[models[0].machine.cpu], *_RATES))
    if len(models) == 1:
        raise BudgetError(
            f"--niah-mode generate: needed {format_bytes(max(caches))} for the keys and values of "
            f"one tile beside what computes: {failure}",
            hint="--niah-mode teacher keeps none; or a smaller --niah-context, or fewer arms",
        )
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


def _placed(job: _Job, units: list[list[int]], offload: bool) -> Generation:
    """With as few first walks as there may be. Raises the BudgetError of one for each tile."""
    most = max(map(len, units))
    for first in range(1, most + 1):
        way = _Way(job, units, first, offload)
        try:
            return _over_layers(way) if len(job.models) > 1 else _on_one(way)
        except BudgetError:
            if first == most:
                raise
    raise AssertionError("a unit has tiles")


def _on_one(way: _Way) -> Generation:
    (model,) = way.job.models
    layers = range(model.config.num_hidden_layers)
    return way.generation([Stage(layers, way.plan(model, layers))])


def _over_layers(way: _Way) -> Generation:
    """Each device its share of the layers, all of them resident."""
    models = way.job.models
    every, specs = range(models[0].config.num_hidden_layers), models[0].specs
    sizes = [sum(spec.nbytes for spec in blocks_of(specs, range(i, i + 1))) for i in every]
    parts = spread_layers(sizes, [_room(way, model, every) for model in models])
    if parts is None:
        raise BudgetError("the layers do not fit")
    stages = [
        Stage(layers, way.plan(model, layers)) for model, layers in zip(models, parts, strict=True)
    ]
    if not all(stage.resident for stage in stages):
        raise BudgetError("not all of the layers stay")
    return way.generation(stages)


def _room(way: _Way, model: Holder, layers: range) -> int:
    """Bytes of weights that may stay on one of several devices, beside what computes there."""
    plan, machine = way.plan(model, layers), way.machine(model)
    if machine.cpu:
        return machine.ram - plan.placement.host_ring
    of_weights = ("weights in flight", "weights kept")
    return machine.vram - sum(size for name, size in plan.peaks.items() if name not in of_weights)


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

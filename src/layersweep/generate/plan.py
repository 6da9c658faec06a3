"""Where a generation's weights, caches and tiles go: plans several ways and takes the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from layersweep.errors import BudgetError, NoRoomTogether
from layersweep.families.spec import Decoder
from layersweep.generate.generation import Generation, Stage, Unit
from layersweep.kv.arms import EXACT, Arm
from layersweep.kv.methods import FINE_BITS
from layersweep.stream.blocks import BlockSpec, blocks_of
from layersweep.stream.plan import Plan, cut, make_plan
from layersweep.stream.runs import spread_layers
from layersweep.stream.shapes import Machine, TileShape
from layersweep.sweep.sequences import Tile
from layersweep.sweep.shapes import tile_shape
from layersweep.sweep.state import arms_at_once, kept_columns
from layersweep.tasks.needle.task import NEW_TOKENS
from layersweep.units import format_bytes

# Bits of an element beside a codec's own, for scales and means. What is arithmetic alone holds
# whole numbers.
OVERHEAD_BITS, SIMULATED_BITS = 1.0, 32.0
# Assumed where placements are compared: FLOP/s, bytes/s over the bus and from a disk.
_RATES = 1e14, 1e10, 1e9


class Holder(Protocol):
    """A model on a device, as planning sees it: a sweep.model.Model, or a model on a machine that
    is only described."""

    @property
    def decoder(self) -> Decoder: ...
    @property
    def specs(self) -> list[BlockSpec]: ...
    @property
    def machine(self) -> Machine: ...
    @property
    def reference_shape(self) -> TileShape | None: ...


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
    """One way to do a job. `first`: the fewest first walks of each of its units."""

    job: _Job
    units: list[list[int]]
    first: int
    offload: bool

    @property
    def held(self) -> int:
        """Bytes of the caches of all units in progress at once."""
        most = max(sum(self.job.caches[index] for index in unit) for unit in self.units)
        return min(len(self.job.models), len(self.units)) * most

    def machine(self, model: Holder) -> Machine:
        """The budgets less the caches. Stages share one host and have a lane each."""
        stages = len(self.job.models)
        machine = replace(model.machine, lanes=stages)
        if self.offload:
            return replace(machine, ram=max(0, machine.ram - self.held) // stages)
        return replace(machine, vram=machine.vram - self.held // stages, ram=machine.ram // stages)

    def plan(self, model: Holder, layers: range) -> Plan:
        shapes = [_shape(model, tile) for tile in self.job.tiles]
        plan = make_plan(
            model.decoder, blocks_of(model.specs, layers), shapes, self.machine(model), self.first,
            units=self.units, further=(NEW_TOKENS - 1) * len(self.units),
            reference=model.reference_shape,
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

    `models`: one checkpoint on each device; `at_least`: the fewest units; `lead`: the gate's tile,
    if it rides with the first unit. Raises BudgetError if nothing fits; with several devices, its
    subclass NoRoomTogether.
    """
    caches = [0] * len(lead) + [_cache_bytes(models[0], tile, arms) for tile in tiles]
    job = _Job(models, [*lead, *tiles], caches, len(lead))
    least, cpu = max(at_least, min(len(models), len(tiles))), models[0].machine.cpu
    found: list[Generation] = []
    failure: BudgetError | None = None
    for offload in (True,) if cpu else (False, True):
        for units in (job.units(count) for count in range(least, len(tiles) + 1)):
            try:
                found.append(_placed(job, units, offload))
            except BudgetError as error:
                failure = error
                continue
            if not any(sum(s.plan.reads[1:]) for s in found[-1].stages):
                break  # more units would only add work
    if found:
        return min(found, key=lambda one: one.seconds("cpu" if cpu else "cuda", *_RATES))
    if len(models) == 1:
        raise BudgetError(
            f"--niah-mode generate: needed {format_bytes(max(caches))} for the keys and values of "
            f"one tile, besides the working memory: {failure}",
            hint="--niah-mode teacher keeps no caches; or use a smaller --niah-context or fewer "
            "arms",
        )
    weights = sum(spec.nbytes for spec in models[0].specs)
    rooms = ", ".join(format_bytes(model.machine.vram) for model in models)
    raise NoRoomTogether(
        f"--device: found {len(models)} devices of {rooms}, needed room on them for "
        f"{format_bytes(weights)} of weights, besides the working memory",
        hint="use one device, which streams the weights, or a smaller --niah-context",
    )


def wants_layers_shared(models: Sequence[Holder]) -> bool:
    """Whether each of several devices should hold a share of the layers: a device alone cannot
    keep all weights. Always on the CPU, where this serves tests."""
    weights = sum(spec.nbytes for spec in models[0].specs)
    return any(weights > model.machine.vram or model.machine.cpu for model in models)


def _placed(job: _Job, units: list[list[int]], offload: bool) -> Generation:
    """With as few first walks as possible. Raises the BudgetError of one walk per tile."""
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
    layers = range(model.decoder.num_hidden_layers)
    return way.generation([Stage(layers, way.plan(model, layers))])


def _over_layers(way: _Way) -> Generation:
    """Each device keeps its share of the layers."""
    models = way.job.models
    every, specs = range(models[0].decoder.num_hidden_layers), models[0].specs
    sizes = [sum(spec.nbytes for spec in blocks_of(specs, range(i, i + 1))) for i in every]
    parts = spread_layers(sizes, [_room(way, model, every) for model in models])
    if parts is None:
        raise BudgetError("the layers do not fit")
    stages = [
        Stage(layers, way.plan(model, layers)) for model, layers in zip(models, parts, strict=True)
    ]
    if not all(stage.on_device for stage in stages):
        raise BudgetError("the layers do not all stay on their devices")
    return way.generation(stages)


def _room(way: _Way, model: Holder, layers: range) -> int:
    """Bytes of weights that may stay on one of several devices, beside what computes there."""
    plan, machine = way.plan(model, layers), way.machine(model)
    if machine.cpu:
        return machine.ram - plan.placement.host_ring
    of_weights = ("weights in flight", "weights kept")
    return machine.vram - sum(size for name, size in plan.peaks.items() if name not in of_weights)


def _shape(model: Holder, tile: Tile) -> TileShape:
    """Its shape, with the memory that the steps after the first sweep take."""
    decoder = model.decoder
    columns, arms = _columns(tile), len(tile.sequences[0].branches)
    at_once = arms_at_once(len(tile.sequences), columns, decoder.read_width // 2)
    columns *= min(arms, at_once) * len(tile.sequences)
    shape = tile_shape(tile, decoder.query_width)
    return replace(shape, kept_columns=columns)


def _columns(tile: Tile) -> int:
    prefix = max(len(sequence.prefix) for sequence in tile.sequences)
    question = max(len(branch.ids) for s in tile.sequences for branch in s.branches)
    return kept_columns(prefix, question, NEW_TOKENS)


def _cache_bytes(model: Holder, tile: Tile, arms: Sequence[Arm]) -> int:
    """Upper bound of the keys and values that all branches of a tile keep."""
    decoder, layers = model.decoder, model.decoder.num_hidden_layers
    elements = sum(layer.attention.stream_width for layer in decoder.layers)
    exact = 8.0 * model.machine.element
    prefix = max(len(sequence.prefix) for sequence in tile.sequences)  # what all are padded to
    own = _columns(tile) - prefix
    each = sum(
        exact * (prefix + own)
        - (exact - _bits(arm, exact)) * _coded(arm, prefix, layers)
        + _fine_bits(arm) * min(arm.fine, _coded(arm, prefix, layers))
        for arm in (EXACT, *arms)
    )
    return int(elements * len(tile.sequences) * each / 8)


def _coded(arm: Arm, prefix: int, layers: int) -> float:
    """Tokens of a prefix that go through the codec, on average over the layers."""
    tokens = max(0, arm.coded_until(prefix) - arm.sink)
    return tokens * sum(not arm.is_exact_layer(layer, layers) for layer in range(layers)) / layers


def _fine_bits(arm: Arm) -> float:
    """Bits of an element that is refined, as they are held."""
    return SIMULATED_BITS if arm.simulated else FINE_BITS + OVERHEAD_BITS


def _bits(arm: Arm, exact: float) -> float:
    """Bits of an element that went through the codec, as it is held."""
    if arm.codec is None:
        return exact
    if arm.simulated or arm.key_bits is None or arm.value_bits is None:
        return max(exact, SIMULATED_BITS)
    of = [exact if bits >= 16 else bits + OVERHEAD_BITS for bits in (arm.key_bits, arm.value_bits)]
    return sum(of) / 2

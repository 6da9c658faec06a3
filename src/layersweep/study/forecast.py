"""What an evaluation will take, from headers alone: the arithmetic behind `layersweep plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from layersweep.errors import NoRoomTogether
from layersweep.families.spec import Decoder
from layersweep.generate.generation import Generation
from layersweep.generate.plan import plan_generation, wants_layers_shared
from layersweep.kv.arms import Arm
from layersweep.runs.shard import share
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.plan import Plan, make_plan
from layersweep.stream.rates import SWEEP_EFFICIENCY, MachineRates
from layersweep.stream.shapes import Machine, TileShape, tile_flops
from layersweep.sweep.sequences import Tile, reference_tile
from layersweep.sweep.shapes import can_fit, check_length, length_limit, tile_shape
from layersweep.tasks.registry import TASKS, asked
from layersweep.tasks.settings import SHORTEN, EvalSettings
from layersweep.text.reference import MOST


@dataclass(frozen=True)
class Forecast:
    """A plan on a machine, and seconds by task. Compute and transfer overlap: the longer counts.

    `plan`: of sweeps or of generation, whichever takes more of a device. `sweeps`: 0 where all
    answers are generated, `generation`: how that is done, in words. `read_bytes`: from the files,
    by one process.
    """

    plan: Plan
    sweeps: int
    generation: str
    read_bytes: int
    download_s: float
    first_read_s: float
    task_s: dict[str, float]
    total_s: float


def forecast(
    decoder: Decoder,
    specs: list[BlockSpec],
    settings: EvalSettings,
    arms: Sequence[Arm],
    machine: MachineRates,
) -> Forecast:
    """Plan `settings`, whose segments are a number, on `machine`.

    Raises InputError or BudgetError for what cannot run there.
    """
    kinds = asked(settings)
    check_length(decoder, max(kind.task.longest(settings) for kind in kinds), SHORTEN)
    swept = {kind.name: kind.task.placeholders(settings, arms) for kind in kinds}
    generated = {kind.name: swept.pop(kind.name) for kind in kinds if kind.generates(settings)}
    tiles = [tile for tiles in swept.values() for tile in tiles]
    width = decoder.query_width
    shapes = [tile_shape(tile, width) for tile in tiles]
    cpu = machine.device == "cpu"
    place = Machine(
        machine.vram, machine.ram // machine.devices, element=4 if cpu else 2, cpu=cpu,
        repeats_kv=machine.repeats_kv, grouped=not cpu and not machine.repeats_kv,
        sharers=machine.devices,
    )  # fmt: skip
    rate = machine.gemm_flops * SWEEP_EFFICIENCY[machine.device]
    seconds = {
        kind.name: sum(tile_flops(decoder, shape) for shape in shapes if shape.name == kind.name)
        / (rate * machine.devices)
        for kind in TASKS
    }
    stored = sum(spec.stored_bytes for spec in specs)
    first_read = total = stored / machine.disk
    plans, sweeps, generation, read = [], 0, "", 0
    if tiles:
        costs = [tile_flops(decoder, shape) for shape in shapes]
        most = share(costs, machine.devices)[0]  # of the device with most to compute
        mine = [shapes[index] for index in most]
        plans.append(make_plan(decoder, specs, mine, place, reference=_reference(decoder, arms)))
        sweeps, read = len(plans[0].sweeps), plans[0].bytes_to_read
        again = (plans[0].bytes_to_read - stored) / machine.disk
        total = max(plans[0].flops / rate, first_read + again, plans[0].bytes_to_read / machine.h2d)
    for name, rest in generated.items():
        found, generation = _generation(decoder, specs, rest, arms, machine, place, alone=not tiles)
        plans.append(found.stages[0].plan)
        read += sum(stage.plan.bytes_to_read for stage in found.stages)
        seconds[name] = found.seconds(machine.device, machine.gemm_flops, machine.h2d, machine.disk)
        total = seconds[name] + (total if tiles else first_read)
    return Forecast(
        plan=max(plans, key=lambda plan: plan.device_bytes),
        sweeps=sweeps,
        generation=generation,
        read_bytes=read,
        download_s=stored / machine.download,
        first_read_s=first_read,
        task_s=seconds,
        total_s=total,
    )


@dataclass(frozen=True)
class _Absent:
    """A model on a device that is not there: what planning asks of it."""

    decoder: Decoder
    specs: list[BlockSpec]
    machine: Machine
    reference_shape: TileShape | None


def _generation(
    decoder: Decoder,
    specs: list[BlockSpec],
    tiles: list[Tile],
    arms: Sequence[Arm],
    rates: MachineRates,
    place: Machine,
    *,
    alone: bool,
) -> tuple[Generation, str]:
    """As `eval` does it: layers over the devices if answers are all there is to do and they fit,
    else each device its share of the tiles; of those, the one with most to do."""
    reference = _reference(decoder, arms)
    whole = _Absent(decoder, specs, replace(place, ram=rates.ram, sharers=1), reference)
    if alone and rates.devices > 1 and wants_layers_shared([whole]):
        try:
            found = plan_generation([whole] * rates.devices, tiles, arms)
            return found, f"layers over {rates.devices} devices, {_walks(found)}"
        except NoRoomTogether:
            pass
    mine = [tiles[index] for index in share([float(tile.rows) for tile in tiles], rates.devices)[0]]
    one = whole if rates.devices == 1 else _Absent(decoder, specs, place, reference)
    found = plan_generation([one], mine, arms)
    each = " on each device" if rates.devices > 1 else ""
    return found, f"{_walks(found)}{each}"


def _reference(decoder: Decoder, arms: Sequence[Arm]) -> TileShape | None:
    """Of the reference text, where it rides; as long as it can be."""
    if not (can_fit(decoder) and any(arm.fits for arm in arms)):
        return None
    ids = (0,) * min(MOST, length_limit(decoder)[0])
    return tile_shape(reference_tile(ids), decoder.query_width)


def _walks(generation: Generation) -> str:
    kept = all(stage.on_device for stage in generation.stages)
    where = "which stay on the device" if kept else "part of which is streamed"
    return f"{generation.walks} walks over the weights, {where}"

"""What an evaluation will take, from headers alone: the arithmetic behind `layersweep plan`."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

from layersweep.checkpoint.config import ModelConfig
from layersweep.errors import NoRoomTogether
from layersweep.generate.generation import Generation
from layersweep.generate.plan import plan_generation, wants_layers_shared
from layersweep.kv.arms import EXACT, Arm
from layersweep.runs.record import CONTROL_WINDOWS, NEEDLE, PERPLEXITY
from layersweep.runs.shard import share
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.plan import Plan, make_plan
from layersweep.stream.rates import SWEEP_EFFICIENCY, MachineRates
from layersweep.stream.shapes import Machine, tile_flops
from layersweep.study.settings import SHORTEN, EvalSettings
from layersweep.sweep.sequences import Branch, Sequence, Tile, tiles_of
from layersweep.sweep.shapes import check_length, tile_shape
from layersweep.tasks.needle import task as needle_job
from layersweep.tasks.perplexity import task as perplexity

NEEDLE_BRANCH = 60  # tokens of question, answer prefix and answer


@dataclass(frozen=True)
class Forecast:
    """A plan on a machine, and seconds by job. Compute and transfer overlap: the longer counts.

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
    perplexity_s: float
    needle_s: float
    total_s: float


def placeholder_tiles(settings: EvalSettings, arms: Many[Arm], count: int) -> list[Tile]:
    """Tiles of the right shapes, every token 0: `count` windows and the needles asked for."""
    every = [EXACT, *arms]
    tiles: list[Tile] = []
    if "ppl" in settings.tasks:
        windows = []
        for index in range(count):
            controls = perplexity.control_arms(arms) if index < CONTROL_WINDOWS else []
            held = [*every, *(arm for _, arm in controls)]
            windows.append(_ride(held, settings.prefix, settings.continuation, settings))
        tiles += tiles_of(PERPLEXITY, windows, perplexity.TILE_SEGMENTS)
    if "niah" in settings.tasks:
        per_context = len(settings.niah_depths) * settings.niah_per_depth
        trials = [
            _ride(every, context - NEEDLE_BRANCH, NEEDLE_BRANCH, settings)
            for context in settings.niah_contexts
            for _ in range(per_context)
        ]
        tiles += tiles_of(NEEDLE, trials, needle_job.tile_size(settings.niah_mode))
    return tiles


def _ride(arms: Many[Arm], prefix: int, length: int, settings: EvalSettings) -> Sequence:
    if settings.streaming:
        ids = (0,) * (prefix + length)
        read = (prefix, prefix + length - 1)
        return Sequence((), tuple(Branch(arm, ids, read, streaming=True) for arm in arms))
    read = (0, length - 1)
    return Sequence((0,) * prefix, tuple(Branch(arm, (0,) * length, read) for arm in arms))


def forecast(
    config: ModelConfig,
    specs: list[BlockSpec],
    settings: EvalSettings,
    arms: Many[Arm],
    machine: MachineRates,
) -> Forecast:
    """Plan `settings`, whose segments are a number, on `machine`.

    Raises InputError or BudgetError for what cannot run there.
    """
    longest = max(
        settings.prefix + settings.continuation if "ppl" in settings.tasks else 0,
        max(settings.niah_contexts) if "niah" in settings.tasks else 0,
    )
    check_length(config, longest, SHORTEN)
    every = placeholder_tiles(settings, arms, settings.segments or 0)
    tiles = [tile for tile in every if tile.name != NEEDLE or not settings.generates]
    width = config.num_attention_heads * config.head_dim
    shapes = [tile_shape(tile, width) for tile in tiles]
    cpu = machine.device == "cpu"
    place = Machine(
        machine.vram, machine.ram // machine.devices, element=4 if cpu else 2, cpu=cpu,
        repeats_kv=machine.repeats_kv, sharers=machine.devices,
    )  # fmt: skip
    rate = machine.gemm_flops * SWEEP_EFFICIENCY[machine.device]
    seconds = {
        name: sum(tile_flops(config, shape) for shape in shapes if shape.name == name)
        / (rate * machine.devices)
        for name in (PERPLEXITY, NEEDLE)
    }
    stored = sum(spec.stored_bytes for spec in specs)
    first_read = total = stored / machine.disk
    plans, sweeps, generation, read = [], 0, "", 0
    if tiles:
        costs = [tile_flops(config, shape) for shape in shapes]
        most = share(costs, machine.devices)[0]  # of the device with most to compute
        plans.append(make_plan(config, specs, [shapes[index] for index in most], place))
        sweeps, read = len(plans[0].sweeps), plans[0].bytes_to_read
        again = (plans[0].bytes_to_read - stored) / machine.disk
        total = max(plans[0].flops / rate, first_read + again, plans[0].bytes_to_read / machine.h2d)
    if settings.generates:
        rest = [tile for tile in every if tile.name == NEEDLE]
        found, generation = _generation(config, specs, rest, arms, machine, place, alone=not tiles)
        plans.append(found.stages[0].plan)
        read += sum(stage.plan.bytes_to_read for stage in found.stages)
        seconds[NEEDLE] = found.seconds(
            machine.device, machine.gemm_flops, machine.h2d, machine.disk
        )
        total = seconds[NEEDLE] + (total if tiles else first_read)
    return Forecast(
        plan=max(plans, key=lambda plan: plan.device_bytes),
        sweeps=sweeps,
        generation=generation,
        read_bytes=read,
        download_s=stored / machine.download,
        first_read_s=first_read,
        perplexity_s=seconds[PERPLEXITY],
        needle_s=seconds[NEEDLE],
        total_s=total,
    )


@dataclass(frozen=True)
class _Absent:
    """A model on a device that is not there: what planning asks of it."""

    config: ModelConfig
    specs: list[BlockSpec]
    machine: Machine


def _generation(
    config: ModelConfig,
    specs: list[BlockSpec],
    tiles: list[Tile],
    arms: Many[Arm],
    rates: MachineRates,
    place: Machine,
    *,
    alone: bool,
) -> tuple[Generation, str]:
    """As `eval` does it: layers over the devices if answers are all there is to do and they fit,
    else each device its share of the tiles; of those, the one with most to do."""
    whole = _Absent(config, specs, replace(place, ram=rates.ram, sharers=1))
    if alone and rates.devices > 1 and wants_layers_shared([whole]):
        try:
            found = plan_generation([whole] * rates.devices, tiles, arms)
            return found, f"layers over {rates.devices} devices, {_walks(found)}"
        except NoRoomTogether:
            pass
    mine = [tiles[index] for index in share([float(tile.rows) for tile in tiles], rates.devices)[0]]
    one = whole if rates.devices == 1 else _Absent(config, specs, place)
    found = plan_generation([one], mine, arms)
    each = " on each device" if rates.devices > 1 else ""
    return found, f"{_walks(found)}{each}"


def _walks(generation: Generation) -> str:
    kept = all(stage.on_device for stage in generation.stages)
    where = "which stay on the device" if kept else "part of which is streamed"
    return f"{generation.walks} walks over the weights, {where}"

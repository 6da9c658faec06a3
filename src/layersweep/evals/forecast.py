"""What an evaluation will take, from headers alone: the arithmetic behind `layersweep plan`."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

from layersweep.checkpoint.config import ModelConfig
from layersweep.errors import InputError
from layersweep.evals import needle_job, perplexity
from layersweep.evals.record import CONTROL_WINDOWS, NEEDLE, PERPLEXITY
from layersweep.evals.settings import EvalSettings
from layersweep.evals.shard import share
from layersweep.kv.arms import EXACT, Arm
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.plan import Plan, make_plan
from layersweep.stream.rates import SWEEP_EFFICIENCY, MachineRates
from layersweep.stream.shapes import Machine, tile_flops
from layersweep.sweep.sequences import Branch, Sequence, Tile, tiles_of
from layersweep.sweep.shapes import tile_shape

NEEDLE_BRANCH = 60  # tokens of question, answer prefix and answer


@dataclass(frozen=True)
class Forecast:
    """A plan on a machine, and seconds by job. Compute and transfer overlap: the longer counts."""

    plan: Plan
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
        tiles += tiles_of(NEEDLE, trials, needle_job.TILE_TRIALS)
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
    if longest > config.max_position_embeddings:
        raise InputError(
            f"context: found {longest} tokens, needed at most {config.max_position_embeddings}, "
            "the model's limit",
            hint="smaller --niah-context or --prefix",
        )
    tiles = placeholder_tiles(settings, arms, settings.segments or 0)
    width = config.num_attention_heads * config.head_dim
    shapes = [tile_shape(tile, width) for tile in tiles]
    cpu = machine.device == "cpu"
    place = Machine(
        machine.vram, machine.ram // machine.devices, element=4 if cpu else 2, cpu=cpu,
        repeats_kv=machine.repeats_kv, sharers=machine.devices,
    )  # fmt: skip
    costs = [tile_flops(config, shape) for shape in shapes]
    most = share(costs, machine.devices)[0]  # of the device with most to compute
    plan = make_plan(config, specs, [shapes[index] for index in most], place)
    rate = machine.gemm_flops * SWEEP_EFFICIENCY[machine.device]
    seconds = {
        name: sum(tile_flops(config, shape) for shape in shapes if shape.name == name)
        / (rate * machine.devices)
        for name in (PERPLEXITY, NEEDLE)
    }
    stored = sum(spec.stored_bytes for spec in specs)
    first_read = stored / machine.disk
    again = (plan.bytes_to_read - stored) / machine.disk
    transfer = plan.bytes_to_read / machine.h2d
    compute = plan.flops / rate
    return Forecast(
        plan=plan,
        download_s=stored / machine.download,
        first_read_s=first_read,
        perplexity_s=seconds[PERPLEXITY],
        needle_s=seconds[NEEDLE],
        total_s=max(compute, first_read + again, transfer),
    )

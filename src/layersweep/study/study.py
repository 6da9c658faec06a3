"""One evaluation before it runs: text, windows, needles, tiles and plan.

Everything that can be refused is refused here, from headers, tokenizer and text alone; `run.py`
then reads the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch

from layersweep.errors import Fallback, InputError
from layersweep.generate.generation import Generation
from layersweep.generate.plan import plan_generation
from layersweep.kv.arms import Arm, parse_arms
from layersweep.runs.finished import FinishedSweep
from layersweep.runs.record import Record, TileKey
from layersweep.runs.shard import WHOLE, Shard
from layersweep.stream.plan import Plan
from layersweep.study.fitting import arm_fallbacks, fitting_arms
from layersweep.study.gate import COPY, Card, Gate
from layersweep.study.gate_tokens import choose_tokens
from layersweep.study.meter import Meter
from layersweep.study.sizing import gemm_rate, sized_plan
from layersweep.sweep.engine import Engine
from layersweep.sweep.generic_limits import check_modules
from layersweep.sweep.model import Model
from layersweep.sweep.sequences import Tile
from layersweep.sweep.shapes import check_length, length_limit
from layersweep.sweep.streams import every_stream
from layersweep.tasks.registry import asked
from layersweep.tasks.settings import SHORTEN, EvalSettings
from layersweep.tasks.task import GeneratedTask, Source, Task
from layersweep.text.bos import resolve_bos
from layersweep.text.encoding import EncodedText
from layersweep.text.reference import with_reference
from layersweep.text.source import SourceText, load_text
from layersweep.text.tokenizer import TextTokenizer, check_ids


@dataclass
class Study:
    """A prepared evaluation: its tasks, tiles and plan.

    `tiles` are all of the study; this process computes those of its `shard`. `plan` is for the
    sweeps that are left, after those that are `done`; of these, an earlier process computed
    `resumed`. `generation` is how answers are generated, on `models`; `plan` is that of its first
    stage where nothing else is left. `left_out`: arms of `all` that do not fit. `gate_passed`: in
    this process. `gemm_flops`: FLOP/s, where it has been measured.
    """

    model: Model
    settings: EvalSettings
    text: SourceText
    tokenizer: TextTokenizer
    arms: list[Arm]
    bos_id: int | None
    tasks: list[Task]
    gate: Gate | None
    tiles: list[Tile]
    shard: Shard
    plan: Plan
    left_out: list[Fallback]
    generation: Generation | None = None
    gemm_flops: float | None = None
    text_notes: tuple[str, ...] = ()
    done: FinishedSweep = field(default_factory=lambda: FinishedSweep([]))
    resumed: list[TileKey] = field(default_factory=list)
    gate_passed: bool = False
    meter: Meter = field(default_factory=Meter)

    @cached_property
    def record(self) -> Record:
        """The numbers that the tasks fill, of all tiles."""
        numbers = {task.name: task.numbers for task in self.tasks}
        return Record([tile_key(tile) for tile in self.tiles], self.settings.seed, numbers)

    @cached_property
    def own(self) -> list[Tile]:
        """The tiles of this process."""
        return own_tiles(self.model, self.tiles, self.shard)

    @property
    def pending(self) -> list[Tile]:
        """Own tiles that no finished sweep had."""
        return [tile for tile in self.own if tile_key(tile) not in self.done.tiles]

    @property
    def complete(self) -> bool:
        """Whether all tiles of the study are done, those of other processes, too."""
        return all(tile in self.done.tiles for tile in self.record.tiles)

    @cached_property
    def generated(self) -> GeneratedTask | None:
        """The task whose answers are generated."""
        found = [task for task in self.tasks if task.generated]
        return cast(GeneratedTask, found[0]) if found else None

    @property
    def to_generate(self) -> list[Tile]:
        """Pending tiles whose answers are generated, in sweeps of their own."""
        task = self.generated
        return [tile for tile in self.pending if task and tile.name == task.name]

    @property
    def to_sweep(self) -> list[Tile]:
        """Pending tiles that are read in one sweep."""
        task = self.generated
        return [tile for tile in self.pending if not task or tile.name != task.name]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to compute here."""
        gate_done = self.gate is None or self.done.gate is not None
        return not self.pending and (bool(self.own) or gate_done)

    @property
    def models(self) -> list[Model]:
        """The model on each device, the first one's ahead."""
        return [self.model, *self.model.beside]

    @property
    def sweeping(self) -> bool:
        """Whether there is something to do before answers are generated."""
        return bool(self.to_sweep) or not self.to_generate

    @property
    def sweep_plan(self) -> Plan | None:
        """Of what is read in one sweep; None where all is generated."""
        generated = self.generation and self.plan == self.generation.stages[0].plan
        return None if generated else self.plan

    @property
    def plans(self) -> list[Plan]:
        """Of all that this process does, one after the other."""
        sweeps = [self.sweep_plan] if self.sweep_plan else []
        return [*sweeps, *([self.generation.stages[0].plan] if self.generation else [])]

    @property
    def planned_device_bytes(self) -> int:
        stages = self.generation.stages if self.generation else []
        return max(self.plan.device_bytes, *(stage.plan.device_bytes for stage in stages), 0)

    @property
    def planned_host_bytes(self) -> int:
        """On the CPU: of all stages and caches, or of the sweeps before."""
        plan, generation = self.plan, self.generation
        together = 0
        if generation:
            plans = [stage.plan for stage in generation.stages]
            together = generation.cache_bytes
            together += sum(plan.device_bytes + plan.host_bytes for plan in plans)
        return max(plan.device_bytes + plan.host_bytes, together)

    @property
    def lead(self) -> list[Tile]:
        """The gate's tile, ahead of whatever is left to sweep."""
        done = self.finished or self.gate_passed
        return [self.gate.tile()] if self.gate and not done else []

    def forget_unfinished(self) -> None:
        """Drop what a sweep that failed has left in the tasks and the gate."""
        for task in self.tasks:
            task.forget()
        if self.gate and not self.gate_passed:
            self.gate.forget()

    def resume(self, sweeps: Iterable[FinishedSweep]) -> None:
        """Continue after sweeps that `finished.unpack` has put back, and plan what is left."""
        for sweep in sweeps:
            self.done.add(sweep)
        self.resumed = list(self.done.tiles)
        if not self.finished:
            self.plan_rest()
        elif self.gate and self.done.gate:
            self.gate.restore(self.done.gate)

    def plan_rest(self, at_least: int = 1) -> None:
        """Plan what is left. `at_least`: sweeps, or units of generation."""
        if self.to_generate:
            units = 1 if self.to_sweep else min(at_least, len(self.to_generate))
            lead = [] if self.to_sweep else self.lead
            self.generation = plan_generation(self.models, self.to_generate, self.arms, units, lead)
            self.plan = self.generation.stages[0].plan
        if self.sweeping:
            tiles = [*self.lead, *self.to_sweep]
            if at_least > 1 or self.gemm_flops is None:
                self.plan = self.model.plan(tiles, at_least=at_least)
            else:
                self.plan = _plan(self.model, self.lead, self.to_sweep, self.gemm_flops)

    @property
    def fallbacks(self) -> list[Fallback]:
        """Everything that is known before the run to be done in a simpler way than wanted."""
        notes = self.tokenizer.notes
        found = [Fallback("tokenizer", "tokenizer.json", "see why", note) for note in notes]
        found += [Fallback("text", "all of it", "its head", note) for note in self.text_notes]
        model = self.model
        found += arm_fallbacks(self.arms, model.decoder, model.compute.device)
        gate = self.gate.tokens.fallbacks if self.gate else ()
        return [*self.left_out, *found, *gate, *model.compute.fallbacks]

    def open(self, say: Callable[[Fallback], None] = lambda fallback: None) -> list[Engine]:
        """Take the memory of what comes next; close it when results are in place, since giving back
        pinned memory takes a tenth of a second per GiB."""
        with self.meter.phase("memory"), ExitStack() as undo:
            if self.sweeping:
                return [self.model.open(self.plan, say)]
            assert self.generation is not None
            engines = []
            for model, stage in zip(self.models, self.generation.stages, strict=True):
                engines.append(model.open(stage.plan, say, stage.layers))
                undo.callback(engines[-1].close)
            undo.pop_all()
            return engines


def prepare_study(
    model: Model, settings: EvalSettings, *, kept: bool = False, shard: Shard = WHOLE,
    of_layers: int | None = None,
) -> Study:  # fmt: skip
    """Text, windows, needles, tiles and plan. Raises InputError for all that cannot work.

    `kept`: finished sweeps are written down, so that there should be enough of them (sizing.py).
    `of_layers`: layers of the whole model, where `model` is its beginning.
    """
    arms = parse_arms(settings.kv, growing=settings.streaming)
    if model.beside and not settings.only_generates:
        raise InputError(
            f"--device: found {1 + len(model.beside)} devices in one process, needed one: only "
            "--tasks niah --niah-mode generate shares the layers among them",
            hint="`layersweep eval --device cuda:0,cuda:1` starts a process for each",
        )
    decoder = model.checkpoint.decoder
    if not arms and settings.gate != "only":
        raise InputError(
            f"--kv: found '{settings.kv}', needed an arm besides the exact baseline",
            hint="--kv K3V2,K4V2",
        )
    check_modules(decoder, arms, generates=settings.generates)
    streams, compute = every_stream(decoder), model.compute
    for arm in arms:
        arm.check_model(of_layers or decoder.num_hidden_layers, model.checkpoint.fingerprint)
    arms, left_out = fitting_arms(arms, streams, compute.device, compute.dtype)
    tokenizer = TextTokenizer.load(model.checkpoint.folder)
    text = load_text(settings.text, model.checkpoint.source)
    bos_id = resolve_bos(tokenizer, settings.bos)
    model = with_reference(model, arms, tokenizer, bos_id)
    encoded = EncodedText(text.text, tokenizer, model.ram.bytes)
    source = Source(settings, encoded, arms, decoder, model.compute)
    kinds = [] if settings.gate == "only" else asked(settings)
    longest = max((kind.task.longest(settings) for kind in kinds), default=0)
    check_length(decoder, longest, SHORTEN)
    tasks = [kind.task.prepare(source) for kind in kinds]
    gate = None
    if settings.gate != "off" and shard.has_gate:
        count = min(COPY, length_limit(decoder)[0] // 2)
        tokens = choose_tokens(text.text, tokenizer, bos_id, count)
        check_ids(tokens.ids, decoder.vocab_size)
        half = model.compute.dtype == torch.float16
        gate = Gate(decoder, tokens, Card.beside(model.checkpoint.folder), half=half)
    lead = [gate.tile()] if gate else []
    tiles = [tile for task in tasks for tile in task.tiles()]
    gemm_flops = gemm_rate(model) if kept else None
    study = Study(
        model, settings, text, tokenizer, arms, bos_id, tasks, gate, tiles,
        shard, model.plan(lead), left_out, gemm_flops=gemm_flops, text_notes=tuple(encoded.notes),
    )  # fmt: skip
    study.plan_rest()
    return study


def tile_key(tile: Tile) -> TileKey:
    """How files name a tile."""
    return TileKey(tile.name, tile.first, len(tile.sequences))


def own_tiles(model: Model, tiles: list[Tile], shard: Shard) -> list[Tile]:
    """The tiles of one of several processes, by their operations."""
    return [tiles[index] for index in shard.choose([model.flops(tile) for tile in tiles])]


def _plan(model: Model, lead: list[Tile], tiles: list[Tile], gemm_flops: float | None) -> Plan:
    def plan_of(count: int) -> Plan:
        return model.plan([*lead, *tiles], at_least=count)

    if gemm_flops is None or not tiles:
        return plan_of(1)
    return sized_plan(plan_of, len(tiles), model.compute.device.type, gemm_flops)

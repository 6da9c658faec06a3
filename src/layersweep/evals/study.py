"""One evaluation, from settings to results: prepare, plan, sweep, summarize.

Everything that can be refused is refused in `prepare_study`, from headers, tokenizer and
text alone. `run_study` then reads the weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from layersweep.checkpoint.config import ModelConfig
from layersweep.errors import Fallback, GateError, InputError
from layersweep.evals.gate import Card, Gate
from layersweep.evals.meter import Meter
from layersweep.evals.needle import make_trials
from layersweep.evals.needle_job import NAME as NEEDLE
from layersweep.evals.needle_job import NeedleJob
from layersweep.evals.perplexity import NAME as PERPLEXITY
from layersweep.evals.perplexity import PerplexityJob
from layersweep.evals.settings import EvalSettings
from layersweep.evals.text import SourceText, load_text
from layersweep.evals.tokenizer import TextTokenizer, check_ids
from layersweep.evals.windows import cut_windows, resolve_bos
from layersweep.kv.arms import EXACT, Arm, parse_arms
from layersweep.kv.codec import check_stream
from layersweep.kv.stream import keys_and_values
from layersweep.probes import TILE_ROWS, cpu_gemm_rate, cuda_gemm_rate
from layersweep.stream.plan import Plan
from layersweep.stream.shapes import CPU_EXPERT_ROWS
from layersweep.sweep.attention import BranchCache
from layersweep.sweep.loop import Engine, Progress, SweepRecord, run_sweep
from layersweep.sweep.model import Model
from layersweep.sweep.sequences import Sequence, Tile

Caches = dict[tuple[int, int, int], BranchCache]


SLOW = "on a CPU it needs numba; on a GPU kernels are for 1 to 4 bits and need NVRTC"


@dataclass
class Study:
    """A prepared evaluation: its jobs, tiles and plan."""

    model: Model
    settings: EvalSettings
    text: SourceText
    tokenizer: TextTokenizer
    arms: list[Arm]
    bos_id: int | None
    perplexity: PerplexityJob | None
    needle: NeedleJob | None
    gate: Gate | None
    tiles: list[Tile]
    plan: Plan
    meter: Meter = field(default_factory=Meter)

    @property
    def fallbacks(self) -> list[Fallback]:
        """Everything that is known before the run to be done in a simpler way than wanted."""
        notes = self.tokenizer.notes
        found = [Fallback("tokenizer", "tokenizer.json", "see why", note) for note in notes]
        device = self.model.compute.device
        found += [
            Fallback(f"encoder of {arm.name}", "a compiled search", "plain torch, slower", SLOW)
            for arm in self.arms
            if arm.method == "trellis" and arm.encoder_on(device) == "torch"
        ]
        return [*found, *self.model.compute.fallbacks]

    def open(self, say: Callable[[Fallback], None] = lambda fallback: None) -> Engine:
        """Take the plan's memory, and measure the bus; close it when results are in place, since
        giving back pinned memory takes a tenth of a second per GiB."""
        with self.meter.phase("memory"):
            return self.model.open(self.plan, say)


@dataclass
class Outcome:
    """What the sweeps of a study left; the summary is made from this."""

    sweeps: int = 0
    gate_sweeps: int = 0
    cache_bits: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    h2d_bytes: int = 0
    copy_s: float = 0.0
    stall_s: float = 0.0
    h2d_rate: float | None = None
    started: float = 0.0
    sweep_s: float = 0.0
    peak_device_bytes: int = 0
    host_pinned: bool = True
    fallbacks: list[Fallback] = field(default_factory=list)
    gemm_flops: float | None = None


def prepare_study(model: Model, settings: EvalSettings) -> Study:
    """Text, windows, needles, tiles and plan. Raises InputError for all that cannot work."""
    arms = parse_arms(settings.kv)
    config = model.checkpoint.config
    if not arms and settings.gate != "only":
        raise InputError(
            f"--kv: found '{settings.kv}', needed an arm besides the exact baseline",
            hint="--kv K3V2,K4V2",
        )
    streams = keys_and_values(config.num_key_value_heads, config.head_dim)
    for arm, stream in product(arms, streams):
        if arm.codec is not None:
            check_stream(arm.codec, stream, model.compute.device, model.compute.dtype)
    tokenizer = TextTokenizer.load(model.checkpoint.folder)
    text = load_text(settings.text, model.checkpoint.source)
    bos_id = resolve_bos(tokenizer, settings.bos)
    tasks = () if settings.gate == "only" else settings.tasks
    perplexity = needle = None
    if "ppl" in tasks:
        perplexity = _perplexity(settings, tokenizer, text.text, arms, model)
    if "niah" in tasks:
        needle = _needle(settings, tokenizer, text.text, arms, config)
    gate = None
    if settings.gate != "off":
        ids = tokenizer.encode(text.text[:8192])
        check_ids(ids, config.vocab_size)
        half = model.compute.dtype == torch.float16
        gate = Gate(config, ids, bos_id, _card(model.checkpoint.folder), half=half)
    tiles = perplexity.tiles() if perplexity else []
    if needle and not settings.generates:
        tiles += needle.tiles()
    lead = [gate.tile()] if gate else []
    _check_sliding_window(config.sliding_window, [*lead, *tiles])
    plan = model.plan([*lead, *tiles])
    return Study(
        model, settings, text, tokenizer, arms, bos_id, perplexity, needle, gate, tiles, plan
    )


def _check_sliding_window(window: int | None, tiles: list[Tile]) -> None:
    """Attention here sees the whole past: a sliding window may not be shorter than that."""
    longest = max((s.longest for tile in tiles for s in tile.sequences), default=0)
    if window is not None and longest > window:
        raise InputError(
            f"config.json: found sliding_window {window}, needed at least {longest}, the longest "
            "sequence, or none",
            hint=f"smaller --prefix and --niah-context: up to {window} tokens",
        )


def run_study(
    study: Study,
    engine: Engine | None = None,
    *,
    progress: Progress = lambda phase, done, total: None,
    finished_sweep: Callable[[list[Tile]], None] = lambda tiles: None,
    gemm_flops: float | None = None,
) -> Outcome:
    """Run the sweeps. Raises GateError when the gate or the baseline fails.

    `engine`: from `study.open`, whose memory the caller gives back; by default one of its own.
    `finished_sweep(tiles)` is called as each sweep's results are complete. `gemm_flops`: the
    machine's rate where it has been measured, else it is measured.
    """
    if engine is None:
        with closing(study.open()) as own:
            return run_study(study, own, progress=progress, finished_sweep=finished_sweep,
                             gemm_flops=gemm_flops)  # fmt: skip
    with study.meter.phase("ceiling"):
        outcome = Outcome(gemm_flops=gemm_flops or _gemm_rate(study.model))
        outcome.h2d_rate = engine.store.measure_h2d()
    try:
        with study.meter:
            outcome.started = time.perf_counter()
            _sweep_tiles(study, outcome, engine, progress, finished_sweep)
            if study.needle and study.settings.generates:
                _generate(study, outcome, engine, progress)
                finished_sweep([])
            outcome.sweep_s = time.perf_counter() - outcome.started
    finally:
        _account(study.model, outcome, engine)
    if study.gate:
        study.gate.check_peak(*_peaks(study, outcome))
    return outcome


def _account(model: Model, outcome: Outcome, engine: Engine) -> None:
    """Take over what the engine counted."""
    store = engine.store
    outcome.bytes_read, outcome.h2d_bytes = store.bytes_read, store.h2d_bytes
    outcome.copy_s, outcome.stall_s = store.copy_s, store.stall_s
    outcome.host_pinned, outcome.fallbacks = store.host_pinned, store.fallbacks
    if not model.cpu:
        reserved = torch.cuda.max_memory_reserved(model.compute.device)
        outcome.peak_device_bytes = reserved + model.context_bytes


def _gemm_rate(model: Model) -> float:
    """FLOP/s of this machine on the expert's own product, the ceiling that a run is held to."""
    config = model.checkpoint.config
    if model.cpu:
        shape = (CPU_EXPERT_ROWS, config.hidden_size, 2 * config.intermediate_size)
        return cpu_gemm_rate(shape)
    shape = (TILE_ROWS, config.hidden_size, 2 * config.intermediate_size)
    return cuda_gemm_rate(str(model.compute.device), shape, 0.3)


def _peaks(study: Study, outcome: Outcome) -> tuple[int, int]:
    """Measured and planned peak: of the device, or of what a CPU run adds to the host."""
    plan = study.plan
    if study.model.cpu:
        grown = study.meter.peak_bytes - study.meter.start_bytes
        return grown, plan.device_bytes + plan.host_bytes
    return outcome.peak_device_bytes, plan.device_bytes


def _sweep_tiles(
    study: Study,
    outcome: Outcome,
    engine: Engine,
    progress: Progress,
    finished_sweep: Callable[[list[Tile]], None],
) -> None:
    lead = [study.gate.tile()] if study.gate else []
    tiles = [*lead, *study.tiles]
    for number, sweep in enumerate(study.plan.sweeps):
        some = [tiles[index] for index in sweep if index >= len(lead)]
        first = number == 0 and bool(lead)
        record = run_sweep(
            engine,
            some,
            lambda *what: _read(study, *what),
            lead=lead[0] if first else None,
            check=study.gate.check_layer if first and study.gate else None,
            progress=progress,
        )
        outcome.sweeps += bool(some)
        outcome.gate_sweeps += not some
        _take(study, outcome, some, record)
        finished_sweep(some)


def _read(study: Study, tile: Tile, number: int, sequence: Sequence, logits: list[Tensor]) -> None:
    if tile.name == PERPLEXITY and study.perplexity:
        study.perplexity.read(tile, number, sequence, logits)
    elif tile.name == NEEDLE and study.needle:
        study.needle.read(tile, number, sequence, logits)
    elif study.gate:
        study.gate.check_logits(logits[0])


def _generate(study: Study, outcome: Outcome, engine: Engine, progress: Progress) -> None:
    assert study.needle is not None

    def run(tiles: list[Tile], read: Callable[..., None], caches: Caches) -> None:
        record = run_sweep(engine, tiles, read, caches=caches, progress=progress)
        outcome.sweeps += 1
        _take(study, outcome, tiles, record)

    study.needle.generate(run)


def _take(study: Study, outcome: Outcome, tiles: list[Tile], record: SweepRecord) -> None:
    """Add a sweep's record; a baseline that became non-finite ends the run."""
    for phase, seconds in record.seconds.items():
        study.meter.phases[phase] = study.meter.phases.get(phase, 0.0) + seconds
    with study.meter.phase("results to the host"):
        if study.perplexity:
            study.perplexity.settle()
        if study.needle:
            study.needle.settle()
    for key, counted in record.cache_bits.items():
        total = outcome.cache_bits.setdefault(key, [0.0, 0.0])
        total[0] += counted[0]
        total[1] += counted[1]
    for (tile_index, sequence, branch), layer in record.nonfinite.items():
        tile = tiles[tile_index]
        if branch <= 0:
            raise GateError(
                f"{tile.name} {tile.first + sequence}: the exact baseline is not finite from "
                f"layer {layer} on",
                hint="try --dtype bfloat16 or float32; see diagnosis.json for the layer",
            )
        if branch <= len(study.arms):
            name = study.arms[branch - 1].name
            outcome.nonfinite[name] = min(layer, outcome.nonfinite.get(name, layer))
    _check_baseline(study, tiles)


def _check_baseline(study: Study, tiles: list[Tile]) -> None:
    """Hidden states can be finite and the head's logits not: the baseline's losses say so."""
    for tile in tiles:
        if tile.name != PERPLEXITY or study.perplexity is None:
            continue
        losses = study.perplexity.nll[EXACT.name][tile.first : tile.first + len(tile.sequences)]
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise GateError(
                    f"perplexity {tile.first + offset}: the exact baseline's loss is {loss}, "
                    "needed a finite number (its hidden states are finite, the head's logits not)",
                    hint="try --dtype bfloat16 or float32",
                )


def _perplexity(
    settings: EvalSettings,
    tokenizer: TextTokenizer,
    text: str,
    arms: list[Arm],
    model: Model,
) -> PerplexityJob:
    config = model.checkpoint.config
    limit = config.max_position_embeddings
    length = settings.prefix + settings.continuation
    if length > limit:
        raise InputError(
            f"--prefix {settings.prefix} + --continuation {settings.continuation}: found {length} "
            f"tokens, needed at most {limit}, the model's limit",
            hint=f"--prefix {max(1, limit - settings.continuation)}",
        )
    windows = cut_windows(
        text, tokenizer, segments=settings.segments, prefix=settings.prefix,
        continuation=settings.continuation, bos=settings.bos,
    )  # fmt: skip
    for window in windows:
        check_ids(window.ids, config.vocab_size)
    return PerplexityJob(windows, arms, settings.streaming, model.compute.ops.score_branches)


def _needle(
    settings: EvalSettings,
    tokenizer: TextTokenizer,
    text: str,
    arms: list[Arm],
    config: ModelConfig,
) -> NeedleJob:
    trials = make_trials(
        text, tokenizer, contexts=settings.niah_contexts, depths=settings.niah_depths,
        per_depth=settings.niah_per_depth, keys=settings.niah_keys, bos=settings.bos,
        seed=settings.seed, max_context=config.max_position_embeddings,
    )  # fmt: skip
    for trial in trials:
        check_ids(trial.prefix_ids, config.vocab_size)
        check_ids(trial.branch_ids, config.vocab_size)
    return NeedleJob(
        trials, arms, tokenizer, settings.streaming, settings.niah_contexts, settings.niah_keys,
        settings.niah_mode,
    )  # fmt: skip


def _card(folder: Path) -> Card | None:
    """What a bundled model's card promises; a file of that name may be somebody else's."""
    path = folder / "card.json"
    try:
        gate = json.loads(path.read_text("utf-8"))["gate"]
        return Card(str(gate["tokens_sha"]), float(gate["nll"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None

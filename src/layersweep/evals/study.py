"""One evaluation, from settings to results: prepare, plan, sweep, summarize.

Everything that can be refused is refused in `prepare_study`, from headers, tokenizer and
text alone. `run_study` then reads the weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from layersweep.checkpoint.config import ModelConfig
from layersweep.errors import GateError, InputError
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
from layersweep.probes import cpu_gemm_rate
from layersweep.stream.plan import CPU_EXPERT_ROWS, Plan
from layersweep.stream.store import BlockStore
from layersweep.sweep.attention import BranchCache
from layersweep.sweep.loop import Progress, SweepRecord, run_sweep
from layersweep.sweep.model import Model
from layersweep.sweep.sequences import Sequence, Tile

Caches = dict[tuple[int, int, int], BranchCache]


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
    def fallbacks(self) -> list[tuple[str, str, str, str]]:
        """(what, wanted, used, why) of everything done in a simpler way than wanted."""
        found = [("tokenizer", "tokenizer.json", "see why", note) for note in self.tokenizer.notes]
        if not self.model.cpu:
            why = "this version copies each block when it has been read"
            found.append(("host", "pinned", "pageable", why))
        return found


@dataclass
class Outcome:
    """What the sweeps of a study left; the summary is made from this."""

    sweeps: int = 0
    gate_sweeps: int = 0
    cache_bits: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    wait_s: float = 0.0
    wall_s: float = 0.0
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
    tokenizer = TextTokenizer.load(model.checkpoint.folder)
    text = load_text(settings.text, model.checkpoint.source)
    bos_id = resolve_bos(tokenizer, settings.bos)
    tasks = () if settings.gate == "only" else settings.tasks
    perplexity = needle = None
    if "ppl" in tasks:
        perplexity = _perplexity(settings, tokenizer, text.text, arms, config)
    if "niah" in tasks:
        needle = _needle(settings, tokenizer, text.text, arms, config)
    gate = None
    if settings.gate != "off":
        ids = tokenizer.encode(text.text[:8192])
        check_ids(ids, config.vocab_size)
        gate = Gate(config, ids, bos_id, _card(model.checkpoint.folder))
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
    *,
    progress: Progress = lambda phase, done, total: None,
    finished_sweep: Callable[[list[Tile]], None] = lambda tiles: None,
) -> Outcome:
    """Run the sweeps. Raises GateError when the gate or the baseline fails.

    `finished_sweep(tiles)` is called as each sweep's results are complete.
    """
    outcome = Outcome(gemm_flops=_gemm_rate(study.model))
    started = time.perf_counter()
    store = study.model.open_store(study.plan)
    try:
        with study.meter, study.meter.phase("sweeps"):
            _sweep_tiles(study, outcome, store, progress, finished_sweep)
            if study.needle and study.settings.generates:
                _generate(study, outcome, store, progress)
                finished_sweep([])
    finally:
        outcome.bytes_read, outcome.wait_s = store.bytes_read, store.wait_s
        outcome.wall_s = time.perf_counter() - started
        store.close()
    if study.gate:
        grown = study.meter.peak_bytes - study.meter.start_bytes
        study.gate.check_peak(grown, _planned_growth(study))
    return outcome


def _gemm_rate(model: Model) -> float | None:
    """FLOP/s of this machine on the expert's own product, the ceiling that a run is held to."""
    config = model.checkpoint.config
    if not model.cpu:
        return None
    return cpu_gemm_rate((CPU_EXPERT_ROWS, config.hidden_size, 2 * config.intermediate_size))


def _planned_growth(study: Study) -> int:
    """Host bytes that a CPU run may add: working set, ring and what stays resident."""
    plan = study.plan
    return plan.device_bytes + plan.ring_bytes + plan.resident_bytes


def _sweep_tiles(
    study: Study,
    outcome: Outcome,
    store: BlockStore,
    progress: Progress,
    finished_sweep: Callable[[list[Tile]], None],
) -> None:
    lead = [study.gate.tile()] if study.gate else []
    tiles = [*lead, *study.tiles]
    for number, sweep in enumerate(study.plan.sweeps):
        some = [tiles[index] for index in sweep if index >= len(lead)]
        first = number == 0 and bool(lead)
        record = run_sweep(
            study.model.checkpoint.config,
            store,
            study.model.numerics,
            some,
            lambda *what: _read(study, *what),
            lead=lead[0] if first else None,
            check=study.gate.check_layer if first and study.gate else None,
            progress=progress,
        )
        outcome.sweeps += bool(some)
        outcome.gate_sweeps += not some
        _take(study, outcome, some, record)
        _check_baseline(study, some)
        finished_sweep(some)


def _read(study: Study, tile: Tile, number: int, sequence: Sequence, logits: list[Tensor]) -> None:
    if tile.name == PERPLEXITY and study.perplexity:
        study.perplexity.read(tile, number, sequence, logits)
    elif tile.name == NEEDLE and study.needle:
        study.needle.read(tile, number, sequence, logits)
    elif study.gate:
        study.gate.check_logits(logits[0])


def _generate(study: Study, outcome: Outcome, store: BlockStore, progress: Progress) -> None:
    assert study.needle is not None
    config, numerics = study.model.checkpoint.config, study.model.numerics

    def run(tiles: list[Tile], read: Callable[..., None], caches: Caches) -> None:
        record = run_sweep(config, store, numerics, tiles, read, caches=caches, progress=progress)
        outcome.sweeps += 1
        _take(study, outcome, tiles, record)

    study.needle.generate(run)


def _take(study: Study, outcome: Outcome, tiles: list[Tile], record: SweepRecord) -> None:
    """Add a sweep's record; a baseline that became non-finite ends the run."""
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
    config: ModelConfig,
) -> PerplexityJob:
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
    return PerplexityJob(windows, arms, settings.streaming)


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

"""From a finished study to results.json (`layersweep.results/1`)."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np

from layersweep.environment import device_facts, versions
from layersweep.evals.finished import Part
from layersweep.evals.perplexity import NAME as PERPLEXITY
from layersweep.evals.perplexity import TILE_SEGMENTS
from layersweep.evals.run import Outcome
from layersweep.evals.study import Study
from layersweep.evals.summary import reasons_not_publishable, summarize_needle, summarize_perplexity
from layersweep.kv.cache import bits_per_element
from layersweep.stream.rates import planned_seconds

Json = dict[str, Any]

SCHEMA = "layersweep.results/1"
METRICS_VERSION = 2


def build_results(study: Study, outcome: Outcome, *, status: str, command: str) -> Json:
    """The whole object. `status`: "complete" or "gate_failed" (then nothing was measured)."""
    perplexity = needle = None
    measured = status == "complete"
    with study.meter.phase("statistics"):
        if measured and study.perplexity:
            perplexity = summarize_perplexity(
                study.perplexity.measurements(
                    _bits(study, outcome),
                    _nonfinite(study, outcome),
                    study.settings.seed,
                    study.model.compute.device,
                )
            )
        if measured and study.needle:
            needle = summarize_needle(study.needle.measurements())
    checkpoint = study.model.checkpoint
    reasons = reasons_not_publishable(
        status=status,
        weights="synthetic" if checkpoint.config.synthetic else checkpoint.weights_kind,
        perplexity=perplexity,
        needle=needle,
    )
    return {
        "schema": SCHEMA,
        "metrics_version": METRICS_VERSION,
        "status": status,
        "publishable": not reasons,
        "reasons": reasons,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
        "versions": dict(versions()),
        "device": device_facts(str(study.model.compute.device)),
        "paths": _paths(study, outcome),
        "fallbacks": [fallback._asdict() for fallback in (*study.fallbacks, *outcome.fallbacks)],
        "model": model_section(study),
        "protocol": _protocol(study),
        "gate": study.gate.report() if study.gate else None,
        "perplexity": perplexity,
        "needle": needle,
        "performance": _performance(study, outcome),
    }


def model_section(study: Study) -> Json:
    checkpoint = study.model.checkpoint
    config = checkpoint.config
    kind = checkpoint.weights_kind
    if study.model.weights == "nf4" and kind != "nf4":
        kind = f"nf4 made from {kind} while reading"
    return {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "fingerprint": checkpoint.fingerprint,
        "architecture": config.architecture,
        "layers": config.num_hidden_layers,
        "experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "weights": "synthetic" if config.synthetic else kind,
        "router": checkpoint.router_kind,
        "bytes": checkpoint.nbytes,
    }


def _paths(study: Study, outcome: Outcome) -> Json:
    """The implementation of each job, and where weights came from."""
    host = study.plan.host if outcome.host_pinned or study.model.cpu else "pageable"
    return asdict(study.model.paths) | {"host": host}


def _bits(study: Study, outcome: Outcome) -> dict[str, float | None]:
    """Measured bits per element of each arm's caches on the perplexity windows; None where
    nothing was measured, or somebody's own codec does not say what it stores."""
    found: dict[str, float | None] = {}
    for arm in study.arms:
        bits, elements = outcome.done.cache_bits.get((PERPLEXITY, arm.name), [0.0, 0.0])
        found[arm.name] = _number(bits_per_element(bits, elements)) if elements else None
    return found


def _nonfinite(study: Study, outcome: Outcome) -> set[str]:
    """Arms with a non-finite hidden state or score anywhere."""
    assert study.perplexity is not None
    scores = study.perplexity.nll.items()
    return set(outcome.done.nonfinite) | {
        name for name, nll in scores if not np.isfinite(nll).all()
    }


def _protocol(study: Study) -> Json:
    settings, model = study.settings, study.model
    job = study.perplexity
    dtype = str(model.compute.dtype).removeprefix("torch.")
    needle = None
    if study.needle:
        needle = {
            "contexts": list(settings.niah_contexts),
            "depths": list(settings.niah_depths),
            "per_depth": settings.niah_per_depth,
            "keys": settings.niah_keys,
            "mode": settings.niah_mode,
        }
    return {
        "text_source": study.text.source,
        "text_sha256": study.text.sha256,
        "tokenizer_sha256": study.tokenizer.sha256,
        "bos": settings.bos,
        "bos_id": study.bos_id,
        "segments": len(job.windows) if job else None,
        "prefix": settings.prefix if job else None,
        "continuation": settings.continuation if job else None,
        "scored_tokens": len(job.windows) * (settings.continuation - 1) if job else None,
        "cache_mode": settings.cache_mode,
        "windows": job.windows[0].possible if job else None,
        "exact_pair_fraction": exact_pair_fraction(settings.prefix, settings.continuation)
        if job and not settings.streaming
        else (0.0 if job else None),
        "seed": settings.seed,
        "dtype": dtype,
        "kv_dtype": dtype,
        "router_dtype": dtype if model.router_dtype == "hidden" else "float32",
        "tile_segments": TILE_SEGMENTS if job else None,
        "weights": model.weights,
        "niah": needle,
    }


def exact_pair_fraction(prefix: int, continuation: int) -> float:
    """Share of the (query, key) pairs of a scored continuation whose key is not quantized."""
    queries = continuation - 1
    own = queries * (queries + 1) // 2
    return own / (own + queries * prefix)


def _performance(study: Study, outcome: Outcome) -> Json:
    """Ratios compare with the rates measured in this run. wall_s: from the first weight byte
    asked for until here, with results.json still to be written."""
    plan, model = study.plan, study.model
    swept = [tile for tile in study.tiles if Part.of(tile) not in study.resumed]
    grown = study.meter.peak_bytes - study.meter.start_bytes
    sweep_s, ceiling = outcome.sweep_s, outcome.gemm_flops
    return {
        "wall_s": time.perf_counter() - outcome.started if outcome.started else 0.0,
        "phases": dict(study.meter.phases),
        "sweeps": outcome.sweeps,
        "gate_sweeps": outcome.gate_sweeps,
        "weight_bytes_read": outcome.bytes_read,
        "h2d_bytes": outcome.h2d_bytes,
        "tokens": sum(tile.rows for tile in swept),
        "resumed_tiles": len(study.tiles) - len(swept),
        "flops": plan.flops,
        "achieved_tflops": plan.flops / sweep_s / 1e12 if sweep_s else None,
        "gemm_ceiling_tflops": ceiling / 1e12 if ceiling else None,
        "mfu": plan.flops / sweep_s / ceiling if ceiling and sweep_s else None,
        "h2d_gbps": outcome.h2d_bytes / outcome.copy_s / 1e9 if outcome.copy_s else None,
        "compute_stall_fraction": min(1.0, outcome.stall_s / sweep_s) if sweep_s else None,
        "peak_device_bytes": max(0, grown - plan.host_bytes)
        if model.cpu
        else outcome.peak_device_bytes,
        "peak_host_bytes": study.meter.peak_bytes,
        "planned_device_bytes": plan.device_bytes,
        "planned_s": planned_seconds(plan, model.compute.device.type, ceiling, outcome.h2d_rate)
        if ceiling
        else None,
        "vram_budget": model.vram.bytes,
        "ram_budget": model.ram.bytes,
    }


def segment_lines(study: Study, first: int, count: int) -> list[Json]:
    """Lines of segments.jsonl for `count` finished windows from `first` on."""
    job = study.perplexity
    assert job is not None
    return [
        {
            "index": window.index,
            "tokens_sha": window.tokens_sha,
            "nll": {arm: _number(nll[window.index]) for arm, nll in job.nll.items()},
        }
        for window in job.windows[first : first + count]
    ]


def needle_lines(study: Study, first: int, count: int) -> list[Json]:
    """Lines of needle.jsonl for `count` finished trials from `first` on."""
    job = study.needle
    assert job is not None
    return [
        {
            "id": trial.id,
            "answer": trial.answer,
            "correct": {arm: hits[trial.id] for arm, hits in job.correct.items()},
            "outputs": {arm: texts[trial.id] for arm, texts in job.outputs.items()},
        }
        for trial in job.trials[first : first + count]
    ]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

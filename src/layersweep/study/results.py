"""From a finished study to results.json (`layersweep.results/2`)."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from layersweep.environment import device_facts, versions
from layersweep.runs.sections import measured_sections, now, verdict
from layersweep.runs.versions import METRICS_VERSION, SCHEMA
from layersweep.stream.rates import planned_seconds
from layersweep.study.run import Outcome
from layersweep.study.study import Study, tile_key
from layersweep.sweep.model import Model
from layersweep.tasks.registry import TASKS

Json = dict[str, Any]


def build_results(
    study: Study, outcome: Outcome, *, command: str, gate_failed: bool = False
) -> Json:
    """The whole object. A task is summarized once all of its tiles are done: until then, and in one
    process of several, the status is "partial"."""
    status = "complete" if study.complete else "partial"
    if gate_failed:
        status = "gate_failed"
    with study.meter.phase("statistics"):
        measured = measured_sections(study.record, study.done)
    return {
        "schema": SCHEMA,
        "metrics_version": METRICS_VERSION,
        "status": status,
        **verdict(status, study.record, study.done, measured, weights_of(study.model)),
        "created": now(),
        "command": command,
        "versions": dict(versions()),
        "device": device_facts(str(study.model.compute.device)),
        "paths": _paths(study, outcome),
        "fallbacks": [fallback._asdict() for fallback in (*study.fallbacks, *outcome.fallbacks)],
        "model": model_section(study.model),
        "protocol": _protocol(study),
        "gate": study.gate.report() if study.gate else None,
        **measured,
        "performance": _performance(study, outcome),
    }


def weights_of(model: Model) -> str:
    """What the weights are, in the words of results.json."""
    checkpoint = model.checkpoint
    kind = checkpoint.weights_kind
    if model.weights == "nf4" and kind != "nf4":
        kind = f"nf4 made from {kind} while reading"
    return "synthetic" if checkpoint.decoder.synthetic else kind


def model_section(model: Model) -> Json:
    checkpoint = model.checkpoint
    decoder = checkpoint.decoder
    return {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "fingerprint": checkpoint.fingerprint,
        "architecture": decoder.architecture,
        "layers": decoder.num_hidden_layers,
        "experts": decoder.num_experts,
        "experts_per_token": decoder.experts_per_token,
        "weights": weights_of(model),
        "router": checkpoint.router_kind,
        "bytes": checkpoint.nbytes,
    }


def _paths(study: Study, outcome: Outcome) -> Json:
    """The implementation of each job, and where weights came from."""
    host = study.plan.host if outcome.host_pinned or study.model.cpu else "pageable"
    return asdict(study.model.paths) | {"host": host}


def _protocol(study: Study) -> Json:
    """How it was measured. A task's own keys are null where it was not asked for."""
    settings, model = study.settings, study.model
    dtype = str(model.compute.dtype).removeprefix("torch.")
    own: Json = {key: None for kind in TASKS for key in kind.protocol}
    for task in study.tasks:
        own |= task.protocol()
    return {
        "text_source": study.text.source,
        "text_sha256": study.text.sha256,
        "tokenizer_sha256": study.tokenizer.sha256,
        "bos": settings.bos,
        "bos_id": study.bos_id,
        "cache_mode": settings.cache_mode,
        "seed": settings.seed,
        "dtype": dtype,
        "kv_dtype": dtype,
        "router_dtype": dtype if model.router_dtype == "hidden" else "float32",
        "weights": model.weights,
        **own,
    }


def _planned_seconds(study: Study, gemm_flops: float, h2d: float | None) -> float:
    kind, generation = study.model.compute.device.type, study.generation
    seconds = generation.seconds(kind, gemm_flops, h2d) if generation else 0.0
    if study.sweep_plan:
        seconds += planned_seconds(study.sweep_plan, kind, gemm_flops, h2d)
    return seconds


def _performance(study: Study, outcome: Outcome) -> Json:
    """Ratios compare with the rates measured in this run. wall_s: from the first weight byte
    asked for until here, with results.json still to be written."""
    model = study.model
    flops = sum(plan.flops for plan in study.plans)
    swept = [tile for tile in study.own if tile_key(tile) not in study.resumed]
    grown = study.meter.peak_bytes - study.meter.start_bytes
    sweep_s, ceiling = outcome.sweep_s, outcome.gemm_flops
    return {
        "wall_s": time.perf_counter() - outcome.started if outcome.started else 0.0,
        "phases": dict(study.meter.phases),
        "sweeps": outcome.sweeps,
        "gate_sweeps": outcome.gate_sweeps,
        "weight_bytes_read": outcome.bytes_read,
        "h2d_bytes": outcome.h2d_bytes,
        "moved_bytes": outcome.moved_bytes,
        "tokens": sum(tile.rows for tile in swept),
        "resumed_tiles": len(study.own) - len(swept),
        "flops": flops,
        "achieved_tflops": flops / sweep_s / 1e12 if sweep_s else None,
        "gemm_ceiling_tflops": ceiling / 1e12 if ceiling else None,
        "mfu": flops / sweep_s / ceiling if ceiling and sweep_s else None,
        "h2d_gbps": outcome.h2d_bytes / outcome.copy_s / 1e9 if outcome.copy_s else None,
        "compute_stall_fraction": min(1.0, outcome.stall_s / sweep_s) if sweep_s else None,
        "peak_device_bytes": max(0, grown - study.plan.host_bytes)
        if model.cpu
        else outcome.peak_device_bytes,
        "peak_host_bytes": study.meter.peak_bytes,
        "planned_device_bytes": study.planned_device_bytes,
        "planned_s": _planned_seconds(study, ceiling, outcome.h2d_rate) if ceiling else None,
        "vram_budget": model.vram.bytes,
        "ram_budget": model.ram.bytes,
    }

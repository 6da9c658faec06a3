"""A whole results.json from a seeded simulation: nothing in it was measured or copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from layersweep.runs.sections import reasons_not_publishable
from layersweep.runs.versions import METRICS_VERSION, SCHEMA
from layersweep.tasks.arms import ArmInfo
from layersweep.tasks.needle.measurements import NeedleMeasurements, TrialInfo
from layersweep.tasks.needle.summary import summarize_needle
from layersweep.tasks.perplexity.measurements import (
    ControlMeasurement,
    PerplexityMeasurements,
    WindowInfo,
)
from layersweep.tasks.perplexity.summary import summarize_perplexity

SCORED = 511


@dataclass(frozen=True)
class SimulatedArm:
    """`effect`: true mean delta in nats. `hit`: share of needles kept."""

    method: str
    key_bits: int
    value_bits: int
    effect: float
    bits: float
    simulated: bool
    hit: float

    @property
    def name(self) -> str:
        return f"{self.method}:K{self.key_bits}V{self.value_bits}"


STUDY = (
    SimulatedArm("lloyd", 3, 2, 0.0052, 2.69, False, 0.99),
    SimulatedArm("lloyd", 4, 2, 0.0036, 3.19, False, 0.995),
    SimulatedArm("e8", 3, 2, 0.0087, 2.95, True, 0.95),
    SimulatedArm("e8", 4, 2, 0.0059, 3.42, True, 0.98),
)


def simulate_perplexity(
    *, windows: int = 80, arms: tuple[SimulatedArm, ...] = STUDY, seed: int = 7
) -> PerplexityMeasurements:
    """Windows in articles of 1-6; deltas share an article effect, as neighbours do in real text."""
    rng = np.random.default_rng(seed)
    articles = np.repeat(np.arange(windows), rng.integers(1, 7, windows))[:windows]
    base = 1.46 + 0.12 * rng.standard_normal(windows)
    shared = 0.0012 * rng.standard_normal(windows)[articles]
    nll, kl, top1 = {"exact": base}, {}, {}
    for arm in arms:
        own = 0.0022 * rng.standard_normal(windows)
        nll[arm.name] = base + arm.effect + (shared + own) * (arm.effect / 0.005) ** 0.5
        sample = rng.lognormal(np.log(arm.effect / 6), 1.9, (windows, SCORED))
        kl[arm.name] = sample.astype(np.float32)
        top1[arm.name] = 1.0 - 4.0 * arm.effect
    controls = {"exact": ControlMeasurement(np.zeros(4), np.zeros((4, SCORED), np.float32))}
    for method in dict.fromkeys(arm.method for arm in arms):
        controls[f"identity:{method}"] = ControlMeasurement(
            2e-5 * rng.standard_normal(4), np.full((4, SCORED), 3e-9, np.float32)
        )
    return PerplexityMeasurements(
        windows=[
            WindowInfo(index, f"Article {article}", f"{index:04d}{seed:04d}" * 8)
            for index, article in enumerate(articles)
        ],
        arms=[_info(arm) for arm in arms],
        nll=nll,
        kl=kl,
        top1=top1,
        bits_per_element={arm.name: arm.bits for arm in arms},
        kv_bytes={"exact": _kv_bytes(16)} | {arm.name: _kv_bytes(arm.bits) for arm in arms},
        controls=controls,
        status={arm.name: "ok" for arm in arms},
        seed=seed,
    )


def simulate_needle(
    *,
    per_depth: int = 6,
    contexts: tuple[int, ...] = (4096,),
    arms: tuple[SimulatedArm, ...] = STUDY,
    baseline: float = 0.97,
    mode: str = "teacher",
    seed: int = 11,
) -> NeedleMeasurements:
    """Ten depths per context; an arm loses a needle with probability 1 - hit, rarely gains one."""
    rng = np.random.default_rng(seed)
    depths = [round(float(depth), 2) for depth in np.linspace(0.05, 0.95, 10)]
    places = [(c, d) for c in contexts for d in depths for _ in range(per_depth)]
    trials = [
        TrialInfo(
            id=f"{seed}-{index}",
            context=context,
            depth=depth,
            achieved_depth=float(np.clip(depth + rng.normal(0, 0.004), 0, 1)),
            key=f"amber-{('otter', 'lantern', 'harbor', 'maple')[index % 4]}",
            answer=f"{rng.integers(10**6, 10**7)}",
            haystack_begin=16 * max(contexts) * index,  # far apart: four characters a token
            haystack_end=16 * max(contexts) * index + 4 * context,
        )
        for index, (context, depth) in enumerate(places)
    ]
    exact = rng.random(len(trials)) < baseline
    correct = {"exact": [bool(hit) for hit in exact]}
    answer_nll = {"exact": [float(x) for x in rng.gamma(2, 0.004, len(trials))]}
    for arm in arms:
        kept = np.where(exact, rng.random(len(trials)) < arm.hit, rng.random(len(trials)) < 0.1)
        correct[arm.name] = [bool(hit) for hit in kept]
        shift = arm.effect * rng.gamma(1, 1, len(trials))
        answer_nll[arm.name] = [
            a + float(b) for a, b in zip(answer_nll["exact"], shift, strict=True)
        ]
    outputs = {
        name: [
            trial.answer if hit else f"{trial.answer[:4]}<b>&{rng.integers(100, 999)}"
            for trial, hit in zip(trials, hits, strict=True)
        ]
        for name, hits in correct.items()
    }
    return NeedleMeasurements(
        trials=trials,
        arms=list(correct),
        mode=mode,
        contexts=list(contexts),
        keys=1,
        answer_tokens=[8] * len(trials),
        outputs=outputs,
        correct=correct,
        answer_nll=answer_nll,
        seed=seed,
    )


def build_results(
    *,
    windows: int = 80,
    per_depth: int = 6,
    contexts: tuple[int, ...] = (4096,),
    arms: tuple[SimulatedArm, ...] = STUDY,
    baseline: float = 0.97,
    source: str = "demo",
    weights: str = "nf4",
    tasks: str = "ppl,niah",
) -> dict[str, Any]:
    """A complete run. `tasks` may leave out one of the two sections."""
    perplexity = needle = None
    if "ppl" in tasks:
        perplexity = summarize_perplexity(simulate_perplexity(windows=windows, arms=arms))
    if "niah" in tasks:
        needle = summarize_needle(
            simulate_needle(per_depth=per_depth, contexts=contexts, arms=arms, baseline=baseline)
        )
    reasons = reasons_not_publishable(
        status="complete", weights=weights, measured={"perplexity": perplexity, "needle": needle}
    )
    return {
        "schema": SCHEMA,
        "metrics_version": METRICS_VERSION,
        "status": "complete",
        "publishable": not reasons,
        "reasons": reasons,
        "created": "2026-01-01T12:00:00Z",
        "command": f"layersweep eval {source} --kv K3V2,K4V2,e8:K3V2,e8:K4V2 --out run",
        "versions": _versions(),
        "device": {"name": "CPU", "capability": None, "cores": 2},
        "paths": {"dequant": "torch", "experts": "loop", "attention": "math", "host": "ring"},
        "fallbacks": [
            {
                "what": "dequant",
                "wanted": "bitsandbytes",
                "used": "torch",
                "why": "no CUDA device was found",
            }
        ],
        "model": _model(source, weights),
        "protocol": _protocol(windows, per_depth, contexts) | ({} if needle else {"niah": None}),
        "gate": _gate(),
        "perplexity": perplexity,
        "needle": needle,
        "performance": _performance(windows),
    }


def _kv_bytes(bits: float) -> dict[str, float]:
    """32 layers of 8 KV heads x 128, of which half hold the last 4096 tokens alone."""
    full = 32 * 2 * 8 * 128 * bits / 8
    return {"4096": full, "32768": full * (1 + 4096 / 32768) / 2}


def _info(arm: SimulatedArm) -> ArmInfo:
    return ArmInfo(
        arm=arm.name,
        requested=f"K{arm.key_bits}V{arm.value_bits}",
        method=arm.method,
        key_bits=arm.key_bits,
        value_bits=arm.value_bits,
        codec_version="1",
        simulated=arm.simulated,
        encoder=None if arm.simulated else "torch",
    )


def _versions() -> dict[str, Any]:
    return {
        "layersweep": "0.1.0",
        "git": "0000000",
        "python": "3.11.9",
        "torch": "2.13.0+cpu",
        "cuda": None,
        "driver": None,
        "transformers": "5.23.0",
        "tokenizers": "0.23.3",
        "bitsandbytes": None,
        "triton": None,
        "scipy": "1.17.1",
    }


def _model(source: str, weights: str) -> dict[str, Any]:
    return {
        "source": source,
        "revision": None if source == "demo" else "abc1234",
        "fingerprint": "f" * 64,
        "architecture": "mixtral",
        "layers": 6,
        "experts": 8,
        "experts_per_token": 2,
        "weights": weights,
        "router": "nf4",
        "bytes": 12_345_678,
    }


def _protocol(windows: int, per_depth: int, contexts: tuple[int, ...]) -> dict[str, Any]:
    return {
        "text_source": "demo held-out text",
        "text_sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "bos": "auto",
        "bos_id": None,
        "segments": windows,
        "prefix": 1024,
        "continuation": 512,
        "scored_tokens": windows * SCORED,
        "cache_mode": "prefill",
        "windows": 104,
        "exact_pair_fraction": 0.19,
        "seed": 0,
        "dtype": "float32",
        "kv_dtype": "float32",
        "router_dtype": "float32",
        "tile_segments": 20,
        "weights": "auto",
        "niah": {
            "contexts": list(contexts),
            "depths": [round(float(depth), 2) for depth in np.linspace(0.05, 0.95, 10)],
            "per_depth": per_depth,
            "keys": 1,
            "mode": "teacher",
        },
    }


def _gate() -> dict[str, Any]:
    def check(name: str, value: float, limit: float) -> dict[str, Any]:
        return {"name": name, "passed": True, "value": value, "limit": limit, "layer": None}

    return {
        "passed": True,
        "checks": [check("first copy loss", 2.41, 7.3), check("second copy gain", 2.02, 0.5)],
        "experts_used_per_layer": [8] * 6,
    }


def _performance(windows: int) -> dict[str, Any]:
    return {
        "wall_s": 143.2,
        "phases": {"tokenize": 1.4, "perplexity": 81.0, "needle": 59.1, "statistics": 1.7},
        "sweeps": 2,
        "gate_sweeps": 0,
        "weight_bytes_read": 24_000_000,
        "h2d_bytes": 0,
        "tokens": windows * (1024 + 512 * 5),
        "flops": 3.1e12,
        "achieved_tflops": 0.04,
        "gemm_ceiling_tflops": None,
        "mfu": None,
        "h2d_gbps": None,
        "compute_stall_fraction": None,
        "peak_device_bytes": None,
        "peak_host_bytes": 1_234_567_890,
        "planned_device_bytes": None,
        "planned_s": None,
        "vram_budget": None,
        "ram_budget": 20 * 2**30,
    }

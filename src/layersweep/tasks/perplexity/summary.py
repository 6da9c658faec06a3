"""From raw measurements to the `perplexity` section of results.json. Pure functions.

Knows nothing of models, files or devices: arrays of what was measured go in, JSON values come out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from layersweep.statistics.groups import Floats, Groups, group_windows
from layersweep.statistics.intervals import lag1_autocorrelation, loss_ratio
from layersweep.statistics.paired import PairedStatistics, paired_statistics, quantiles
from layersweep.statistics.significance import holm
from layersweep.tasks.arms import BASELINE, ArmInfo
from layersweep.tasks.finite import finite
from layersweep.tasks.perplexity.measurements import PerplexityMeasurements
from layersweep.tasks.perplexity.noise import below_noise_floor, noise_floor

Json = dict[str, Any]

ENOUGH = 60  # windows below this are underpowered
COMPARED = (  # what an arm's deltas say
    *("delta_percent", "mean_delta_nll", "percent_mean_of_windows", "sem", "sem_iid", "z"),
    *("n_negative", "n_worse", "significant_2sigma", "ci95", "p_flip", "p_holm", "p_sign_iid"),
    *("p_wilcoxon_iid", "mde_percent", "below_noise_floor"),
)
SCORED = ("ppl", "kl_mean", "kl_p50", "kl_p99", "kl_p999", "kl_max", "top1_agreement")


def summarize_perplexity(measured: PerplexityMeasurements) -> Json:
    """The `perplexity` section. Deltas are arm - exact per window, in nats per token; lag1 is the
    largest lag-1 autocorrelation among the arms. What an arm with a non-finite value would have
    is null."""
    baseline = measured.nll[BASELINE]
    usable = [info.arm for info in measured.arms if measured.status[info.arm] == "ok"]
    nll = {arm: measured.nll[arm] for arm in (BASELINE, *usable)}
    groups = group_windows([window.article for window in measured.windows])
    floor = noise_floor(measured.controls)
    methods = {info.arm: info.method for info in measured.arms}
    compared = compare_arms(nll, groups, methods, floor, seed=measured.seed)
    lags = [lag1_autocorrelation(nll[arm] - baseline) for arm in usable]
    nll_mean = float(baseline.mean())
    return {
        "underpowered": len(measured.windows) < ENOUGH,
        "groups": {"kind": groups.kind, "count": groups.count},
        "baseline": {
            "arm": BASELINE,
            "ppl": math.exp(nll_mean),
            "nll_mean": nll_mean,
            "kv_bytes": measured.kv_bytes.get(BASELINE),
        },
        "lag1": max((lag for lag in lags if lag is not None), default=None),
        "noise_floor": floor,
        "arms": [
            _arm(measured, info)
            | compared.get(info.arm, dict.fromkeys(COMPARED))
            | _scored(measured, info.arm, ok=info.arm in compared)
            for info in measured.arms
        ],
        "pairs": compare_pairs(nll, groups, seed=measured.seed),
        "segments": _segments(measured),
    }


def compare_arms(
    nll: Mapping[str, Floats], groups: Groups, methods: Mapping[str, str], floor: Json, *, seed: int
) -> dict[str, Json]:
    """What every arm's deltas against the baseline say; p_holm adjusts p_flip over the arms."""
    deltas = {arm: losses - nll[BASELINE] for arm, losses in nll.items() if arm != BASELINE}
    paired = {arm: paired_statistics(delta, groups, seed=seed) for arm, delta in deltas.items()}
    adjusted = holm([one.p_flip for one in paired.values()])
    return {
        arm: _compared(one, deltas[arm])
        | {"p_holm": p, "below_noise_floor": below_noise_floor(one.mean, methods[arm], floor)}
        for (arm, one), p in zip(paired.items(), adjusted, strict=True)
    }


def compare_pairs(nll: Mapping[str, Floats], groups: Groups, *, seed: int) -> list[Json]:
    """a - b for every two arms, and the ratio of their losses; p is p_flip with Holm over pairs."""
    arms = [arm for arm in nll if arm != BASELINE]
    pairs = list(combinations(arms, 2))
    paired = [paired_statistics(nll[a] - nll[b], groups, seed=seed) for a, b in pairs]
    adjusted = holm([one.p_flip for one in paired])
    return [
        {
            "a": a,
            "b": b,
            "mean_delta_nll": one.mean,
            "sem": one.sem,
            "ci95": None if one.ci95 is None else list(one.ci95),
            "z": one.mean / one.sem if one.sem else None,
            "p": p,
            **_loss_ratio(nll[a] - nll[BASELINE], nll[b] - nll[BASELINE], groups, seed),
        }
        for (a, b), one, p in zip(pairs, paired, adjusted, strict=True)
    ]


def missing(section: Json) -> list[str]:
    """What a section lacks to be published, in sentences for people."""
    windows = len(section["segments"])
    reasons = [f"{windows} perplexity windows, {ENOUGH} are needed"] if windows < ENOUGH else []
    return reasons + [
        f"{entry['arm']} gave non-finite values"
        for entry in section["arms"]
        if entry["status"] != "ok"
    ]


def _arm(measured: PerplexityMeasurements, info: ArmInfo) -> Json:
    """What the arm is, and what it keeps."""
    bits = measured.bits_per_element.get(info.arm)
    return {
        "arm": info.arm,
        "requested": info.requested,
        "status": measured.status[info.arm],
        "method": info.method,
        "key_bits": info.key_bits,
        "value_bits": info.value_bits,
        "codec_version": info.codec_version,
        "simulated": info.simulated,
        "encoder": info.encoder,
        "bits_per_element": bits,
        "compression": None if bits is None else 16.0 / bits,
        "kv_bytes": measured.kv_bytes.get(info.arm),
        "n": len(measured.windows),
    }


def _compared(paired: PairedStatistics, delta: Floats) -> Json:
    return {
        "delta_percent": paired.delta_percent,
        "percent_mean_of_windows": float(100.0 * np.expm1(delta).mean()),
        "mean_delta_nll": paired.mean,
        "sem": paired.sem,
        "sem_iid": paired.sem_iid,
        "z": paired.z,
        "n_negative": paired.n_negative,
        "n_worse": paired.n_worse,
        "significant_2sigma": paired.significant_2sigma,
        "ci95": None if paired.ci95 is None else list(paired.ci95),
        "p_flip": paired.p_flip,
        "p_sign_iid": paired.p_sign_iid,
        "p_wilcoxon_iid": paired.p_wilcoxon_iid,
        "mde_percent": paired.mde_percent,
    }


def _scored(measured: PerplexityMeasurements, arm: str, *, ok: bool) -> Json:
    """What is known of an arm's scored tokens besides their deltas."""
    if not ok:
        return dict.fromkeys(SCORED)
    kl = quantiles(measured.kl[arm])
    return {
        "ppl": math.exp(float(measured.nll[arm].mean())),
        "kl_mean": kl.mean,
        "kl_p50": kl.p50,
        "kl_p99": kl.p99,
        "kl_p999": kl.p999,
        "kl_max": kl.max,
        "top1_agreement": float(measured.top1[arm]),
    }


def _loss_ratio(first: Floats, second: Floats, groups: Groups, seed: int) -> Json:
    """The loss of one arm against exact over that of another; nulls where that has no bounds."""
    ratio = loss_ratio(first, second, groups.labels, seed=seed)
    return {
        "loss_ratio": None if ratio is None else ratio.value,
        "loss_ratio_ci95": None if ratio is None else list(ratio.ci95),
    }


def _segments(measured: PerplexityMeasurements) -> list[Json]:
    arms = [info.arm for info in measured.arms]
    return [
        {
            "index": window.index,
            "article": window.article,
            "tokens_sha": window.tokens_sha,
            **window_losses({arm: measured.nll[arm][row] for arm in (BASELINE, *arms)}),
        }
        for row, window in enumerate(measured.windows)
    ]


def window_losses(nll: Mapping[str, float | None]) -> Json:
    """A window's NLL per arm and its delta to the baseline's; null where either is not finite."""
    losses = {arm: finite(loss) for arm, loss in nll.items()}
    exact = losses[BASELINE]
    return {
        "nll": losses,
        "delta": {
            arm: None if loss is None or exact is None else loss - exact
            for arm, loss in losses.items()
            if arm != BASELINE
        },
    }

"""From raw measurements to the `perplexity` section of results.json. Pure functions.

Knows nothing of models, files or devices: arrays of what was measured go in, JSON values come out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from layersweep.statistics.paired import (
    Ints,
    PairedStatistics,
    group_windows,
    holm,
    lag1_autocorrelation,
    loss_ratio,
    paired_statistics,
    quantiles,
)
from layersweep.tasks.arms import ArmInfo
from layersweep.tasks.finite import finite
from layersweep.tasks.perplexity.measurements import ControlMeasurement, PerplexityMeasurements

Json = dict[str, Any]

BASELINE = "exact"
ENOUGH = 60  # windows below this are underpowered
MEASURED_FIELDS = (  # null where an arm gave non-finite values
    *("ppl", "delta_percent", "percent_mean_of_windows", "mean_delta_nll", "sem", "sem_iid", "z"),
    *("n_negative", "significant_2sigma", "ci95", "p_sign", "p_wilcoxon", "p_holm"),
    *("mde_percent", "below_noise_floor", "kl_mean", "kl_p50", "kl_p99", "kl_p999", "kl_max"),
    "top1_agreement",
)


def summarize_perplexity(measured: PerplexityMeasurements) -> Json:
    """The `perplexity` section. Deltas are arm - exact per window, in nats per token.

    p_holm adjusts the Wilcoxon p over the arms; `pairs` holds a - b for every two arms with Holm
    over the pairs, and the ratio of their losses; lag1 is the largest lag-1 autocorrelation among
    the arms.
    """
    groups = group_windows([window.article for window in measured.windows])
    baseline = measured.nll[BASELINE]
    usable = [info.arm for info in measured.arms if measured.status[info.arm] == "ok"]
    deltas = {arm: measured.nll[arm] - baseline for arm in usable}
    statistics = {arm: paired_statistics(deltas[arm], groups, seed=measured.seed) for arm in usable}
    adjusted = dict(zip(usable, holm([statistics[arm].p_wilcoxon for arm in usable]), strict=True))
    lags = [lag for arm in usable if (lag := lag1_autocorrelation(deltas[arm])) is not None]
    nll_mean = float(baseline.mean())
    return {
        "underpowered": len(measured.windows) < ENOUGH,
        "baseline": {"arm": BASELINE, "ppl": math.exp(nll_mean), "nll_mean": nll_mean},
        "lag1": max(lags, default=None),
        "noise_floor": _noise_floor(measured.controls),
        "arms": [
            _arm_entry(measured, info, statistics.get(info.arm), adjusted.get(info.arm))
            for info in measured.arms
        ],
        "pairs": _pairs(measured, usable),
        "segments": _segments(measured),
    }


def missing(section: Json) -> list[str]:
    """What a section lacks to be published, in sentences for people."""
    windows = len(section["segments"])
    reasons = [f"{windows} perplexity windows, {ENOUGH} are needed"] if windows < ENOUGH else []
    return reasons + [
        f"{entry['arm']} gave non-finite values"
        for entry in section["arms"]
        if entry["status"] != "ok"
    ]


def _arm_entry(
    measured: PerplexityMeasurements,
    info: ArmInfo,
    paired: PairedStatistics | None,
    p_holm: float | None,
) -> Json:
    bits = measured.bits_per_element.get(info.arm)
    entry: Json = {
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
        "n": len(measured.windows),
    }
    if paired is None:
        return entry | dict.fromkeys(MEASURED_FIELDS)
    delta = measured.nll[info.arm] - measured.nll[BASELINE]
    kl = quantiles(measured.kl[info.arm])
    return entry | {
        "ppl": math.exp(float(measured.nll[info.arm].mean())),
        "delta_percent": paired.delta_percent,
        "percent_mean_of_windows": float(100.0 * np.expm1(delta).mean()),
        "mean_delta_nll": paired.mean,
        "sem": paired.sem,
        "sem_iid": paired.sem_iid,
        "z": paired.z,
        "n_negative": paired.n_negative,
        "significant_2sigma": paired.significant_2sigma,
        "ci95": None if paired.ci95 is None else list(paired.ci95),
        "p_sign": paired.p_sign,
        "p_wilcoxon": paired.p_wilcoxon,
        "p_holm": p_holm,
        "mde_percent": paired.mde_percent,
        "below_noise_floor": _below_noise(paired.mean, info.method, measured.controls),
        "kl_mean": kl.mean,
        "kl_p50": kl.p50,
        "kl_p99": kl.p99,
        "kl_p999": kl.p999,
        "kl_max": kl.max,
        "top1_agreement": float(measured.top1[info.arm]),
    }


def _below_noise(
    mean: float, method: str, controls: Mapping[str, ControlMeasurement]
) -> bool | None:
    """|mean delta| < 2 |mean delta of the method's own transforms|; None if those were not run."""
    control = controls.get(f"identity:{method}")
    return None if control is None else abs(mean) < 2.0 * abs(float(control.delta.mean()))


def _noise_floor(controls: Mapping[str, ControlMeasurement]) -> Json:
    """`identity` is the control with the largest mean; each method's own is in by_method."""
    by_method = {
        name.removeprefix("identity:"): _noise(control)
        for name, control in controls.items()
        if name.startswith("identity:")
    }
    worst = max(by_method.values(), key=lambda noise: abs(noise["mean"]), default=None)
    exact = controls.get(BASELINE)
    return {
        "exact": None if exact is None else _noise(exact),
        "identity": None if worst is None else worst | {"by_method": by_method},
    }


def _noise(control: ControlMeasurement) -> Json:
    delta = control.delta
    return {
        "n": len(delta),
        "mean": float(delta.mean()),
        "sd": float(delta.std(ddof=1)) if len(delta) > 1 else None,
        "max": float(np.abs(delta).max()),
        "kl": float(np.asarray(control.kl, dtype=np.float64).mean()),
    }


def _pairs(measured: PerplexityMeasurements, usable: Sequence[str]) -> list[Json]:
    groups = group_windows([window.article for window in measured.windows])
    found = [
        (a, b, paired_statistics(measured.nll[a] - measured.nll[b], groups, seed=measured.seed))
        for a, b in combinations(usable, 2)
    ]
    adjusted = holm([paired.p_wilcoxon for _, _, paired in found])
    return [
        {
            "a": a,
            "b": b,
            "mean_delta_nll": paired.mean,
            "sem": paired.sem,
            "ci95": None if paired.ci95 is None else list(paired.ci95),
            "z": paired.mean / paired.sem if paired.sem else None,
            "p": p,
            **_loss_ratio(measured, a, b, groups),
        }
        for (a, b, paired), p in zip(found, adjusted, strict=True)
    ]


def _loss_ratio(measured: PerplexityMeasurements, a: str, b: str, groups: Ints) -> Json:
    """The loss of arm `a` against exact over that of `b`; nulls where that has no bounds."""
    first, second = (measured.nll[arm] - measured.nll[BASELINE] for arm in (a, b))
    ratio = loss_ratio(first, second, groups, seed=measured.seed)
    return {
        "loss_ratio": None if ratio is None else ratio.value,
        "loss_ratio_ci95": None if ratio is None else list(ratio.ci95),
    }


def _segments(measured: PerplexityMeasurements) -> list[Json]:
    names = [BASELINE, *(info.arm for info in measured.arms)]
    return [
        {
            "index": window.index,
            "article": window.article,
            "tokens_sha": window.tokens_sha,
            "nll": {arm: finite(measured.nll[arm][row]) for arm in names if arm in measured.nll},
        }
        for row, window in enumerate(measured.windows)
    ]

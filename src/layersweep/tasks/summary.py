"""From raw measurements to the `perplexity` and `needle` sections of results.json. Pure functions.

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
    mcnemar_exact,
    paired_statistics,
    quantiles,
    wilson_interval,
)
from layersweep.tasks.measured import (
    ArmInfo,
    ControlMeasurement,
    NeedleMeasurements,
    PerplexityMeasurements,
    TrialInfo,
)

Json = dict[str, Any]

EXACT = "exact"
ENOUGH = 60  # windows or needles below this are underpowered, or a spot check
BASELINE_SHARE = 0.8  # needles the exact cache must find before arms can be judged
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
    baseline = measured.nll[EXACT]
    usable = [info.arm for info in measured.arms if measured.status[info.arm] == "ok"]
    deltas = {arm: measured.nll[arm] - baseline for arm in usable}
    statistics = {arm: paired_statistics(deltas[arm], groups, seed=measured.seed) for arm in usable}
    adjusted = dict(zip(usable, holm([statistics[arm].p_wilcoxon for arm in usable]), strict=True))
    lags = [lag for arm in usable if (lag := lag1_autocorrelation(deltas[arm])) is not None]
    nll_mean = float(baseline.mean())
    return {
        "underpowered": len(measured.windows) < ENOUGH,
        "baseline": {"arm": EXACT, "ppl": math.exp(nll_mean), "nll_mean": nll_mean},
        "lag1": max(lags, default=None),
        "noise_floor": _noise_floor(measured.controls),
        "arms": [
            _arm_entry(measured, info, statistics.get(info.arm), adjusted.get(info.arm))
            for info in measured.arms
        ],
        "pairs": _pairs(measured, usable),
        "segments": _segments(measured),
    }


def summarize_needle(measured: NeedleMeasurements) -> Json:
    """The `needle` section. lost and gained compare an arm with the exact cache trial by trial."""
    trials = len(measured.trials)
    baseline = sum(measured.correct[EXACT])
    return {
        "contexts": list(measured.contexts),
        "keys": measured.keys,
        "mode": measured.mode,
        "baseline_gate": "passed" if baseline >= BASELINE_SHARE * trials else "failed",
        "spot_check": trials < ENOUGH,
        "answer_tokens": float(np.mean(measured.answer_tokens)),
        "arms": [_needle_arm(measured, arm) for arm in measured.arms],
        "trials": [_trial(measured, index) for index in range(trials)],
    }


def reasons_not_publishable(
    *, status: str, weights: str, perplexity: Json | None, needle: Json | None
) -> list[str]:
    """What a run lacks to be published, in sentences for people; empty when nothing is missing.

    A section is None where its task was not asked for.
    """
    reasons = []
    if status != "complete":
        reasons.append(f"the run is not complete (status: {status})")
    if weights == "synthetic":
        reasons.append("the weights are synthetic")
    if perplexity is None and needle is None:
        reasons.append("nothing was measured")
    if perplexity is not None:
        windows = len(perplexity["segments"])
        if windows < ENOUGH:
            reasons.append(f"{windows} perplexity windows, {ENOUGH} are needed")
        reasons += [
            f"{entry['arm']} gave non-finite values"
            for entry in perplexity["arms"]
            if entry["status"] != "ok"
        ]
    if needle is not None:
        trials = len(needle["trials"])
        if trials < ENOUGH:
            reasons.append(f"{trials} needles are a spot check, {ENOUGH} are needed")
        if needle["baseline_gate"] != "passed":
            reasons.append("the exact cache finds fewer than 80 % of the needles")
    return reasons


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
    delta = measured.nll[info.arm] - measured.nll[EXACT]
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
    exact = controls.get(EXACT)
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
    first, second = (measured.nll[arm] - measured.nll[EXACT] for arm in (a, b))
    ratio = loss_ratio(first, second, groups, seed=measured.seed)
    return {
        "loss_ratio": None if ratio is None else ratio.value,
        "loss_ratio_ci95": None if ratio is None else list(ratio.ci95),
    }


def _segments(measured: PerplexityMeasurements) -> list[Json]:
    names = [EXACT, *(info.arm for info in measured.arms)]
    return [
        {
            "index": window.index,
            "article": window.article,
            "tokens_sha": window.tokens_sha,
            "nll": {arm: _finite(measured.nll[arm][row]) for arm in names if arm in measured.nll},
        }
        for row, window in enumerate(measured.windows)
    ]


def _needle_arm(measured: NeedleMeasurements, arm: str) -> Json:
    correct, exact = measured.correct[arm], measured.correct[EXACT]
    interval = wilson_interval(sum(correct), len(correct))
    entry: Json = {
        "arm": arm,
        "correct": int(sum(correct)),
        "n": len(correct),
        "wilson95": None if interval is None else list(interval),
        "lost": None,
        "gained": None,
        "mcnemar_p": None,
        "answer_nll_delta": None,
        "answer_nll_sem": None,
        "by_depth": _by_depth(measured.trials, correct),
    }
    if arm == EXACT:
        return entry
    before, after = np.asarray(exact, dtype=bool), np.asarray(correct, dtype=bool)
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    mean, sem = _answer_delta(measured.answer_nll.get(arm, ()), measured.answer_nll.get(EXACT, ()))
    return entry | {
        "lost": lost,
        "gained": gained,
        "mcnemar_p": mcnemar_exact(lost, gained),
        "answer_nll_delta": mean,
        "answer_nll_sem": sem,
    }


def _answer_delta(
    arm: Sequence[float | None], exact: Sequence[float | None]
) -> tuple[float | None, float | None]:
    """Mean and SEM of the paired answer NLL; trials are independent by construction."""
    deltas = np.array(
        [
            there - here
            for there, here in zip(arm, exact, strict=True)
            if there is not None and here is not None
        ],
        dtype=np.float64,
    )
    deltas = deltas[np.isfinite(deltas)]
    if len(deltas) == 0:
        return None, None
    sem = float(deltas.std(ddof=1)) / math.sqrt(len(deltas)) if len(deltas) > 1 else None
    return float(deltas.mean()), sem


def _by_depth(trials: Sequence[TrialInfo], correct: Sequence[bool]) -> list[Json]:
    cells: dict[tuple[int, float], list[bool]] = {}
    for trial, found in zip(trials, correct, strict=True):
        cells.setdefault((trial.context, trial.depth), []).append(bool(found))
    return [
        {"context": context, "depth": depth, "correct": sum(hits), "n": len(hits)}
        for (context, depth), hits in sorted(cells.items())
    ]


def _trial(measured: NeedleMeasurements, index: int) -> Json:
    trial = measured.trials[index]
    return {
        "id": trial.id,
        "context": trial.context,
        "depth": trial.depth,
        "achieved_depth": trial.achieved_depth,
        "key": trial.key,
        "answer": trial.answer,
        "outputs": {arm: measured.outputs[arm][index] for arm in measured.arms},
        "correct": {arm: bool(measured.correct[arm][index]) for arm in measured.arms},
        "answer_nll": {
            arm: _finite(measured.answer_nll[arm][index])
            for arm in measured.arms
            if arm in measured.answer_nll
        },
    }


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None

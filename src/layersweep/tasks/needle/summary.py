"""From raw measurements to the `needle` section of results.json. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from layersweep.statistics.paired import mcnemar_exact, wilson_interval
from layersweep.tasks.finite import finite
from layersweep.tasks.needle.measurements import NeedleMeasurements, TrialInfo

Json = dict[str, Any]

BASELINE = "exact"
ENOUGH = 60  # needles below this are a spot check
BASELINE_SHARE = 0.8  # needles the exact cache must find before arms can be judged


def summarize_needle(measured: NeedleMeasurements) -> Json:
    """The `needle` section. lost and gained compare an arm with the exact cache trial by trial."""
    trials = len(measured.trials)
    baseline = sum(measured.correct[BASELINE])
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


def missing(section: Json) -> list[str]:
    """What a section lacks to be published, in sentences for people."""
    trials = len(section["trials"])
    reasons = []
    if trials < ENOUGH:
        reasons.append(f"{trials} needles are a spot check, {ENOUGH} are needed")
    if section["baseline_gate"] != "passed":
        reasons.append("the exact cache finds fewer than 80 % of the needles")
    return reasons


def _needle_arm(measured: NeedleMeasurements, arm: str) -> Json:
    correct, exact = measured.correct[arm], measured.correct[BASELINE]
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
    if arm == BASELINE:
        return entry
    before, after = np.asarray(exact, dtype=bool), np.asarray(correct, dtype=bool)
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    mean, sem = _answer_delta(
        measured.answer_nll.get(arm, ()), measured.answer_nll.get(BASELINE, ())
    )
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
            arm: finite(measured.answer_nll[arm][index])
            for arm in measured.arms
            if arm in measured.answer_nll
        },
    }

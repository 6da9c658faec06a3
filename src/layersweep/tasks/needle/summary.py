"""From raw measurements to the `needle` section of results.json. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from layersweep.statistics.groups import Floats, Groups, group_haystacks
from layersweep.statistics.intervals import cluster_sem, wilson_interval
from layersweep.statistics.significance import flip_test, mcnemar_exact_iid
from layersweep.tasks.arms import BASELINE
from layersweep.tasks.finite import finite
from layersweep.tasks.needle.measurements import NeedleMeasurements

Json = dict[str, Any]

ENOUGH = 60  # needles below this are a spot check
BASELINE_SHARE = 0.8  # needles the exact cache must find before arms can be judged


def summarize_needle(measured: NeedleMeasurements) -> Json:
    """The `needle` section. lost and gained compare an arm with the exact cache trial by trial;
    their p and the SEM are over stretches of the text, since haystacks overlap."""
    trials = len(measured.trials)
    groups = group_haystacks([(t.haystack_begin, t.haystack_end) for t in measured.trials])
    baseline = sum(measured.correct[BASELINE])
    return {
        "contexts": list(measured.contexts),
        "keys": measured.keys,
        "mode": measured.mode,
        "baseline_gate": "passed" if baseline >= BASELINE_SHARE * trials else "failed",
        "spot_check": trials < ENOUGH,
        "groups": {"kind": groups.kind, "count": groups.count},
        "answer_tokens": float(np.mean(measured.answer_tokens)),
        "arms": [_needle_arm(measured, arm, groups) for arm in measured.arms],
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


def _needle_arm(measured: NeedleMeasurements, arm: str, groups: Groups) -> Json:
    settings = [(trial.context, trial.depth) for trial in measured.trials]
    return {
        "arm": arm,
        **counts(settings, measured.correct[arm]),
        **_against_baseline(measured, arm, groups),
    }


def _against_baseline(measured: NeedleMeasurements, arm: str, groups: Groups) -> Json:
    """Needles lost and gained and the paired difference of the answer's NLL; nulls of the baseline
    itself."""
    if arm == BASELINE:
        names = ("lost", "gained", "p_flip", "p_mcnemar_iid", "answer_nll_delta", "answer_nll_sem")
        return dict.fromkeys(names)
    found, exact = (np.asarray(measured.correct[name], np.float64) for name in (arm, BASELINE))
    verdicts = found - exact  # -1 lost, 1 gained
    lost, gained = int((verdicts < 0).sum()), int((verdicts > 0).sum())
    mean, sem = _answer_delta(measured, arm, groups)
    return {
        "lost": lost,
        "gained": gained,
        "p_flip": flip_test(verdicts, groups, seed=measured.seed, counts=True),
        "p_mcnemar_iid": mcnemar_exact_iid(lost, gained),
        "answer_nll_delta": mean,
        "answer_nll_sem": sem,
    }


def _answer_delta(
    measured: NeedleMeasurements, arm: str, groups: Groups
) -> tuple[float | None, float | None]:
    """Mean paired difference of the answer NLL, and its SEM over stretches of the text."""
    there, here = (_losses(measured.answer_nll.get(name, ())) for name in (arm, BASELINE))
    deltas = there - here
    known = np.isfinite(deltas)
    if not known.any():
        return None, None
    return float(deltas[known].mean()), cluster_sem(deltas[known], groups.labels[known])


def _losses(values: Sequence[float | None]) -> Floats:
    """NaN where nothing was measured."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def counts(settings: Sequence[tuple[int, float]], correct: Sequence[bool]) -> Json:
    """What an arm found, of all trials, by context and by context and depth. `settings`: context
    and depth of each trial."""
    by_context: dict[int, list[bool]] = {}
    by_depth: dict[tuple[int, float], list[bool]] = {}
    for (context, depth), found in zip(settings, correct, strict=True):
        by_context.setdefault(context, []).append(found)
        by_depth.setdefault((context, depth), []).append(found)
    return {
        **_count(correct),
        "by_context": [{"context": c, **_count(hits)} for c, hits in sorted(by_context.items())],
        "by_depth": [
            {"context": context, "depth": depth, **_count(hits)}
            for (context, depth), hits in sorted(by_depth.items())
        ],
    }


def _count(correct: Sequence[bool]) -> Json:
    """k, n and Wilson's interval."""
    hits, n = int(sum(correct)), len(correct)
    interval = wilson_interval(hits, n)
    return {"correct": hits, "n": n, "wilson95": None if interval is None else list(interval)}


def _trial(measured: NeedleMeasurements, index: int) -> Json:
    trial = measured.trials[index]
    return {
        "id": trial.id,
        "context": trial.context,
        "depth": trial.depth,
        "achieved_depth": trial.achieved_depth,
        "key": trial.key,
        "answer": trial.answer,
        "haystack": [trial.haystack_begin, trial.haystack_end],
        "outputs": {arm: measured.outputs[arm][index] for arm in measured.arms},
        "correct": {arm: bool(measured.correct[arm][index]) for arm in measured.arms},
        "answer_nll": {
            arm: finite(measured.answer_nll[arm][index])
            for arm in measured.arms
            if arm in measured.answer_nll
        },
    }

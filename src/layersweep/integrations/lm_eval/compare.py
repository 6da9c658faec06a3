"""What lm-eval found under each arm, document by document against the exact cache. Pure functions
of its samples; documents are taken as independent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np

from layersweep.statistics.groups import Floats, Groups
from layersweep.statistics.intervals import bca_interval, iid_sem
from layersweep.statistics.significance import flip_test, holm, mcnemar_exact_iid
from layersweep.tasks.arms import BASELINE

Json = dict[str, Any]
Sample = Mapping[str, Any]  # of a document, as lm-eval logs it
Kind = Literal["verdicts", "losses", "values"]
ANSWER_NLL = "answer_nll"  # our own: the loss of the right choice
# lm-eval has (log-likelihood, words or bytes) of a document for these, and for LAMBADA's perplexity
# the log-likelihood
PER_UNIT = ("word_perplexity", "byte_perplexity", "bits_per_byte")
PERPLEXITY = "perplexity"
SEED = 0


@dataclass(frozen=True)
class Difference:
    """Of one arm from the exact cache, over the documents of a task.

    `kind`: "verdicts" are 0 or 1 for each document, which `lost` and `gained` count and exact
    McNemar tests; "losses" are negative log-likelihoods, in nats per word, byte or answer, or in
    bits per byte; "values" anything else that is one number. `delta`: the mean of arm - exact,
    `ci95` its BCa interval. The p of losses and values is that of random signs; `p_holm` is over
    the arms of a metric.
    """

    arm: str
    kind: Kind
    n: int
    delta: float
    sem: float | None
    ci95: tuple[float, float] | None
    lost: int | None
    gained: int | None
    p: float
    p_holm: float


def differences(
    samples: Mapping[str, Sequence[Sample]], metric: str, filter_name: str
) -> list[Difference]:
    """Of all arms from the exact one, for a metric of a task under one of its filters. `samples`:
    by arm. Empty for a metric that is no finite number for each document (F1, Brier score)."""
    values = {arm: _values(its, metric, filter_name) for arm, its in samples.items()}
    exact = values.pop(BASELINE)
    if not all(_is_finite(x) for of_arm in (exact, *values.values()) for x in of_arm):
        return []
    kind: Kind = "losses" if metric in (*PER_UNIT, PERPLEXITY, ANSWER_NLL) else "values"
    if all(x in (0, 1) for of_arm in (exact, *values.values()) for x in of_arm):
        kind = "verdicts"
    deltas = {arm: np.array(its, np.float64) - np.array(exact, np.float64)
              for arm, its in values.items()}  # fmt: skip
    p = {arm: _p(kind, its) for arm, its in deltas.items()}
    p_holm = holm(list(p.values()))
    return [
        _difference(arm, kind, its, p[arm], adjusted)
        for (arm, its), adjusted in zip(deltas.items(), p_holm, strict=True)
    ]


def metrics_of(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    """(metric, filter) of a task in lm-eval's order, and the loss of the right choice."""
    found = dict.fromkeys((name, one["filter"]) for one in samples for name in one["metrics"])
    if all(_answer_nll(one) is not None for one in samples):
        found |= dict.fromkeys((ANSWER_NLL, one["filter"]) for one in samples)
    return list(found)


def answer_nll(samples: Sequence[Sample], filter_name: str) -> tuple[float, float | None]:
    """Its mean in nats and the standard error of that: lm-eval has no such metric."""
    losses = np.array(_values(samples, ANSWER_NLL, filter_name), np.float64)
    return float(losses.mean()), iid_sem(losses)


def _values(samples: Sequence[Sample], metric: str, filter_name: str) -> list[Any]:
    """Of each document; log-likelihoods as losses."""
    some = [one for one in samples if one["filter"] == filter_name]
    if metric == ANSWER_NLL:
        return [_answer_nll(one) for one in some]
    if metric == PERPLEXITY:
        return [-one[metric] for one in some]
    if metric in PER_UNIT:  # over the mean weight: their mean is the loss per unit of all of them
        unit = float(np.mean([one[metric][1] for one in some]))
        unit *= math.log(2.0) if metric == "bits_per_byte" else 1.0
        return [-one[metric][0] / unit for one in some]
    return [one[metric] for one in some]


def _answer_nll(sample: Sample) -> float | None:
    """Loss of the right one of several choices, where lm-eval has scored them."""
    target, scores = sample["target"], sample["filtered_resps"]
    if len(scores) < 2 or not isinstance(target, int) or not 0 <= target < len(scores):
        return None
    right = scores[target]
    return -float(right[0]) if isinstance(right, (tuple, list)) and len(right) == 2 else None


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _p(kind: Kind, deltas: Floats) -> float:
    if kind == "verdicts":
        return mcnemar_exact_iid(int((deltas < 0).sum()), int((deltas > 0).sum()))
    return flip_test(deltas, _apart(deltas), seed=SEED)


def _apart(deltas: Floats) -> Groups:
    """Each document a group of its own."""
    return Groups("articles", np.arange(len(deltas)))


def _difference(arm: str, kind: Kind, deltas: Floats, p: float, p_holm: float) -> Difference:
    judged = kind == "verdicts"
    return Difference(
        arm=arm,
        kind=kind,
        n=len(deltas),
        delta=float(deltas.mean()),
        sem=iid_sem(deltas),
        ci95=bca_interval(deltas, _apart(deltas).labels, seed=SEED),
        lost=int((deltas < 0).sum()) if judged else None,
        gained=int((deltas > 0).sum()) if judged else None,
        p=p,
        p_holm=p_holm,
    )

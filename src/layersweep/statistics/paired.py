"""Two caches, the same tokens: every figure about the differences of one pair of arms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layersweep.statistics.groups import Floats, Groups
from layersweep.statistics.intervals import bca_interval, cluster_sem, iid_sem
from layersweep.statistics.significance import flip_test, sign_test_iid, wilcoxon_test_iid

MDE_SEMS = 2.8  # 1.96 + 0.84: two-sided 5 % test, 80 % power


@dataclass(frozen=True)
class PairedStatistics:
    """One arm's deltas (arm - exact, nats per token) over `n` windows in `groups` groups.

    `ci95` is in nats; 100 (exp(bound) - 1) turns a bound into percent (BCa respects monotone
    transformations, so that is the interval of delta_percent). p_flip is over groups; what is
    named `iid` treats windows as independent.
    """

    n: int
    groups: int
    mean: float
    delta_percent: float
    sem: float | None
    sem_iid: float | None
    z: float | None
    significant_2sigma: bool | None
    ci95: tuple[float, float] | None
    n_negative: int
    n_worse: int
    p_flip: float
    p_sign_iid: float | None
    p_wilcoxon_iid: float | None
    mde_percent: float | None


@dataclass(frozen=True)
class Quantiles:
    """Location of a heavy-tailed non-negative sample (KL per scored token, nats)."""

    mean: float
    p50: float
    p99: float
    p999: float
    max: float


def paired_statistics(deltas: Floats, groups: Groups, *, seed: int) -> PairedStatistics:
    """Every figure that is printed about the deltas [n] of one arm."""
    values = np.asarray(deltas, dtype=np.float64)
    mean = float(values.mean())
    sem, sem_iid = cluster_sem(values, groups.labels), iid_sem(values)
    z = None if not sem_iid else mean / sem_iid
    return PairedStatistics(
        n=len(values),
        groups=groups.count,
        mean=mean,
        delta_percent=percent(mean),
        sem=sem,
        sem_iid=sem_iid,
        z=z,
        significant_2sigma=None if z is None else abs(z) > 2.0,
        ci95=bca_interval(values, groups.labels, seed=seed),
        n_negative=int((values < 0).sum()),
        n_worse=int((values > 0).sum()),
        p_flip=flip_test(values, groups, seed=seed),
        p_sign_iid=sign_test_iid(values),
        p_wilcoxon_iid=wilcoxon_test_iid(values),
        mde_percent=None if sem is None else 100.0 * MDE_SEMS * sem,
    )


def percent(nats: float) -> float:
    """Perplexity change in percent of a mean NLL difference in nats: 100 (exp(x) - 1)."""
    return 100.0 * math.expm1(nats)


def quantiles(sample: NDArray[np.floating]) -> Quantiles:
    """Mean, median, 99 %, 99.9 % (linear interpolation) and maximum of all elements of `sample`."""
    flat = np.asarray(sample, dtype=np.float64).ravel()
    p50, p99, p999 = (float(q) for q in np.quantile(flat, [0.5, 0.99, 0.999]))
    return Quantiles(float(flat.mean()), p50, p99, p999, float(flat.max()))

"""Statistics of paired measurements: two caches, the same tokens. Pure functions, numpy and scipy.

Windows of one article resemble each other, so uncertainty is taken over groups of windows
(`group_windows`), never over windows as if they were independent; the independent figures stand
beside it because published rows use them. What is undefined (one window, no spread) is None,
never NaN.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 10_000
BLOCK_WINDOWS = 4
ENOUGH_ARTICLES = 8  # a spread over fewer groups than this says little about itself
MDE_SEMS = 2.8  # 1.96 + 0.84: two-sided 5 % test, 80 % power
Z95 = 1.959963984540054


@dataclass(frozen=True)
class PairedStatistics:
    """One arm's deltas (arm - exact, nats per token) over `n` windows in `groups` groups.

    `ci95` is in nats; 100 (exp(bound) - 1) turns a bound into percent (BCa respects monotone
    transformations, so that is the interval of delta_percent).
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
    p_sign: float | None
    p_wilcoxon: float | None
    mde_percent: float | None


@dataclass(frozen=True)
class LossRatio:
    """How many times the second arm's loss the first arm loses, with its 95 % interval."""

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Quantiles:
    """Location of a heavy-tailed non-negative sample (KL per scored token, nats)."""

    mean: float
    p50: float
    p99: float
    p999: float
    max: float


def paired_statistics(deltas: Floats, groups: Ints, *, seed: int) -> PairedStatistics:
    """Every figure that is printed about the deltas [n] of one arm; `groups` [n] labels windows."""
    values = np.asarray(deltas, dtype=np.float64)
    mean = float(values.mean())
    sem, sem_iid = cluster_sem(values, groups), iid_sem(values)
    z = None if not sem_iid else mean / sem_iid
    return PairedStatistics(
        n=len(values),
        groups=len(np.unique(groups)),
        mean=mean,
        delta_percent=percent(mean),
        sem=sem,
        sem_iid=sem_iid,
        z=z,
        significant_2sigma=None if z is None else abs(z) > 2.0,
        ci95=bca_interval(values, groups, seed=seed),
        n_negative=int((values < 0).sum()),
        p_sign=sign_test(values),
        p_wilcoxon=wilcoxon_test(values),
        mde_percent=None if sem is None else 100.0 * MDE_SEMS * sem,
    )


def percent(nats: float) -> float:
    """Perplexity change in percent of a mean NLL difference in nats: 100 (exp(x) - 1)."""
    return 100.0 * math.expm1(nats)


def group_windows(articles: Sequence[str | None]) -> Ints:
    """Group label per window [n]: its article (text heading), or its block of 4 windows.

    Headings are used when they give at least 8 groups, or at least as many as the blocks would;
    a text with one or two headings would otherwise have no usable spread. Windows without a
    heading in a text that has some are grouped in blocks.
    """
    blocks = [index // BLOCK_WINDOWS for index in range(len(articles))]
    named = [
        f"article {name}" if name is not None else f"block {block}"
        for name, block in zip(articles, blocks, strict=True)
    ]
    has_headings = any(name is not None for name in articles)
    enough = len(set(named)) >= min(ENOUGH_ARTICLES, len(set(blocks)))
    if not (has_headings and enough):
        return np.asarray(blocks, dtype=np.int64)
    order = {label: position for position, label in enumerate(dict.fromkeys(named))}
    return np.asarray([order[label] for label in named], dtype=np.int64)


def iid_sem(values: Floats) -> float | None:
    """Standard error of the mean if the values were independent: s / sqrt(n), s with n - 1."""
    if len(values) < 2:
        return None
    return _positive_or_zero(float(values.std(ddof=1)) / math.sqrt(len(values)), values)


def cluster_sem(values: Floats, groups: Ints) -> float | None:
    """Standard error of the mean over groups of unequal size.

    The mean is a ratio of sums, sum_g S_g / sum_g n_g, whose linearized variance is
    G / (G - 1) * sum_g (S_g - mean * n_g)^2 / n^2 (Cochran, Sampling Techniques, 3rd ed.,
    section 6.3). With one window per group it equals `iid_sem`.
    """
    sums, sizes = _group_sums(values, groups)
    count = len(sums)
    if count < 2:
        return None
    residuals = sums - values.mean() * sizes
    variance = count / (count - 1) * float((residuals**2).sum()) / len(values) ** 2
    return _positive_or_zero(math.sqrt(variance), values)


def bca_interval(
    values: Floats, groups: Ints, *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Bias-corrected and accelerated 95 % bootstrap interval of the mean; groups are resampled.

    Whole groups are drawn with replacement and the statistic is the ratio of sums, so a group's
    weight is its number of windows (Efron 1987, J. Am. Stat. Assoc. 82, 171-185, as in
    scipy.stats.bootstrap). The bounds lie at `bootstrap_z`, which is more than 1.96. None with
    fewer than two groups or where nothing varies. Measured coverage: tools/measure_coverage.py.
    """
    sums, sizes = _group_sums(values, groups)
    if len(sums) < 2 or np.ptp(values) == 0.0:
        return None
    z = bootstrap_z(sums - values.mean() * sizes, sizes, resamples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (sums, sizes),
            _ratio_of_sums,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            confidence_level=1.0 - 2.0 * stats.norm.sf(z),
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def bootstrap_z(residuals: Floats, sizes: Floats, resamples: int) -> float:
    """Normal quantile at which a bootstrap over groups has its 95 % bounds: above 1.96.

    `residuals` [G]: each group's sum less what its `sizes` windows have at the mean, in text order.

    z = sqrt(K / (K - 1)) t(0.975; K - 1): drawing from K groups spreads too little by that root,
    and the spread itself is estimated (the expanded interval of Hesterberg 2015, Am. Stat. 69,
    371-386). K = (sum n_g)^2 / sum n_g^2 is G where the sizes n_g are equal, and less where a few
    long articles dominate: with it the squared residuals of independent windows have the
    expectation (K - 1) / K of the true variance, and by Satterthwaite (1946, Biometrics Bull. 2,
    110-114) about K - 1 degrees of freedom.

    Neighbouring groups correlate where a text is cut in blocks. Their variance is then
    1 + 2 r times that of independent ones, r the lag-1 autocorrelation (Bayley & Hammersley 1946,
    J. R. Stat. Soc. Suppl. 8, 184-197, first lag). This only ever widens.

    No further out than one resample: beyond that (K below 4) a bootstrap has nothing to say.
    """
    effective = float(sizes.sum() ** 2 / (sizes**2).sum())
    spread = math.sqrt(effective / (effective - 1.0))
    neighbours = math.sqrt(max(1.0, 1.0 + 2.0 * (lag1_autocorrelation(residuals) or 0.0)))
    z = spread * neighbours * float(stats.t.ppf(0.975, effective - 1.0))
    return min(z, float(stats.norm.isf(1.0 / resamples)))


def loss_ratio(
    first: Floats, second: Floats, groups: Ints, *, seed: int, resamples: int = RESAMPLES
) -> LossRatio | None:
    """Ratio of two arms' mean deltas [n] against exact, on the same windows; groups are resampled.

    r = sum_g A_g / sum_g B_g over the group sums A, B of both arms: the ratio estimator (Cochran,
    Sampling Techniques, 3rd ed., section 6.2). A resample draws G of the G groups with
    replacement, both arms of a group together, and takes the same ratio; the interval lies
    between two quantiles of these ratios, the percentile bootstrap (Efron & Tibshirani, An
    Introduction to the Bootstrap, 1993, section 13.3), as far out as `bootstrap_z` says.

    None with fewer than two groups, and where any resampled denominator is not positive: that
    `second` loses at all is then not certain, and the ratio has no bounds.
    """
    (above, sizes), (below, _) = (_group_sums(values, groups) for values in (first, second))
    count = len(sizes)
    if count < 2:
        return None
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))  # [R, G]
    drawn_above, drawn_below = above[drawn].sum(axis=-1), below[drawn].sum(axis=-1)  # [R] each
    if drawn_below.min() <= 0.0:
        return None
    ratio = float(above.sum() / below.sum())
    z = bootstrap_z(above - ratio * below, sizes, resamples)
    low, high = np.quantile(drawn_above / drawn_below, stats.norm.cdf([-z, z]))
    return LossRatio(ratio, (float(low), float(high)))


def sign_test(values: Floats) -> float | None:
    """Exact two-sided sign test: binomial(1/2) on the non-zero values; None if all are zero."""
    positive, negative = int((values > 0).sum()), int((values < 0).sum())
    if positive + negative == 0:
        return None
    return float(stats.binomtest(positive, positive + negative, 0.5).pvalue)


def wilcoxon_test(values: Floats) -> float | None:
    """Two-sided Wilcoxon signed-rank p (zeros dropped; exact for small samples without ties)."""
    nonzero = values[values != 0]
    if len(nonzero) == 0:
        return None
    return float(stats.wilcoxon(nonzero).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (Scand. J. Stat. 1979) over the p values that exist.

    The i-th smallest of m (from 0) is multiplied by m - i, made monotone, and capped at 1.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, index) in enumerate(known):
        running = max(running, min(1.0, p * (len(known) - rank)))
        adjusted[index] = running
    return adjusted


def lag1_autocorrelation(values: Floats) -> float | None:
    """Correlation of neighbouring windows: sum c_i c_(i+1) / sum c_i^2, c centred."""
    if len(values) < 2 or np.ptp(values) == 0.0:
        return None
    centred = values - values.mean()
    return float((centred[:-1] * centred[1:]).sum() / (centred**2).sum())


def wilson_interval(correct: int, n: int) -> tuple[float, float] | None:
    """Wilson's 95 % score interval of a proportion (J. Am. Stat. Assoc. 1927); None for n = 0."""
    if n == 0:
        return None
    share, z2 = correct / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == n else centre + half
    return low, high


def mcnemar_exact(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: binomial(1/2) on discordant pairs; 1.0 when there are none."""
    if lost + gained == 0:
        return 1.0
    return float(stats.binomtest(lost, lost + gained, 0.5).pvalue)


def quantiles(sample: NDArray[np.floating]) -> Quantiles:
    """Mean, median, 99 %, 99.9 % (linear interpolation) and maximum of all elements of `sample`."""
    flat = np.asarray(sample, dtype=np.float64).ravel()
    p50, p99, p999 = (float(q) for q in np.quantile(flat, [0.5, 0.99, 0.999]))
    return Quantiles(float(flat.mean()), p50, p99, p999, float(flat.max()))


def _group_sums(values: Floats, groups: Ints) -> tuple[Floats, Floats]:
    """Sum of the values and number of windows per group, both [G]."""
    _, positions = np.unique(groups, return_inverse=True)
    sums = np.bincount(positions, weights=values).astype(np.float64)
    return sums, np.bincount(positions).astype(np.float64)


def _ratio_of_sums(sums: Floats, sizes: Floats, axis: int = -1) -> Floats:
    ratio: Floats = sums.sum(axis=axis) / sizes.sum(axis=axis)
    return ratio


def _positive_or_zero(sem: float, values: Floats) -> float:
    """Equal values have no spread; rounding in the mean must not invent one."""
    return 0.0 if np.ptp(values) == 0.0 else sem

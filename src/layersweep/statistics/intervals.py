"""How far a mean, a ratio or a share may be off: standard errors and 95 % intervals.

Windows of one article resemble each other, so uncertainty is taken over groups of windows
(`groups.py`), never over windows as if they were independent; the independent figures stand beside
it because published rows use them. What is undefined (one window, no spread) is None, never NaN.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from scipy import stats

from layersweep.statistics.groups import Floats, Ints, group_sums

RESAMPLES = 10_000
Z95 = 1.959963984540054


@dataclass(frozen=True)
class LossRatio:
    """How many times the second arm's loss the first arm loses, with its 95 % interval."""

    value: float
    ci95: tuple[float, float]


def iid_sem(values: Floats) -> float | None:
    """Standard error of the mean if the values were independent: s / sqrt(n), s with n - 1."""
    if len(values) < 2:
        return None
    return _positive_or_zero(float(values.std(ddof=1)) / math.sqrt(len(values)), values)


def cluster_sem(values: Floats, labels: Ints) -> float | None:
    """Standard error of the mean over groups of unequal size.

    The mean is a ratio of sums, sum_g S_g / sum_g n_g, whose linearized variance is
    G / (G - 1) * sum_g (S_g - mean * n_g)^2 / n^2 (Cochran, Sampling Techniques, 3rd ed.,
    section 6.3). With one window per group it equals `iid_sem`.
    """
    sums, sizes = group_sums(values, labels)
    count = len(sums)
    if count < 2:
        return None
    residuals = sums - values.mean() * sizes
    variance = count / (count - 1) * float((residuals**2).sum()) / len(values) ** 2
    return _positive_or_zero(math.sqrt(variance), values)


def bca_interval(
    values: Floats, labels: Ints, *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Bias-corrected and accelerated 95 % bootstrap interval of the mean; groups are resampled.

    Whole groups are drawn with replacement and the statistic is the ratio of sums, so a group's
    weight is its number of windows (Efron 1987, J. Am. Stat. Assoc. 82, 171-185, as in
    scipy.stats.bootstrap). The bounds lie at `bootstrap_z`, which is more than 1.96. None with
    fewer than two groups or where nothing varies. Measured coverage: tools/measure_coverage.py.
    """
    sums, sizes = group_sums(values, labels)
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
    first: Floats, second: Floats, labels: Ints, *, seed: int, resamples: int = RESAMPLES
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
    (above, sizes), (below, _) = (group_sums(values, labels) for values in (first, second))
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


def _ratio_of_sums(sums: Floats, sizes: Floats, axis: int = -1) -> Floats:
    ratio: Floats = sums.sum(axis=axis) / sizes.sum(axis=axis)
    return ratio


def _positive_or_zero(sem: float, values: Floats) -> float:
    """Equal values have no spread; rounding in the mean must not invent one."""
    return 0.0 if np.ptp(values) == 0.0 else sem

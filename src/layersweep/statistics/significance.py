"""Whether a difference may be chance. `flip_test` holds where neighbours correlate; the tests whose
names end in `iid` do not, and are never printed (tools/measure_tests.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from layersweep.statistics.groups import Floats, Groups, group_sums

DRAWS = 100_000
SMALLEST_VARIANCE = 0.25  # of the groups' own; see `_extremeness`
ROUNDING = 1e-9  # flips that only rounding separates from what was observed are as extreme
PIECE = 1 << 21  # signs at a time, so that memory does not grow with draws x groups

Signs = NDArray[np.int8]


def flip_test(
    values: Floats, groups: Groups, *, seed: int, draws: int = DRAWS, counts: bool = False
) -> float:
    """Two-sided p of mean 0: whole groups change sign, and the share of flips that are at least as
    extreme as what was observed is p (Fisher 1935, The Design of Experiments, section 21; over
    few groups: Canay, Romano & Shaikh 2017, Econometrica 85, 1013-1030).

    All flips are tried where they are no more than `draws` (16 groups), else `draws` of them with
    `seed`: p = (1 + extreme) / (1 + draws). G groups cannot give less than 2 / 2^G.

    `counts`: values are -1, 0 and 1, whose sums take few values, so that many flips are exactly as
    extreme. Each of them then counts half (the mid-p of Lancaster 1961, J. Am. Stat. Assoc. 56,
    223-234): counted whole, 60 needles would reach 5 % in 1.5 % of studies without a difference.
    """
    if not values.any():
        return 1.0
    sums, sizes = group_sums(values, groups.labels)
    neighbours = groups.kind == "blocks"
    unflipped = np.ones((1, len(sums)), np.int8)
    observed = _extremeness(unflipped, sums, sizes, neighbours)[0]
    beyond = equal = tried = 0
    exact = 2 ** len(sums) <= draws
    signs = _all_signs(len(sums)) if exact else _drawn_signs(len(sums), draws, seed)
    for some in _in_pieces(signs):
        flipped = _extremeness(some, sums, sizes, neighbours)
        more = int((flipped > observed * (1.0 + ROUNDING)).sum())
        beyond += more
        equal += int((flipped >= observed * (1.0 - ROUNDING)).sum()) - more
        tried += len(some)
    if not exact:  # what was observed is one more
        equal, tried = equal + 1, tried + 1
    return (beyond + equal * (0.5 if counts else 1.0)) / tried


def _extremeness(signs: Signs, sums: Floats, sizes: Floats, neighbours: bool) -> Floats:
    """How far the sums [G] are from 0 under each row of signs [R, G]: |total|, where groups are
    independent.

    Where neighbours correlate: |total| / sqrt(Q + 2 C), Q the sum of squared residuals from the
    mean and C that of the products of neighbours. Flips destroy the correlation and |total| alone
    would take it for an effect; over its own estimated spread it does not (Janssen 1997, Stat.
    Probab. Lett. 36, 9-21). That spread may come out at almost nothing by chance, so it is
    never less than Q / 4: of 1/10, 1/4 and 1/2, the one with false positives next to 5 % at
    correlations of 0 to 0.5.
    """
    total: Floats = np.abs(signs @ sums)
    if not neighbours:
        return total
    flipped = signs * sums
    residuals = flipped - (flipped.sum(axis=-1, keepdims=True) / sizes.sum()) * sizes
    squares = np.square(residuals).sum(axis=-1)
    products = (residuals[:, :-1] * residuals[:, 1:]).sum(axis=-1)
    spread = np.sqrt(np.maximum(SMALLEST_VARIANCE * squares, squares + 2.0 * products))
    without_spread = np.where(total > 0.0, np.inf, 0.0)
    extremeness: Floats = np.divide(total, spread, out=without_spread, where=spread > 0.0)
    return extremeness


def _all_signs(groups: int) -> Signs:
    """All signs of the groups but for a common one, which changes nothing: [2^(G - 1), G]."""
    flipped = np.arange(2 ** (groups - 1))[:, None] >> np.arange(groups) & 1
    return (1 - 2 * flipped).astype(np.int8)


@lru_cache(maxsize=1)  # the arms and pairs of a study have their groups and seed in common
def _drawn_signs(groups: int, draws: int, seed: int) -> Signs:
    """Random signs [draws, G]."""
    flipped = np.random.default_rng(seed).integers(2, size=(draws, groups), dtype=np.int8)
    return np.subtract(1, 2 * flipped, dtype=np.int8)


def _in_pieces(signs: Signs) -> Iterator[Signs]:
    """Some rows at a time: as floats, all of them would take much memory."""
    rows = max(1, PIECE // signs.shape[1])
    return (signs[first : first + rows] for first in range(0, len(signs), rows))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Scand. J. Stat. 1979).

    The i-th smallest of m (from 0) is multiplied by m - i, made monotone, and capped at 1.
    """
    adjusted = [1.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = running
    return adjusted


def sign_test_iid(values: Floats) -> float | None:
    """Exact two-sided sign test: binomial(1/2) on the non-zero values; None if all are zero."""
    positive, negative = int((values > 0).sum()), int((values < 0).sum())
    if positive + negative == 0:
        return None
    return float(stats.binomtest(positive, positive + negative, 0.5).pvalue)


def wilcoxon_test_iid(values: Floats) -> float | None:
    """Two-sided Wilcoxon signed-rank p (zeros dropped; exact for small samples without ties)."""
    nonzero = values[values != 0]
    if len(nonzero) == 0:
        return None
    return float(stats.wilcoxon(nonzero).pvalue)


def mcnemar_exact_iid(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: binomial(1/2) on discordant pairs; 1.0 when there are none."""
    if lost + gained == 0:
        return 1.0
    return float(stats.binomtest(lost, lost + gained, 0.5).pvalue)

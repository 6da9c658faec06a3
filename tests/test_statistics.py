"""Statistics against hand-computed numbers, scipy, and the coverage they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from layersweep.evals.statistics import (
    bca_interval,
    cluster_sem,
    group_windows,
    holm,
    iid_sem,
    lag1_autocorrelation,
    loss_ratio,
    mcnemar_exact,
    paired_statistics,
    quantiles,
    sign_test,
    wilcoxon_test,
    wilson_interval,
)


def clustered_study(rng, articles=24):
    """Unequal articles of 1-6 windows, half of the variance shared inside an article; mean 0.5."""
    sizes = rng.integers(1, 7, articles)
    groups = np.repeat(np.arange(articles), sizes)
    shared = rng.standard_normal(articles)[groups]
    return 0.5 + 0.7 * shared + 0.7 * rng.standard_normal(len(groups)), groups


def two_arm_study(rng, articles=24):
    """Losses of two arms on the same unequal articles; the first loses half of the second's 1.0."""
    groups = np.repeat(np.arange(articles), rng.integers(1, 7, articles))
    shared = rng.standard_normal(articles)[groups]
    own = rng.standard_normal((2, len(groups)))
    return 0.5 + 0.25 * shared + 0.4 * own[0], 1.0 + 0.5 * shared + 0.5 * own[1], groups


def test_five_known_deltas():
    found = paired_statistics(np.array([0.01, 0.02, -0.01, 0.03, 0.05]), np.arange(5), seed=0)
    assert found.mean == pytest.approx(0.02)
    assert found.delta_percent == pytest.approx(2.0201340, abs=1e-6)
    assert found.sem_iid == pytest.approx(0.01, abs=1e-12)  # s = sqrt(0.002 / 4), over sqrt(5)
    assert found.sem == pytest.approx(0.01, abs=1e-12)  # one window per group: the same
    assert found.z == pytest.approx(2.0)
    assert found.n_negative == 1
    assert found.p_sign == pytest.approx(0.375)  # 2 * (1 + 5) / 32
    assert found.p_wilcoxon == pytest.approx(0.1875)  # ranks: |-0.01| ties with 0.01 at 1.5
    assert found.mde_percent == pytest.approx(2.8)
    assert (found.n, found.groups) == (5, 5)


def test_two_sigma_is_strict_and_has_the_sign_of_neither_side():
    values = np.array([1.0, 2.0, 3.0, 2.5])
    assert paired_statistics(values, np.arange(4), seed=0).significant_2sigma is True
    assert paired_statistics(-values, np.arange(4), seed=0).significant_2sigma is True
    assert paired_statistics(values - 2, np.arange(4), seed=0).significant_2sigma is False


def test_cluster_sem_by_hand():
    # groups {1, 3}, {5}, {0, 0, 3}: mean 2, residual sums 0, 3, -3; 3/2 * 18 / 36 = 0.75
    values, groups = np.array([1.0, 3.0, 5.0, 0.0, 0.0, 3.0]), np.array([7, 7, 2, 4, 4, 4])
    assert cluster_sem(values, groups) == pytest.approx(math.sqrt(0.75))


def test_identical_windows_in_a_group_count_once():
    rng = np.random.default_rng(0)
    base = rng.standard_normal(30)
    repeated, groups = np.repeat(base, 4), np.repeat(np.arange(30), 4)
    assert cluster_sem(repeated, groups) == pytest.approx(iid_sem(base))
    assert iid_sem(repeated) == pytest.approx(iid_sem(base) / 2, rel=0.02)


def test_bca_equals_scipy_where_every_group_is_one_window():
    values = np.random.default_rng(3).gamma(2.0, size=40)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = bca_interval(values, np.arange(40), seed=1)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_bca_is_deterministic_and_follows_its_seed():
    values, groups = clustered_study(np.random.default_rng(5))
    assert bca_interval(values, groups, seed=1) == bca_interval(values, groups, seed=1)
    assert bca_interval(values, groups, seed=1) != bca_interval(values, groups, seed=2)


def test_coverage_of_clustered_intervals():
    """200 studies: the BCa interval over articles holds the mean as often as it says; iid fails."""
    rng = np.random.default_rng(20)
    held = held_iid = 0
    for study in range(200):
        values, groups = clustered_study(rng)
        low, high = bca_interval(values, groups, seed=study, resamples=800)
        held += low <= 0.5 <= high
        held_iid += abs(values.mean() - 0.5) <= 1.96 * iid_sem(values)
    assert 0.88 <= held / 200 <= 0.985
    assert held_iid / 200 < 0.86


def test_loss_ratio_equals_scipy_over_the_sums_of_articles():
    first, second, groups = two_arm_study(np.random.default_rng(8))
    sums = [[arm[groups == group].sum() for group in range(24)] for arm in (first, second)]
    theirs = stats.bootstrap(
        sums,
        lambda above, below, axis: above.sum(axis) / below.sum(axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = loss_ratio(first, second, groups, seed=2)
    assert found.value == pytest.approx(first.mean() / second.mean())
    assert found.ci95 == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_loss_ratio_has_the_linearized_spread_of_a_ratio_estimator():
    """Many groups: r +- 1.96 sqrt(sum (A_g - r B_g)^2) / sum B_g (Cochran, section 6.4)."""
    rng = np.random.default_rng(9)
    second = 1.0 + 0.3 * rng.standard_normal(400)
    first = 0.4 * second + 0.2 * rng.standard_normal(400)
    ratio = first.sum() / second.sum()
    half = 1.96 * math.sqrt(((first - ratio * second) ** 2).sum()) / second.sum()
    found = loss_ratio(first, second, np.arange(400), seed=0)
    assert found.ci95 == pytest.approx((ratio - half, ratio + half), abs=0.1 * half)


def test_proportional_losses_have_their_factor_and_no_spread():
    _, second, groups = two_arm_study(np.random.default_rng(5))
    found = loss_ratio(0.25 * second, second, groups, seed=0)
    assert (found.value, *found.ci95) == pytest.approx((0.25, 0.25, 0.25))
    assert loss_ratio(second, second, groups, seed=0).ci95 == (1.0, 1.0)


def test_a_gain_has_a_negative_ratio_and_the_seed_decides():
    first, second, groups = two_arm_study(np.random.default_rng(6), articles=60)
    gain = loss_ratio(-first, second, groups, seed=1)
    loss = loss_ratio(first, second, groups, seed=1)
    assert (gain.value, gain.ci95) == (-loss.value, pytest.approx([-b for b in loss.ci95[::-1]]))
    assert loss == loss_ratio(first, second, groups, seed=1)
    assert loss != loss_ratio(first, second, groups, seed=2)


@pytest.mark.parametrize("offset", [-1.0, 0.0, 0.1])
def test_a_denominator_that_is_not_clearly_positive_gives_none(offset):
    first, second, groups = two_arm_study(np.random.default_rng(7))
    assert loss_ratio(first, second, groups, seed=0) is not None
    assert loss_ratio(first, second - second.mean() + offset, groups, seed=0) is None


def test_no_ratio_without_two_groups_or_without_any_loss():
    two = np.array([0.3, 0.4])
    assert loss_ratio(two, two, np.array([0, 0]), seed=0) is None
    assert loss_ratio(two, np.zeros(2), np.arange(2), seed=0) is None


@pytest.mark.parametrize(("articles", "coverage"), [(10, 0.908), (24, 0.949)])
def test_coverage_of_loss_ratios(articles, coverage):
    """1000 studies: the share of intervals that hold the true ratio, 0.5. Few articles: short."""
    rng = np.random.default_rng(30)
    found = [
        loss_ratio(*two_arm_study(rng, articles), seed=study, resamples=2000)
        for study in range(1000)
    ]
    intervals = [ratio.ci95 for ratio in found if ratio is not None]
    assert len(intervals) >= 950
    held = np.mean([low <= 0.5 <= high for low, high in intervals])
    assert held == pytest.approx(coverage, abs=0.01)


def test_cluster_sem_matches_the_spread_of_means():
    rng = np.random.default_rng(21)
    studies = [clustered_study(rng) for _ in range(600)]
    spread = np.std([values.mean() for values, _ in studies])
    claimed = np.mean([cluster_sem(values, groups) for values, groups in studies])
    assert claimed == pytest.approx(spread, rel=0.12)
    assert np.mean([iid_sem(values) for values, _ in studies]) < 0.75 * spread


def test_undefined_numbers_are_none():
    zeros = paired_statistics(np.zeros(8), np.arange(8) // 4, seed=0)
    assert (zeros.mean, zeros.sem, zeros.sem_iid) == (0.0, 0.0, 0.0)
    assert (zeros.z, zeros.ci95, zeros.p_sign, zeros.p_wilcoxon) == (None, None, None, None)
    constant = paired_statistics(np.full(7, 0.1), np.arange(7), seed=0)
    assert (constant.sem, constant.z, constant.ci95) == (0.0, None, None)
    single = paired_statistics(np.array([0.3]), np.array([0]), seed=0)
    assert (single.sem, single.sem_iid, single.z, single.mde_percent) == (None, None, None, None)
    one_article = paired_statistics(np.array([0.3, 0.4]), np.array([0, 0]), seed=0)
    assert one_article.sem is None
    assert one_article.sem_iid == pytest.approx(0.05)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_no_figure_is_ever_nan(values, width):
    found = paired_statistics(np.array(values), np.arange(len(values)) // width, seed=0)
    for value in vars(found).values():
        for number in value if isinstance(value, tuple) else (value,):
            assert number is None or math.isfinite(number)
    if found.ci95:
        assert found.ci95[0] <= found.ci95[1]


def test_groups_are_articles_when_there_are_enough():
    titles = [f"a{index // 3}" for index in range(30)]
    assert group_windows(titles).tolist() == [index // 3 for index in range(30)]


def test_groups_are_blocks_of_four_without_headings_or_with_too_few():
    blocks = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert group_windows([None] * 10).tolist() == blocks
    assert group_windows(["one"] * 10).tolist() == blocks
    long = ["first"] * 40 + ["second"] * 40
    assert len(set(group_windows(long).tolist())) == 20


def test_text_before_the_first_heading_is_grouped_in_blocks():
    labels = group_windows([None] * 6 + [f"a{index}" for index in range(8)]).tolist()
    assert labels == [0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_sign_and_wilcoxon_drop_zeros():
    values = np.array([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.5])
    assert sign_test(values) == pytest.approx(2 / 32)
    assert wilcoxon_test(values) == pytest.approx(2 / 32)
    known = np.random.default_rng(0).standard_normal(80) + 0.2
    assert wilcoxon_test(known) == pytest.approx(stats.wilcoxon(known).pvalue)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, None, 0.6]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_wilson_equals_scipy_and_the_known_bounds():
    for correct, n in ((5, 5), (60, 60), (59, 60), (0, 20), (7, 20)):
        theirs = stats.binomtest(correct, n).proportion_ci(method="wilson")
        assert wilson_interval(correct, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert wilson_interval(5, 5)[0] == pytest.approx(0.566, abs=5e-4)
    assert wilson_interval(60, 60)[0] == pytest.approx(0.940, abs=5e-4)
    assert wilson_interval(0, 0) is None


def test_mcnemar_is_the_binomial_of_discordant_pairs():
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(6, 0) == pytest.approx(2 / 64)
    assert mcnemar_exact(1, 0) == 1.0
    assert mcnemar_exact(8, 2) == pytest.approx(0.109375)


def test_lag1_of_known_series():
    assert lag1_autocorrelation(np.array([1.0, -1.0] * 10)) == pytest.approx(-0.95)
    assert lag1_autocorrelation(np.ones(5)) is None
    trend = lag1_autocorrelation(np.arange(100.0))
    assert trend == pytest.approx(0.97, abs=0.005)


def test_quantiles_of_a_ramp():
    found = quantiles(np.arange(1001, dtype=np.float32).reshape(7, 143))
    assert (found.mean, found.p50, found.p99, found.p999, found.max) == (500, 500, 990, 999, 1000)

"""Statistics against hand-computed numbers, scipy, and the coverage they promise."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from layersweep.statistics.groups import Groups, group_haystacks, group_windows
from layersweep.statistics.intervals import (
    bca_interval,
    bootstrap_z,
    cluster_sem,
    iid_sem,
    lag1_autocorrelation,
    loss_ratio,
    wilson_interval,
)
from layersweep.statistics.paired import paired_statistics, quantiles
from layersweep.statistics.significance import (
    flip_test,
    holm,
    mcnemar_exact_iid,
    sign_test_iid,
    wilcoxon_test_iid,
)

TOOLS = Path(__file__).parents[1] / "tools"


def articles(*labels):
    return Groups("articles", np.array(labels))


def apart(n):
    """Every window an article of its own."""
    return articles(*range(n))


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
    found = paired_statistics(np.array([0.01, 0.02, -0.01, 0.03, 0.05]), apart(5), seed=0)
    assert found.mean == pytest.approx(0.02)
    assert found.delta_percent == pytest.approx(2.0201340, abs=1e-6)
    assert found.sem_iid == pytest.approx(0.01, abs=1e-12)  # s = sqrt(0.002 / 4), over sqrt(5)
    assert found.sem == pytest.approx(0.01, abs=1e-12)  # one window per group: the same
    assert found.z == pytest.approx(2.0)
    assert found.n_negative == 1
    assert found.p_sign_iid == pytest.approx(0.375)  # 2 * (1 + 5) / 32
    assert found.p_wilcoxon_iid == pytest.approx(0.1875)  # ranks: |-0.01| ties with 0.01 at 1.5
    assert found.p_flip == pytest.approx(6 / 32)  # sums of 0.12, 0.10 and 0.10, and their mirror
    assert (found.n_worse, found.mde_percent) == (4, pytest.approx(2.8))
    assert (found.n, found.groups) == (5, 5)


def test_two_sigma_is_strict_and_has_the_sign_of_neither_side():
    values = np.array([1.0, 2.0, 3.0, 2.5])
    assert paired_statistics(values, apart(4), seed=0).significant_2sigma is True
    assert paired_statistics(-values, apart(4), seed=0).significant_2sigma is True
    assert paired_statistics(values - 2, apart(4), seed=0).significant_2sigma is False


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


def z_of(residuals, sizes):
    return bootstrap_z(np.array(residuals, float), np.array(sizes, float), 10_000)


def test_bounds_lie_at_a_t_quantile_of_as_many_groups_as_the_sizes_are_worth():
    alternating = [1.0, -1.0] * 10
    # t(0.975; 19) = 2.09302, sqrt(20 / 19) = 1.02598
    assert z_of(alternating, [4] * 20) == pytest.approx(2.14739, abs=1e-4)
    # 10 groups of 6 and 10 of 2: 80^2 / 400 = 16; t(0.975; 15) = 2.13145, sqrt(16 / 15) = 1.03280
    assert z_of(alternating, [6, 2] * 10) == pytest.approx(2.20135, abs=1e-4)
    assert z_of([1.0, -1.0] * 200_000, [4] * 400_000) == pytest.approx(1.95998, abs=1e-4)


def test_like_neighbours_widen_and_unlike_ones_do_not_narrow():
    # products of neighbours 1 -1 1 -1 1 -1 1 over squares 8: r = 1 / 8; t(0.975; 7) = 2.36462
    widened = math.sqrt(8 / 7 * (1 + 2 / 8)) * 2.36462
    assert z_of([1, 1, -1, -1] * 2, [4] * 8) == pytest.approx(widened, abs=1e-4)
    assert z_of([1, -1] * 4, [4] * 8) == pytest.approx(math.sqrt(8 / 7) * 2.36462, abs=1e-4)


def test_bounds_stay_within_the_resamples():
    outermost = 3.71902  # one of 10,000 lies beyond
    assert z_of([1, -1], [40, 1]) == pytest.approx(outermost, abs=1e-4)
    values = np.array([0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.2, 0.2])
    low, high = bca_interval(values, np.arange(8) // 4, seed=0)
    assert (low, high) == pytest.approx((0.2, 0.25))  # the means of the two groups


def test_bca_equals_scipy_where_every_group_is_one_window():
    values = np.random.default_rng(3).gamma(2.0, size=40)
    assert lag1_autocorrelation(values) < 0
    z = math.sqrt(40 / 39) * stats.t.ppf(0.975, 39)
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=10_000,
        method="BCa",
        confidence_level=2 * stats.norm.cdf(z) - 1,
        rng=np.random.default_rng(1),
    ).confidence_interval
    low, high = bca_interval(values, np.arange(40), seed=1)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_bca_of_unequal_groups_by_efrons_formulas():
    """Bias from the share of resamples below the mean, acceleration from leaving groups out."""
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(16), rng.integers(1, 7, 16))
    values = rng.exponential(size=len(groups))
    sums = np.array([values[groups == g].sum() for g in range(16)])
    sizes = np.array([(groups == g).sum() for g in range(16)], float)
    counts = rng.multinomial(16, np.full(16, 1 / 16), size=40_000)
    means = (counts @ sums) / (counts @ sizes)
    bias = stats.norm.ppf((means < values.mean()).mean())
    left_out = (sums.sum() - sums) / (sizes.sum() - sizes)
    skewed = left_out.mean() - left_out
    acceleration = (skewed**3).sum() / (6 * (skewed**2).sum() ** 1.5)
    z = bootstrap_z(sums - values.mean() * sizes, sizes, 10_000)
    shifted = bias + np.array([-z, z])
    expected = np.quantile(means, stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    assert bca_interval(values, groups, seed=1) == pytest.approx(tuple(expected), abs=0.02)


def test_bca_is_deterministic_and_follows_its_seed():
    values, groups = clustered_study(np.random.default_rng(5))
    assert bca_interval(values, groups, seed=1) == bca_interval(values, groups, seed=1)
    assert bca_interval(values, groups, seed=1) != bca_interval(values, groups, seed=2)


def test_coverage_of_simulated_studies():
    """The fast part of tools/measure_coverage.py: 100 studies of 80 windows per case.

    Each case may miss 93-97 % by 2 binomial errors, sqrt(0.95 * 0.05 / 100) = 2 %; all 600
    together, with an error of 0.9 %, may not. At 1.96 they hold 91 %.
    """
    tool = runpy.run_path(str(TOOLS / "measure_coverage.py"))
    held = [
        tool["count_inside"](case, groups, stretches, 100, resamples=1000) / 100
        for groups, stretches in tool["groupings"]()
        for case in tool["CASES"]
        if case.must_hold
    ]
    assert len(held) == 6
    assert min(held) >= 0.89, held
    assert 0.93 <= np.mean(held) <= 0.97


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
    residuals = np.array(sums[0]) - first.mean() / second.mean() * np.array(sums[1])
    z = bootstrap_z(residuals, np.bincount(groups).astype(float), 10_000)
    theirs = stats.bootstrap(
        sums,
        lambda above, below, axis: above.sum(axis) / below.sum(axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        confidence_level=2 * stats.norm.cdf(z) - 1,
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


@pytest.mark.parametrize("articles", [10, 24])
def test_coverage_of_loss_ratios(articles):
    """500 studies: the share of intervals that hold the true ratio, 0.5; its error is 1 %."""
    rng = np.random.default_rng(30)
    found = [
        loss_ratio(*two_arm_study(rng, articles), seed=study, resamples=1000)
        for study in range(500)
    ]
    intervals = [ratio.ci95 for ratio in found if ratio is not None]
    assert len(intervals) >= 470
    assert 0.93 <= np.mean([low <= 0.5 <= high for low, high in intervals]) <= 0.97


def test_cluster_sem_matches_the_spread_of_means():
    rng = np.random.default_rng(21)
    studies = [clustered_study(rng) for _ in range(600)]
    spread = np.std([values.mean() for values, _ in studies])
    claimed = np.mean([cluster_sem(values, groups) for values, groups in studies])
    assert claimed == pytest.approx(spread, rel=0.12)
    assert np.mean([iid_sem(values) for values, _ in studies]) < 0.75 * spread


def test_undefined_numbers_are_none():
    zeros = paired_statistics(np.zeros(8), blocks(8), seed=0)
    assert (zeros.mean, zeros.sem, zeros.sem_iid) == (0.0, 0.0, 0.0)
    assert (zeros.z, zeros.ci95, zeros.p_sign_iid, zeros.p_wilcoxon_iid) == (None,) * 4
    assert zeros.p_flip == 1.0
    constant = paired_statistics(np.full(7, 0.1), apart(7), seed=0)
    assert (constant.sem, constant.z, constant.ci95) == (0.0, None, None)
    single = paired_statistics(np.array([0.3]), apart(1), seed=0)
    assert (single.sem, single.sem_iid, single.z, single.mde_percent) == (None, None, None, None)
    one_article = paired_statistics(np.array([0.3, 0.4]), articles(0, 0), seed=0)
    assert one_article.sem is None
    assert one_article.sem_iid == pytest.approx(0.05)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_no_figure_is_ever_nan(values, width):
    groups = Groups("blocks", np.arange(len(values)) // width)
    found = paired_statistics(np.array(values), groups, seed=0)
    for value in vars(found).values():
        for number in value if isinstance(value, tuple) else (value,):
            assert number is None or math.isfinite(number)
    if found.ci95:
        assert found.ci95[0] <= found.ci95[1]


def test_groups_are_articles_when_there_are_enough():
    titles = [f"a{index // 3}" for index in range(30)]
    found = group_windows(titles)
    assert (found.kind, found.count) == ("articles", 10)
    assert found.labels.tolist() == [index // 3 for index in range(30)]


def test_groups_are_blocks_of_four_without_headings_or_with_too_few():
    for found in (group_windows([None] * 10), group_windows(["one"] * 10)):
        assert found.kind == "blocks"
        assert found.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert group_windows(["first"] * 40 + ["second"] * 40).count == 20


def test_text_before_the_first_heading_is_grouped_in_blocks():
    found = group_windows([None] * 6 + [f"a{index}" for index in range(8)])
    assert found.labels.tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=5, max_size=40).filter(any))
def test_plain_tests_equal_scipys(values):
    """Integers have ties and zeros, as deltas of equal windows do."""
    deltas = np.array(values, float)
    nonzero = deltas[deltas != 0]
    wins = stats.binomtest(int((nonzero > 0).sum()), len(nonzero))
    assert sign_test_iid(deltas) == pytest.approx(wins.pvalue)
    assert wilcoxon_test_iid(deltas) == pytest.approx(stats.wilcoxon(nonzero).pvalue)
    assert iid_sem(deltas) == pytest.approx(stats.sem(deltas))
    assert cluster_sem(deltas, np.arange(len(deltas))) == pytest.approx(stats.sem(deltas))


def test_wilcoxon_by_counting_sign_patterns():
    """Six distinct ranks, the smallest negative: W = 1, P(W <= 1) = 2 / 64, twice that."""
    assert wilcoxon_test_iid(np.array([-0.1, 0.2, 0.3, 0.4, 0.5, 0.6])) == pytest.approx(4 / 64)


def test_sign_and_wilcoxon_drop_zeros():
    values = np.array([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.5])
    assert sign_test_iid(values) == pytest.approx(2 / 32)
    assert wilcoxon_test_iid(values) == pytest.approx(2 / 32)
    known = np.random.default_rng(0).standard_normal(80) + 0.2
    assert wilcoxon_test_iid(known) == pytest.approx(stats.wilcoxon(known).pvalue)


def blocks(n):
    return Groups("blocks", np.arange(n) // 4)


def test_flips_by_hand():
    # sums 3, 1, -1 of {1, 2}, {1}, {-1}: |3|; 3 +- 1 +- 1 is 3 or more for 3 of 4, and their mirror
    values = np.array([1.0, 2.0, 1.0, -1.0])
    assert flip_test(values, articles(0, 0, 1, 2), seed=0) == 3 / 4
    assert flip_test(values, articles(0, 0, 0, 0), seed=0) == 1.0


def test_flips_over_neighbours_by_hand():
    """Block sums 3, 1 of 4 windows each: total 4, mean 2, residuals 1 and -1, Q = 2 and C = -1, the
    spread Q / 4. Flipped, 3 and -1: total 2, residuals 2 and -2. Twice 2 of 4 are as extreme."""
    values = np.repeat([0.75, 0.25], 4)
    assert flip_test(values, blocks(8), seed=0) == 1 / 2
    # 3, 3: no spread at all, which only the same sums have; 3, -3 is 0 over 12
    assert flip_test(np.full(8, 0.75), blocks(8), seed=0) == 1 / 2
    # 5, 2, 1, 2: Q = 9, C = -1.25 (r = 2.5, -0.5, -1.5, -0.5), 10 / sqrt(6.5) = 3.92; of the
    # other seven, only 5, 2, -1, 2 with 8 / sqrt(18 + 2 * -4.5) = 2.67 comes near
    assert flip_test(np.repeat([5.0, 2.0, 1.0, 2.0], 4) / 4, blocks(16), seed=0) == 1 / 8


def test_flips_are_counted_up_to_sixteen_groups_and_drawn_beyond():
    sixteen, seventeen = np.ones(16), np.ones(17)
    assert flip_test(sixteen, apart(16), seed=0) == 2 / 2**16
    assert flip_test(seventeen, apart(17), seed=0) == flip_test(seventeen, apart(17), seed=0)
    drawn = [flip_test(seventeen, apart(17), seed=seed) for seed in range(4)]
    assert set(drawn) <= {(1 + hits) / 100_001 for hits in range(12)}  # 1.5 of 100,000 expected
    known = np.random.default_rng(2).standard_normal(17) + 0.4
    shares = [flip_test(known, apart(17), seed=seed) for seed in (1, 2)]
    assert shares[0] != shares[1]
    assert shares[0] == pytest.approx(shares[1], rel=0.1)
    exact = stats.permutation_test(
        (known,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert shares[0] == pytest.approx(exact.pvalue, rel=0.1)


def test_flips_of_needles_apart_are_mcnemars():
    for lost, gained in ((6, 0), (8, 2), (1, 0), (0, 0)):
        verdicts = np.array([-1.0] * lost + [1.0] * gained + [0.0] * (14 - lost - gained))
        apart = Groups("stretches", np.arange(14))
        p = flip_test(verdicts, apart, seed=0)
        assert p == pytest.approx(mcnemar_exact_iid(lost, gained))
        # the mid-p takes half of the chance of just this many, on both sides
        half = stats.binom.pmf(gained, lost + gained, 0.5) if lost else 0.0
        assert flip_test(verdicts, apart, seed=0, counts=True) == pytest.approx(p - half)


def test_haystacks_are_grouped_by_stretches_of_four():
    ranges = [(0, 100), (350, 450), (399, 499), (400, 480), (1250, 1340)]
    found = group_haystacks(ranges)
    assert (found.kind, found.labels.tolist()) == ("stretches", [0, 0, 0, 1, 3])
    assert group_haystacks([]).count == 0


def test_false_positives_of_every_printed_p(monkeypatch):
    """The fast part of tools/measure_tests.py: 100 studies, 4 arms each, and all of them pooled.

    Blocks at 0.5 are the hard case: Wilcoxon over their windows errs in a quarter of the studies.
    """
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = runpy.run_path(str(TOOLS / "measure_tests.py"))
    printed = []
    for rho in (0.0, 0.5):
        for groups, stretches in tool["groupings"](80):
            found = tool["count_windows"](groups, stretches, rho, 100)
            printed += [count for name, count in found.items() if "iid" not in name]
            if rho:
                assert found["Wilcoxon, iid"] / 100 > 0.15
    # 2.5 binomial errors of one, sqrt(0.05 * 0.95 / 100) = 2.2 %; the mean of all has a third of it
    assert max(printed) / 100 <= 0.105, printed
    assert 0.03 <= np.mean(printed) / 100 <= 0.07
    needles = tool["count_needles"](60, 0.5, 100)
    assert needles["sign flips"] / 100 <= 0.07


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    # 0.01 x 5, 0.012 x 4 = 0.048 raised to 0.05, 0.02 x 3, 0.03 x 2, 0.5 x 1, in any order
    assert holm([0.5, 0.03, 0.01, 0.012, 0.02]) == pytest.approx([0.5, 0.06, 0.05, 0.05, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_wilson_equals_scipy_and_the_known_bounds():
    for correct, n in ((5, 5), (60, 60), (59, 60), (0, 20), (7, 20)):
        theirs = stats.binomtest(correct, n).proportion_ci(method="wilson")
        assert wilson_interval(correct, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert wilson_interval(5, 5)[0] == pytest.approx(0.566, abs=5e-4)
    assert wilson_interval(60, 60)[0] == pytest.approx(0.940, abs=5e-4)
    assert wilson_interval(0, 0) is None


def test_mcnemar_is_the_binomial_of_discordant_pairs():
    assert mcnemar_exact_iid(0, 0) == 1.0
    assert mcnemar_exact_iid(6, 0) == pytest.approx(2 / 64)
    assert mcnemar_exact_iid(1, 0) == 1.0
    assert mcnemar_exact_iid(8, 2) == pytest.approx(0.109375)
    for lost, gained in ((14, 0), (3, 5), (20, 31)):
        theirs = stats.binomtest(lost, lost + gained).pvalue
        assert (
            mcnemar_exact_iid(lost, gained)
            == mcnemar_exact_iid(gained, lost)
            == pytest.approx(theirs)
        )


def test_lag1_of_known_series():
    assert lag1_autocorrelation(np.array([1.0, -1.0] * 10)) == pytest.approx(-0.95)
    assert lag1_autocorrelation(np.ones(5)) is None
    trend = lag1_autocorrelation(np.arange(100.0))
    assert trend == pytest.approx(0.97, abs=0.005)


def test_quantiles_of_a_ramp():
    found = quantiles(np.arange(1001, dtype=np.float32).reshape(7, 143))
    assert (found.mean, found.p50, found.p99, found.p999, found.max) == (500, 500, 990, 999, 1000)

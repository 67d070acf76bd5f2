"""eval/statistics.py: textbook values, other libraries, and what has no items."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from eval import statistics as st


def test_wilson_textbook_and_degenerate():
    # Newcombe (1998), table I: 81 of 263, 0 of 20, 1 of 29.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        found = st.wilson(successes, n)
        assert found.value == successes / n
        assert found.interval == pytest.approx((low, high), abs=5e-5)
    assert st.wilson(0, 0).to_dict() == {
        "value": None,
        "interval_95": None,
        "n": 0,
        "note": "no items",
    }
    assert st.wilson(1, 1).interval[1] == pytest.approx(1)
    with pytest.raises(ValueError, match="3 of 2"):
        st.wilson(3, 2)


def test_clustered_mean_is_the_cluster_robust_one_of_statsmodels():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 12, 80)
    values = rng.normal(size=80) + rng.normal(size=12)[clusters]
    fit = sm.OLS(values, np.ones(80)).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True
    )
    found = st.clustered_mean(values, clusters)
    assert found.value == pytest.approx(values.mean())
    assert found.interval == pytest.approx(tuple(fit.conf_int()[0]))
    assert (found.n, found.clusters) == (80, 12)
    # Dependence widens it: the same items, each a cluster of its own.
    alone = st.clustered_mean(values, range(80))
    assert np.ptp(found.interval) > np.ptp(alone.interval)
    # That one is the t interval of the textbook.
    expected = stats.t.interval(0.95, 79, values.mean(), stats.sem(values))
    assert alone.interval == pytest.approx(expected)


def test_copies_of_items_add_nothing_to_a_clustered_interval():
    values = [0.0, 1.0, 1.0, 3.0]
    once = st.clustered_mean(values, range(4))
    often = st.clustered_mean(np.repeat(values, 50), np.repeat(range(4), 50))
    assert often.interval == pytest.approx(once.interval)


def test_ratio_interval_by_hand():
    # R = 6/4; residuals −0.5, 0.5; variance 2/1 · 0.5 / 16 = 1/16; t at one degree of freedom 12.7062.
    found = st.ratio_interval([1, 5], [1, 3])
    assert found.value == 1.5
    assert found.interval == pytest.approx((1.5 - 12.7062 / 4, 1.5 + 12.7062 / 4), abs=1e-4)
    assert st.ratio_interval([], []).value is None
    assert st.ratio_interval([0, 0], [0, 0]).note == "no row has any item"
    one = st.ratio_interval([2], [4])
    assert (one.value, one.interval, one.note) == (0.5, None, "one cluster: no interval")
    with pytest.raises(ValueError, match="2 and 1"):
        st.ratio_interval([1, 2], [1])


def test_clustered_share():
    hits = [True, False, True, True, False, False, True, True, False, True]
    # Where every item is a cluster it is close to Wilson's interval: the effective size is n − 1.
    found = st.clustered_share(hits, range(10))
    assert found.interval == pytest.approx(
        st.proportion_confint(0.6 * 9, 9, method="wilson"), abs=1e-9
    )
    # Ten copies of each item are no more information.
    copies = st.clustered_share(np.repeat(hits, 10), np.repeat(range(10), 10))
    assert copies.interval == pytest.approx(found.interval)
    # At 0 and 1 each cluster counts once, so 40 claims of 4 answers leave much room.
    everything = st.clustered_share([True] * 40, np.repeat(range(4), 10))
    assert everything.interval == pytest.approx(st.wilson(4, 4).interval)
    assert st.clustered_share([], []).to_dict()["value"] is None
    assert st.clustered_share([True, False], ["a", "a"]).interval is None


def test_clustered_share_covers_the_truth():
    """Of 400 samples of 40 clusters of like items, 95 % of the intervals hold the true share; plain Wilson does not."""
    rng = np.random.default_rng(1)
    held = {"clustered": 0, "plain": 0}
    for _ in range(400):
        share = rng.beta(2, 2, 40)  # of a cluster; 0.5 on average
        sizes = rng.integers(1, 9, 40)
        clusters = np.repeat(range(40), sizes)
        hits = rng.random(len(clusters)) < share[clusters]
        for name, found in (
            ("clustered", st.clustered_share(hits, clusters)),
            ("plain", st.wilson(int(hits.sum()), len(hits))),
        ):
            held[name] += found.interval[0] <= 0.5 <= found.interval[1]
    assert 0.92 <= held["clustered"] / 400 <= 0.98
    assert held["plain"] / 400 < 0.90


def test_bootstrap_difference():
    rng = np.random.default_rng(2)
    second = rng.normal(size=60)
    first = second + rng.normal(0.3, 0.2, 60)
    found = st.bootstrap_difference(first, second, seed=3)
    # The pairs cancel what they share: the interval is that of the differences, about the t interval.
    expected = stats.ttest_rel(first, second).confidence_interval()
    assert found.value == pytest.approx((first - second).mean())
    assert found.interval == pytest.approx((expected.low, expected.high), abs=0.01)
    assert st.bootstrap_difference(first, second, seed=3) == found


@pytest.mark.parametrize(
    ("first", "second", "interval", "note"),
    [
        ([], [], None, "no items"),
        ([1.0], [0.5], None, "one item: no interval"),
        ([1, 1, 1], [1, 1, 1], (0.0, 0.0), st.NO_WIDTH),
        ([3, 2, 1], [2, 1, 0], (1.0, 1.0), st.NO_WIDTH),
    ],
)
def test_bootstrap_difference_degenerate(first, second, interval, note):
    found = st.bootstrap_difference(first, second)
    assert (found.interval, found.note) == (interval, note)


def test_bootstrap_ratio_difference():
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 6, 50)
    first = (rng.binomial(sizes, 0.7), sizes)
    second = (rng.binomial(sizes, 0.3), sizes)
    found = st.bootstrap_ratio_difference(first, second)
    assert found.value == pytest.approx((first[0].sum() - second[0].sum()) / sizes.sum())
    assert 0 < found.interval[0] < found.value < found.interval[1]
    same = st.bootstrap_ratio_difference(first, first)
    assert (same.value, same.interval, same.note) == (0, (0, 0), st.NO_WIDTH)
    empty = st.bootstrap_ratio_difference(first, (np.zeros(50), np.zeros(50)))
    assert empty.value is None
    # Some resamples of these hold no item at all.
    rare = st.bootstrap_ratio_difference(([1, 0, 1], [1, 0, 2]), ([0, 0, 1], [1, 0, 2]))
    assert (rare.value, rare.interval) == (pytest.approx(1 / 3), None)


def test_mcnemar_textbook_and_degenerate():
    # Ten items that the first alone has right, two that the second alone: 2 · P(X ≤ 2 of 12) = 158/4096.
    first = [True] * 10 + [False] * 2 + [True] * 30
    second = [False] * 10 + [True] * 2 + [True] * 30
    found = st.mcnemar(first, second)
    assert found == {"only_first": 10, "only_second": 2, "p_value": pytest.approx(158 / 4096)}
    assert st.mcnemar([True, False], [True, False])["p_value"] == 1
    assert st.mcnemar([], [])["p_value"] == 1
    with pytest.raises(ValueError, match="argument 2 is"):
        st.mcnemar([True], [])


def test_holm():
    # 0.01 · 4, 0.02 · 3, 0.03 · 2, then none below its predecessor.
    assert st.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert st.holm([0.9, 0.8]) == [1.0, 1.0]
    assert st.holm([0.2]) == [0.2]
    assert st.holm([]) == []


def test_minimum_detectable_effect_is_found_with_the_power_it_names():
    effect = st.minimum_detectable_effect(500, 0.2)
    # Connor: n = (1.96 √ψ + 0.8416 √(ψ − δ²))² / δ².
    needed = (1.959964 * math.sqrt(0.2) + 0.841621 * math.sqrt(0.2 - effect**2)) ** 2 / effect**2
    assert needed == pytest.approx(500, rel=1e-5)
    rng = np.random.default_rng(5)
    share = [(0.2 + effect) / 2, (0.2 - effect) / 2, 0.8]
    draws = rng.multinomial(500, share, 2000)
    found = np.mean([stats.binomtest(int(a), int(a + b)).pvalue < 0.05 for a, b, _ in draws])
    assert 0.74 < found < 0.84  # the exact test is a little weaker than the formula
    assert st.minimum_detectable_effect(2000, 0.2) < effect
    for n, share in [(0, 0.2), (100, 0.0), (4, 0.1)]:
        assert st.minimum_detectable_effect(n, share) is None
    with pytest.raises(ValueError, match=r"1\.2"):
        st.minimum_detectable_effect(10, 1.2)


def test_calibration():
    # One bin holds 0.9, 0.9 (half right), another 0.3 (wrong): (2 · 0.4 + 1 · 0.3) / 3.
    found = st.expected_calibration_error([0.9, 0.9, 0.3], [True, False, False], bins=10)
    assert found == pytest.approx((2 * 0.4 + 0.3) / 3)
    assert st.expected_calibration_error([1.0, 0.0], [True, False]) == 0
    assert st.expected_calibration_error([], []) is None
    # An edge is of the bin below it: 0.5 and 0.4 share (0, 0.5].
    assert st.expected_calibration_error([0.5, 0.4], [True, False], bins=2) == pytest.approx(0.05)


def test_brier():
    # (0.3² + 0.2² + 0.1²) and 1 + 1.
    found = st.brier([[0.7, 0.2, 0.1], [0.0, 1.0]], [0, 0])
    assert found == pytest.approx((0.14 + 2) / 2)
    assert st.brier([], []) is None


def test_labels():
    answers = ["yes", "yes", "no", "maybe"]
    predicted = ["yes", "no", "no", None]
    # F1: yes 2/3, no 2/3, maybe 0; None is no label.
    assert st.macro_f1(predicted, answers) == pytest.approx((2 / 3 + 2 / 3) / 3)
    assert st.macro_f1([], []) is None
    assert st.balanced_accuracy(predicted, answers) == pytest.approx((0.5 + 1 + 0) / 3)
    assert st.balanced_accuracy(["yes"], ["yes"]) is None
    # Both agree on 3 of 4; by chance 0.5 · 0.75 + 0.5 · 0.25 = 0.5.
    assert st.cohen_kappa([0, 0, 1, 1], [0, 0, 1, 0]) == pytest.approx(0.5)
    assert st.cohen_kappa([1, 1], [1, 1]) is None
    assert st.cohen_kappa([], []) is None


def test_auroc():
    # Pairs of a positive and a negative: 0.9 > 0.4, 0.9 > 0.6, 0.5 > 0.4, 0.5 < 0.6.
    assert st.auroc([0.9, 0.5, 0.4, 0.6], [1, 1, 0, 0]) == pytest.approx(3 / 4)
    assert st.auroc([0.5, 0.5], [True, False]) == 0.5
    assert st.auroc([0.5], [True]) is None
    assert st.auroc([], []) is None

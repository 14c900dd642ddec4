import math

import numpy as np
import pytest
from scipy import stats

from kappa_lightning.pilot.statistics import contrast, holm, sign_flip, sign_test, t_interval, t_test


def test_interval_is_scipys():
    values = [0.91, 0.85, 0.97, 0.88, 0.9]
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    found = t_interval(values)
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.count == 5


def test_interval_of_five_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(4000, 5))
    covered = np.mean([found.low <= 0 <= found.high for found in map(t_interval, draws)])
    assert abs(covered - 0.95) < 0.012


def test_one_value_has_no_bounds_and_none_no_mean():
    assert math.isnan(t_interval([1.0]).low)
    assert math.isnan(t_interval([]).mean)


def test_t_test_is_scipys_and_equal_differences_are_certain():
    values = [0.2, -0.1, 0.4, 0.3]
    assert t_test(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert (t_test([0.0, 0.0]), t_test([0.1, 0.1])) == (1.0, 0.0)
    assert math.isnan(t_test([0.1]))


def test_sign_flip_counts_the_sums_that_are_as_large():
    # Of |±1 ± 2 ± 4| = 7, 5, 3, 1, … those of at least 5 are four of eight.
    assert sign_flip([1.0, -2.0, -4.0]) == 0.5
    assert sign_flip([0.1] * 10) == 2 / 2**10


def test_sign_test_is_the_binomial():
    signs = [1, 1, 1, 1, -1, 0]
    assert sign_test(signs) == pytest.approx(stats.binomtest(4, 5).pvalue)
    assert sign_test([0, 0]) == 1.0


def test_seed_that_does_not_arrive_is_not_dropped():
    full = {0: 0.9, 1: 0.9, 2: 0.9, 3: 0.9, 4: 0.9, 5: 0.9}
    found = contrast({0: 0.95, 1: 0.95, 2: None, 3: None, 4: None, 5: None}, full)
    # The two seeds that arrived keep more, and their mean would say so.
    assert math.isnan(found.difference.mean)
    assert (found.missing, found.missing_other) == (4, 0)
    assert found.p_exact == pytest.approx(stats.binomtest(2, 6).pvalue)
    assert contrast(dict.fromkeys(range(6)), full).p_exact == 2 / 2**6


def test_only_seeds_that_both_ran_are_compared():
    found = contrast({0: 0.9, 1: 0.8, 7: 0.1}, {0: 0.7, 1: 0.7, 2: 0.5})
    assert found.difference.mean == pytest.approx(0.15)
    assert (found.difference.count, found.smallest_p) == (2, 0.5)


def test_holm_leaves_out_who_cannot_reach_significance():
    p_values = {"a": 0.002, "b": 0.01, "short": 0.0625, "nothing": math.nan}
    smallest = {"a": 0.002, "b": 0.002, "short": 0.0625}
    adjusted = holm(p_values, smallest)
    assert (adjusted["a"], adjusted["b"]) == (0.004, 0.01)
    assert math.isnan(adjusted["short"])
    assert math.isnan(adjusted["nothing"])
    # Without that knowledge it is a family of three.
    assert holm(p_values)["a"] == pytest.approx(0.006)


def test_tarones_family_never_finds_more_than_its_level_by_chance():
    # Ten tests of five seeds each, of which none can fall below 0.0625, and one of ten seeds.
    rng = np.random.default_rng(1)
    false = 0
    for _ in range(400):
        p = {str(i): sign_flip(rng.normal(size=5)) for i in range(10)} | {"ten": sign_flip(rng.normal(size=10))}
        adjusted = holm(p, {name: 2 / 2**10 if name == "ten" else 2 / 2**5 for name in p})
        false += any(value <= 0.05 for value in adjusted.values())
    assert false / 400 < 0.08

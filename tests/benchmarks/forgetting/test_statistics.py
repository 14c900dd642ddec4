import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.forgetting.statistics import bootstrap, holm, loss_level, paired_difference, retention_at, sign_flip

PATH = [(4.0, 1.0), (3.0, 0.9), (1.0, 0.5), (1.5, 0.4), (0.5, 0.2)]


@pytest.mark.parametrize(
    ("level", "retention"),
    # By hand: between (3, 0.9) and (1, 0.5) retention falls by 0.2 for each unit of loss.
    [(4.0, 1.0), (3.5, 0.95), (3.0, 0.9), (2.0, 0.7), (1.2, 0.54), (1.0, 0.5), (0.5, 0.2)],
)
def test_retention_is_read_off_the_line_between_two_evaluations(level, retention):
    assert retention_at(PATH, level) == pytest.approx(retention)


def test_the_first_crossing_counts_where_the_loss_rises_again():
    # 1.2 is crossed on the way to 1.0, and again between 1.5 and 0.5.
    assert retention_at(PATH, 1.2) == pytest.approx(0.54)
    # 0.75 only on the last segment, at three quarters of the way.
    assert retention_at(PATH, 0.75) == pytest.approx(0.4 - 0.75 * 0.2)


def test_level_that_is_not_reached_or_lies_above_the_start_has_no_retention():
    assert math.isnan(retention_at(PATH, 0.4))
    assert math.isnan(retention_at(PATH, 4.5))
    assert math.isnan(retention_at([(4.0, 1.0)], 4.0))


def test_level_on_a_plateau_is_the_retention_before_it():
    assert retention_at([(2.0, 1.0), (2.0, 0.5), (1.0, 0.4)], 2.0) == 1.0


def test_loss_level_is_a_share_of_the_way_from_start_to_lowest():
    assert [loss_level(PATH, share) for share in (0.0, 0.5, 1.0)] == [4.0, 2.25, 0.5]
    with pytest.raises(ValueError, match="never fell below 1"):
        loss_level([(1.0, 1.0), (1.0, 0.9), (2.0, 0.8)], 0.5)


def test_interval_is_scipys():
    values = [0.91, 0.87, 0.95, 0.83, 0.9, 0.88]
    found = bootstrap(values, resamples=100_000)
    reference = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=100_000, rng=np.random.default_rng(5)
    ).confidence_interval
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=5e-4)
    assert found.count == 6


def test_interval_of_two_values_is_by_hand():
    # Half of the resamples have the mean 0.5, a quarter each 0 and 1.
    found = bootstrap([0.0, 1.0])
    assert (found.mean, found.low, found.high, found.count) == (0.5, 0.0, 1.0, 2)
    half = bootstrap([0.0, 1.0], confidence=0.4)
    assert (half.low, half.high) == (0.5, 0.5)


def test_coverage_with_five_seeds_is_what_the_docstring_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        interval = bootstrap(generator.standard_normal(5).tolist(), resamples=1000)
        covered += interval.low <= 0 <= interval.high
    assert 0.78 < covered / 400 < 0.90


def test_values_that_are_missing_do_not_count():
    assert bootstrap([1.0, math.nan, 3.0]) == bootstrap([1.0, 3.0])
    single, none = bootstrap([math.nan, 2.0]), bootstrap([])
    assert (single.mean, single.count) == (2.0, 1)
    assert math.isnan(single.low)
    assert math.isnan(none.mean)


def test_difference_is_paired_by_seed():
    # Seeds differ a lot and the methods by 0.1 in each: pairing leaves no spread.
    one = {seed: 0.1 + 0.3 * seed for seed in range(5)}
    other = {seed: 0.3 * seed for seed in range(7)}
    found = paired_difference(one, other)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.count == 5
    assert paired_difference(one, {0: math.nan, 1: 0.3, 2: 0.6}).count == 2


def test_sign_flips_give_the_p_value_of_scipy_and_their_smallest_one():
    generator = np.random.default_rng(0)
    values = generator.normal(0.5, 1.0, 8)
    one, other = dict(enumerate(values)), dict.fromkeys(range(8), 0.0)
    flips = stats.permutation_test((values, np.zeros(8)), lambda x, y: (x - y).mean(), permutation_type="samples")
    assert sign_flip(one, other) == pytest.approx(flips.pvalue, abs=1e-9)
    assert sign_flip(dict.fromkeys(range(5), 0.1), dict.fromkeys(range(5), 0.0)) == 2 / 2**5
    assert math.isnan(sign_flip({0: 1.0}, {}))


def test_holm_gives_the_adjusted_values_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.9, times 4, 3, 2, 1.
    found = holm({"a": 0.02, "b": math.nan, "c": 0.03, "d": 0.01, "e": 0.9})
    assert math.isnan(found.pop("b"))
    assert found == pytest.approx({"d": 0.04, "a": 0.06, "c": 0.06, "e": 0.9})

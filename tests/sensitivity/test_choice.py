"""What is chosen of signals and sensitivities, against all subsets and against a search."""

import math
from itertools import combinations

import numpy as np
import pytest

from kappa_lightning.sensitivity import SensitivityProfile, SensitivityRow, SensitivitySettings


def row(name, b, c, n=1):
    return SensitivityRow(name, (n,), b, c, n)


def random_rows(seed, count=9):
    numbers = np.random.default_rng(seed)
    return [
        row(f"t{i}", float(b), float(c), int(n))
        for i, (b, c, n) in enumerate(
            zip(
                numbers.lognormal(size=count),
                numbers.lognormal(sigma=2, size=count),
                numbers.integers(1, 9, count),
                strict=True,
            )
        )
    ]


def least_of_all_subsets(rows, cost=lambda row: row.sensitivity):
    sets = (chosen for size in range(1, len(rows) + 1) for chosen in combinations(rows, size))
    return min(sum(map(cost, chosen)) / sum(r.signal for r in chosen) ** 2 for chosen in sets)


@pytest.mark.parametrize("seed", range(12))
def test_without_a_budget_no_subset_is_predicted_to_forget_less(seed):
    rows = random_rows(seed)
    profile = SensitivityProfile(rows)
    assert profile.forgetting(profile.select()) == pytest.approx(least_of_all_subsets(rows), rel=1e-12)


def test_without_a_budget_under_gradient_descent_no_subset_is_predicted_to_forget_less():
    rows = random_rows(3)
    profile = SensitivityProfile(rows, SensitivitySettings(optimizer="sgd"))
    # A step moves an entry by its gradient, so its square is b/n on average.
    expected = least_of_all_subsets(rows, cost=lambda r: r.sensitivity * r.signal / r.num_parameters)
    assert profile.forgetting(profile.select()) == pytest.approx(expected, rel=1e-12)


def test_set_without_a_budget_holds_more_than_one_tensor_and_not_all():
    sizes = {len(SensitivityProfile(random_rows(seed)).select()) for seed in range(12)}
    assert len(sizes) > 2
    assert max(sizes) < 9


def test_budget_takes_the_largest_squared_signal_per_sensitivity_and_parameter():
    rows = [row("a", 2.0, 1.0, 4), row("b", 2.0, 1.0, 1), row("c", 1.0, 9.0, 1), row("d", 3.0, 1.0, 9)]
    profile = SensitivityProfile(rows)  # b²/(c·n): 1, 4, 1/9, 1
    assert profile.select(num_tensors=4) == ["b", "a", "d", "c"]
    assert profile.select(top_p=0.5) == ["b", "a"]
    assert profile.select(max_params=5) == ["b", "a"]
    assert profile.select(max_params=1 / 3) == ["b", "a"]
    assert [r.name for r in profile.rank()] == ["b", "a", "d", "c"]


def test_several_budgets_are_refused():
    with pytest.raises(ValueError, match="exactly one budget"):
        SensitivityProfile(random_rows(0)).select(top_p=0.5, num_tensors=2)


def test_forgetting_is_the_divergence_at_a_unit_of_adaptation():
    profile = SensitivityProfile([row("a", 2.0, 3.0), row("b", 1.0, 5.0)])
    assert profile.forgetting(["a"]) == 3 / 4
    assert profile.forgetting(["a", "b"]) == 8 / 9
    assert profile.forgetting(iter(["a", "b"])) == 8 / 9
    assert profile.forgetting([]) == math.inf
    with pytest.raises(KeyError, match="no row for other"):
        profile.forgetting(["a", "other"])


def test_rates_are_proportional_to_signal_over_sensitivity_and_keep_the_first_step():
    rows = random_rows(1)
    rates = SensitivityProfile(rows).rates()
    ratios = [rates[r.name] * r.sensitivity / r.signal for r in rows]
    np.testing.assert_allclose(ratios, ratios[0])
    assert sum(rates[r.name] * r.signal for r in rows) == pytest.approx(sum(r.signal for r in rows))


def test_no_other_rates_are_predicted_to_forget_less():
    rows = random_rows(2)
    rates = SensitivityProfile(rows).rates()

    def forgetting(factors):
        learned = sum(f * r.signal for f, r in zip(factors, rows, strict=True))
        return sum(f**2 * r.sensitivity for f, r in zip(factors, rows, strict=True)) / learned**2

    best = forgetting([rates[r.name] for r in rows])
    numbers = np.random.default_rng(0)
    for _ in range(200):
        assert forgetting([rates[r.name] * numbers.lognormal(sigma=0.3) for r in rows]) >= best
    assert best == pytest.approx(1 / sum(r.signal**2 / r.sensitivity for r in rows))
    assert best <= least_of_all_subsets(rows)


def test_tensor_that_the_reference_does_not_reach_is_not_taken_for_free():
    rows = [row("known", 1.0, 1.0), row("untouched", 5.0, 0.0), row("silent", 0.0, 1.0)]
    profile = SensitivityProfile(rows)
    assert profile.select() == ["known"]
    assert profile.select(num_tensors=1) == ["known"]
    assert profile.rates() == {"known": 1.0, "untouched": 0.0, "silent": 0.0}
    assert profile.forgetting(["known", "untouched"]) == math.inf


def test_nothing_to_train_is_an_error():
    profile = SensitivityProfile([row("untouched", 5.0, 0.0), row("silent", 0.0, 1.0)])
    for ask in (profile.select, profile.rates, lambda: profile.select(num_tensors=1)):
        with pytest.raises(ValueError, match="nothing to train"):
            ask()


def test_ties_are_broken_by_name():
    rows = [row(name, 1.0, 1.0) for name in "cab"]
    assert SensitivityProfile(rows).select(num_tensors=2) == ["a", "b"]


@pytest.mark.parametrize(("b", "c"), [(float("nan"), 1.0), (1.0, -1.0), (float("inf"), 1.0)])
def test_figure_that_is_none_is_refused(b, c):
    with pytest.raises(ValueError, match=r"w has the (signal|sensitivity)"):
        row("w", b, c)


def test_two_rows_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two rows are called w"):
        SensitivityProfile([row("w", 1.0, 1.0)] * 2)

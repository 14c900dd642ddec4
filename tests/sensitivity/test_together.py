"""Choices among tensors that change outputs together, against all subsets."""

from itertools import combinations

import numpy as np
import pytest

from kappa_lightning.sensitivity import SensitivityProfile, SensitivityRow


def profile_of(signals, matrix, sizes=None):
    sizes = sizes or [1] * len(signals)
    rows = [
        SensitivityRow(f"t{i}", (size,), signal, float(matrix[i][i]), size)
        for i, (signal, size) in enumerate(zip(signals, sizes, strict=True))
    ]
    return SensitivityProfile(rows, interactions=np.array(matrix, dtype=np.float64))


def random_profile(seed, count=6):
    numbers = np.random.default_rng(seed)
    factors = numbers.normal(size=(count, 4)) + 0.5
    return profile_of(numbers.uniform(0.5, 2, count).tolist(), factors @ factors.T + 0.1 * np.eye(count))


def sets(profile):
    names = [row.name for row in profile]
    return [list(names) for size in range(1, len(names) + 1) for names in combinations([r.name for r in profile], size)]


def test_two_tensors_that_cancel_are_chosen_and_two_that_add_up_are_not():
    adding = [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    cancelling = [[1.0, -0.9, 0.0], [-0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert "t2" in profile_of([1.0, 1.0, 1.0], adding).select(num_tensors=2)
    assert sorted(profile_of([1.0, 1.0, 1.0], cancelling).select(num_tensors=2)) == ["t0", "t1"]
    # Without the pairs all are alike, and the names decide.
    rows = list(profile_of([1.0, 1.0, 1.0], adding))
    assert SensitivityProfile(rows).select(num_tensors=2) == ["t0", "t1"]


@pytest.mark.parametrize("seed", range(20))
def test_choice_is_near_the_best_of_all_subsets(seed):
    profile = random_profile(seed)
    best = min(map(profile.forgetting, sets(profile)))
    assert best <= profile.forgetting(profile.select()) <= 1.1 * best


def test_forgetting_is_the_sum_over_all_pairs():
    profile = profile_of([1.0, 3.0], [[2.0, 0.5], [0.5, 4.0]])
    assert profile.forgetting(["t0", "t1"]) == pytest.approx((2 + 4 + 2 * 0.5) / 16)
    assert profile.forgetting(["t1"]) == pytest.approx(4 / 9)


def test_budgets_are_kept():
    profile = profile_of([1.0, 1.0, 1.0, 0.0], np.diag([1.0, 2.0, 3.0, 1.0]), sizes=[10, 4, 4, 1])
    assert sorted(profile.select(max_params=8)) == ["t1", "t2"]
    assert len(profile.select(num_tensors=2)) == 2
    # A number of tensors is a number, also of those that have no signal.
    assert sorted(profile.select(top_p=1.0)) == ["t0", "t1", "t2", "t3"]
    with pytest.raises(ValueError, match="no candidate fits max_params=3"):
        profile.select(max_params=3)
    with pytest.raises(ValueError, match="nothing to train"):
        profile_of([0.0, 0.0], np.eye(2)).select()


def test_ties_are_broken_by_name_in_whatever_order_the_rows_come():
    rows = [SensitivityRow(name, (1,), 1.0, 1.0, 1) for name in ("b", "c", "a")]
    adding = np.ones((3, 3))
    assert SensitivityProfile(rows, interactions=adding).select() == ["a"]

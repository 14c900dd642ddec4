"""Which points are measured, and which is best, on figures that are known in full."""

import math
from itertools import pairwise

import pytest

from kappa_lightning.anchoring.choice import Goal, Point, check_points, search


def searched(goal, monitor, retention, bisections=3, points=11, groups=("all",)):
    """The points that are measured behind the grid, and the best of all."""

    def measure(factors):
        return Point(dict(factors), monitor(*factors.values()), {"old": retention(*factors.values())})

    found = list(search(measure, goal, groups, check_points(points), bisections))
    grid = points + (0 if len(groups) == 1 else len(groups) * (points - 1))
    return [tuple(point.factors.values()) for point in found[grid:]], goal.best(found)


@pytest.mark.parametrize("limit", [0.62, 0.55, 0.47, 0.33])
def test_no_point_is_measured_twice_where_retention_comes_in_steps(limit):
    """As that of an accuracy over sixteen items, which has ties."""
    alphas, best = searched(
        Goal(monitor_limit=limit), lambda a: 1 - a, lambda a: round((1 - 0.35 * a) * 16) / 16, bisections=6
    )
    on_the_grid = [number / 10 for number in range(11)]
    measured = sorted([alpha for (alpha,) in alphas] + on_the_grid)
    assert min(b - a for a, b in pairwise(measured)) > 1e-3
    assert best.monitor <= limit


def test_a_dip_of_the_monitor_on_the_way_is_not_measured_again():
    # 0.3 misses what is demanded and looks worse than 0.2, as noise has it.
    alphas, best = searched(
        Goal(min_retention=0.92), lambda a: 2.0 if a == 3 / 10 else 1 - a, lambda a: 1 - 0.35 * a, bisections=3
    )
    assert alphas == [(0.25,), (0.225,), (0.2375,)]
    assert best.alpha == 0.225


def test_halving_goes_on_behind_the_last_point_that_keeps_enough_though_it_is_no_better():
    """The monitor is flat with noise: 0.5 looks best, and up to 0.7 all keep enough."""
    alphas, _ = searched(
        Goal(min_retention=0.9), lambda a: {5: 0.1, 9: 0.05}.get(round(a * 10), 0.2), lambda a: 1.0 if a < 0.71 else 0.8
    )
    assert [alpha for (alpha,) in alphas] == pytest.approx([0.75, 0.725, 0.7125])


def test_several_groups_go_on_from_their_best_towards_the_nearest_that_would_be_better():
    alphas, best = searched(
        Goal(min_retention=0.895),
        lambda a, b: (1 - a) ** 2 + (1 - b) ** 2,
        lambda a, b: 1 - 0.16 * a - 0.01 * b,
        points=3,
        groups=("first", "second"),
    )
    # The best of the grid is (0.5, 1), and (1, 1) would be better; 0.895 are kept up to 0.594.
    assert alphas == [(0.75, 1.0), (0.625, 1.0), (0.5625, 1.0)]
    assert best.factors == {"first": 0.5625, "second": 1.0}


def test_nothing_is_halved_where_nothing_keeps_enough_or_the_end_is_best():
    assert searched(Goal(monitor_limit=-1.0), lambda a: 1 - a, lambda a: 1 - a)[0] == []
    assert searched(Goal(min_retention=0.1), lambda a: 1 - a, lambda a: 1 - a / 2)[0] == []


def test_halving_ends_where_factors_are_the_same():
    alphas, best = searched(Goal(min_retention=0.77), lambda a: 1 - a, lambda a: 1 - 0.35 * a, bisections=80)
    assert len(alphas) == len(set(alphas)) < 20
    assert best.alpha == pytest.approx(0.23 / 0.35, abs=1e-6)


def test_a_monitor_that_is_no_number_is_never_best():
    _, best = searched(Goal(min_retention=0.5), lambda a: math.nan if a > 0.45 else 1 - a, lambda a: 1 - 0.1 * a)
    assert best.alpha <= 0.45

import math

import pytest

from kappa_lightning.pilot.adaptation import (
    Point,
    factor_of,
    level_of,
    lowest_loss,
    nats_of,
    next_step,
    read_at,
    slowest,
)


def path(*points):
    return [Point(position, loss, {"one": kept, "two": 1.0}) for position, loss, kept in points]


def search(lowest, level, start=0, limit=60):
    """Run a search against a function from steps to the lowest loss; the answer and what was tried."""
    tried = {}
    while (step := next_step(tried, level, start)) is not None:
        assert step not in tried
        assert len(tried) < limit
        tried[step] = lowest(step)
    return slowest(tried, level), tried


def test_reading_is_on_the_line_between_the_evaluations_around_the_level():
    reading = read_at(path((0, 4.0, 1.0), (10, 3.0, 0.9), (20, 1.0, 0.5)), 2.5)
    assert reading.position == 12.5
    assert reading.retention["one"] == pytest.approx(0.8)
    assert reading.kept == pytest.approx(0.9)
    assert reading.nats == pytest.approx(-math.log(0.8) / 2)


def test_first_time_counts_and_a_path_that_stays_above_or_begins_below_has_no_reading():
    bumpy = path((0, 4.0, 1.0), (1, 2.0, 0.9), (2, 3.0, 0.7), (3, 1.0, 0.2))
    assert read_at(bumpy, 2.0).retention["one"] == pytest.approx(0.9)
    assert read_at(bumpy, 0.9) is None
    assert read_at(bumpy, 5.0) is None
    assert read_at(path((0, 4.0, 1.0), (1, math.inf, 0.0)), 2.0) is None


def test_level_is_that_of_the_best_run_and_infinite_losses_do_not_count():
    runs = [path((0, 4.0, 1), (1, 3.0, 1)), path((0, 4.0, 1), (1, 2.0, 1), (2, math.inf, 0))]
    assert lowest_loss(runs[1]) == 2.0
    assert level_of(runs, 0.75) == 2.5
    with pytest.raises(ValueError, match="never got below a loss of 4"):
        level_of([path((0, 4.0, 1), (1, 4.5, 1))], 0.5)


def test_nothing_kept_is_infinitely_many_nats():
    assert nats_of(0.0) == math.inf
    assert nats_of(math.exp(-0.25)) == pytest.approx(0.25)


@pytest.mark.parametrize("threshold", range(-11, 12))
@pytest.mark.parametrize("start", [0, 5])
def test_search_finds_the_slowest_rate_to_a_factor_of_root_two(threshold, start):
    found, tried = search(lambda step: 1.0 - 0.01 * (step - threshold), level=1.0, start=start)
    assert found == max(threshold, start - 12)
    assert found - 1 in tried or found == start - 12
    assert factor_of(found) / factor_of(found - 1) == pytest.approx(math.sqrt(2))
    assert len(tried) <= 11


def test_search_turns_round_where_a_faster_rate_diverges():
    # Below 6 too slow, above 8 diverging; it begins where everything diverges.
    def lowest(step):
        return 1.0 + 0.05 * max(0, 6 - step) + 0.3 * max(0, step - 8)

    assert search(lowest, 1.0, start=14)[0] == 6
    assert search(lowest, 1.0, start=0)[0] == 6


def test_candidate_that_nowhere_arrives_is_an_outcome_and_the_search_ends():
    found, tried = search(lambda step: 2.0 + 0.1 * abs(step - 3), level=1.0)
    assert found is None
    assert 3 in tried
    assert len(tried) < 12
    assert search(lambda step: math.inf, level=1.0)[0] is None


def test_slowest_of_all_is_taken_if_even_that_arrives():
    found, tried = search(lambda step: 0.5, level=1.0)
    assert found == min(tried) == -12

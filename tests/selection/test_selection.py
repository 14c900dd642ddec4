import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kappa_lightning.selection import CRITERIA, GROUPINGS, Budget, rank, select


@dataclass(frozen=True)
class Row:
    name: str
    kappa: float
    num_parameters: int = 1
    shape: tuple[int, ...] = (1, 1)
    frobenius_norm: float = 1.0


def rows_of(*kappas):
    return [Row(f"t{index}", kappa) for index, kappa in enumerate(kappas)]


ROWS = [Row("d", 4.0, 10), Row("a", 1.0, 60), Row("c", 3.0, 25), Row("b", 2.0, 30), Row("e", math.inf, 5)]


def test_share_of_the_tensors_takes_the_lowest_kappas_first():
    assert select(ROWS, Budget(top_p=0.6)) == ["a", "b", "c"]
    assert select(ROWS, Budget(top_p=0.4)) == ["a", "b"]
    assert select(ROWS, Budget(top_p=1.0)) == ["a", "b", "c", "d", "e"]
    assert select(ROWS, Budget(top_p=1)) == ["a", "b", "c", "d", "e"]


def test_share_is_rounded_down_but_to_at_least_one():
    assert select(ROWS, Budget(top_p=0.59)) == ["a", "b"]
    assert select(ROWS, Budget(top_p=0.0001)) == ["a"]


def test_share_of_29_percent_of_100_tensors_is_29():
    # In floating point the product is 28.999999999999996, which PEFT rounds down to 28.
    rows = rows_of(*range(1, 101))
    assert len(select(rows, Budget(top_p=0.29))) == 29


@given(percent=st.integers(1, 100), count=st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_share_counts_as_decimal_arithmetic_does(percent, count):
    exact = math.floor(Decimal(percent) / 100 * count)
    assert len(select(rows_of(*range(1, count + 1)), Budget(top_p=percent / 100))) == max(1, exact)


@given(share=st.floats(1e-6, 1.0), count=st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_share_counts_as_peft_does_away_from_whole_numbers(share, count):
    product = share * count
    chosen = len(select(rows_of(*range(1, count + 1)), Budget(top_p=share)))
    if abs(product - round(product)) > 1e-6:
        assert chosen == max(1, int(count * share))
    else:
        assert chosen == max(1, round(product))


def test_number_of_tensors():
    assert select(ROWS, Budget(num_tensors=1)) == ["a"]
    assert select(ROWS, Budget(num_tensors=5)) == ["a", "b", "c", "d", "e"]


def test_more_tensors_than_candidates_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"num_tensors=6.* 5 candidates"):
        select(ROWS, Budget(num_tensors=6))


def test_kappa_limit_includes_its_own_value():
    assert select(ROWS, Budget(max_kappa=3.0)) == ["a", "b", "c"]
    assert select(ROWS, Budget(max_kappa=3)) == ["a", "b", "c"]
    assert select(ROWS, Budget(max_kappa=math.nextafter(3.0, 0))) == ["a", "b"]
    assert select(ROWS, Budget(max_kappa=1e300)) == ["a", "b", "c", "d"]


def test_kappa_limit_of_one_takes_orthogonal_matrices():
    assert select(ROWS, Budget(max_kappa=1)) == ["a"]


def test_kappa_limit_below_every_candidate_names_the_lowest():
    with pytest.raises(ValueError, match=r"max_kappa=1\.5.*lowest is 2 of y"):
        select([Row("x", 7.0), Row("y", 2.0)], Budget(max_kappa=1.5))


def test_parameter_limit_takes_the_first_ones_until_the_next_does_not_fit():
    # Ranking a=60, b=30, c=25, d=10, e=5.
    assert select(ROWS, Budget(max_params=80)) == ["a"]
    assert select(ROWS, Budget(max_params=90)) == ["a", "b"]
    assert select(ROWS, Budget(max_params=120)) == ["a", "b", "c"]
    assert select(ROWS, Budget(max_params=130)) == ["a", "b", "c", "d", "e"]
    assert select(ROWS, Budget(max_params=10**9)) == ["a", "b", "c", "d", "e"]


def test_tensor_larger_than_the_whole_budget_is_passed_over():
    assert select(ROWS, Budget(max_params=59)) == ["b", "c"]
    assert select(ROWS, Budget(max_params=29)) == ["c"]


def test_parameter_share_is_of_the_candidates_parameters():
    # Half of 130 is 65, and nine tenths are 117.
    assert select(ROWS, Budget(max_params=0.5)) == ["a"]
    assert select(ROWS, Budget(max_params=0.9)) == ["a", "b", "c"]
    assert select(ROWS, Budget(max_params=1.0)) == ["a", "b", "c", "d", "e"]


def test_parameter_limit_of_one_is_a_count_if_int_and_a_share_if_float():
    rows = [Row("a", 1.0, 1), Row("b", 2.0, 9)]
    assert select(rows, Budget(max_params=1)) == ["a"]
    assert select(rows, Budget(max_params=1.0)) == ["a", "b"]


def test_parameter_share_of_29_percent_of_100_parameters_is_29():
    rows = [Row("a", 1.0, 29), Row("b", 2.0, 71)]
    assert select(rows, Budget(max_params=0.29)) == ["a"]


def test_parameter_limit_below_the_smallest_candidate_names_it():
    with pytest.raises(ValueError, match=r"max_params=4 allows 4 .* e, has 5"):
        select(ROWS, Budget(max_params=4))
    with pytest.raises(ValueError, match=r"max_params=0\.01 allows 1 .* e, has 5"):
        select(ROWS, Budget(max_params=0.01))


def test_ties_are_broken_by_name():
    rows = [Row(name, 2.0) for name in ("layer.10", "z", "layer.2", "a")]
    assert [row.name for row in rank(rows)] == ["a", "layer.10", "layer.2", "z"]
    assert select(rows, Budget(num_tensors=2)) == ["a", "layer.10"]


def test_infinite_kappas_are_last_and_ranked_by_name():
    rows = rows_of(math.inf, 5.0, math.inf, 1e308)
    assert [row.name for row in rank(rows)] == ["t1", "t3", "t0", "t2"]


def test_reversed_ranking_puts_infinite_kappas_first_and_breaks_ties_by_name_alike():
    rows = rows_of(math.inf, 5.0, math.inf, 1.0, 5.0)
    assert [row.name for row in rank(rows, "reversed:kappa")] == ["t0", "t2", "t1", "t4", "t3"]
    assert select(rows, Budget(num_tensors=3), "reversed:kappa") == ["t0", "t2", "t1"]
    # The limit on κ stays an upper one.
    assert select(rows, Budget(max_kappa=5.0), "reversed:kappa") == ["t1", "t4", "t3"]


@pytest.mark.parametrize("criterion", ["kappa", "reversed:kappa", "random", "reversed:random"])
@pytest.mark.parametrize("within", GROUPINGS)
def test_zero_matrix_is_last_by_every_criterion_and_in_every_group(criterion, within):
    rows = [Row("zero", math.inf, shape=(2, 2), frobenius_norm=0.0), Row("a", 3.0), Row("b", 2.0), Row("c", 1.0)]
    assert rank(rows, criterion, within=within)[-1].name == "zero"


def test_score_that_is_no_number_is_an_error_that_names_tensor_and_criterion(monkeypatch):
    monkeypatch.setitem(CRITERIA, "broken", lambda row: math.nan)
    with pytest.raises(ValueError, match="criterion='broken' gives t0 the score NaN"):
        rank(rows_of(1.0), "broken")


def test_random_order_changes_with_the_seed_and_not_with_the_rows_around():
    rows = rows_of(*range(1, 31))
    order = [row.name for row in rank(rows, "random", seed=3)]
    assert order != [row.name for row in rank(rows, "random", seed=4)]
    assert [row.name for row in rank(rows[::-2], "random", seed=3)] == [n for n in order if int(n[1:]) % 2]
    assert [row.name for row in rank(rows, "reversed:random", seed=3)] == order[::-1]


# Groups


def grouped(**sizes):
    """Groups of some sizes, each of a shape of its own, κ rising with the index and the group."""
    return [
        Row(f"layers.{index}.{name}", 1.0 + index + 1000 * group, shape=(group, group))
        for group, (name, size) in enumerate(sizes.items())
        for index in range(size)
    ]


@pytest.mark.parametrize("within", ["shape", "role"])
def test_every_group_keeps_its_share_and_the_best_of_it(within):
    rows = grouped(attention=12, up=8, down=4)
    chosen = select(rows, Budget(top_p=0.5), within=within)
    assert len(chosen) == 12
    expected = {"attention": 6, "up": 4, "down": 2}
    assert set(chosen) == {f"layers.{index}.{name}" for name, count in expected.items() for index in range(count)}
    # Among all, one group would take them all.
    assert set(select(rows, Budget(top_p=0.5))) == {f"layers.{index}.attention" for index in range(12)}


def test_shape_and_role_are_different_groups():
    rows = [
        Row("layers.0.q", 4.0, shape=(2, 2)), Row("layers.0.k", 3.0, shape=(2, 2)),
        Row("layers.1.q", 2.0, shape=(2, 2)), Row("layers.1.k", 1.0, shape=(2, 2)),
        Row("layers.0.up", 9.0, shape=(8, 2)), Row("layers.1.up", 8.0, shape=(8, 2)),
    ]  # fmt: skip
    assert select(rows, Budget(num_tensors=3), within="shape") == ["layers.1.k", "layers.1.up", "layers.1.q"]
    assert select(rows, Budget(num_tensors=3), within="role") == ["layers.1.k", "layers.1.q", "layers.1.up"]
    rows[2] = Row("layers.1.q", 3.5, shape=(2, 2))
    assert select(rows, Budget(num_tensors=3), within="shape") == ["layers.1.k", "layers.1.up", "layers.0.k"]
    assert select(rows, Budget(num_tensors=3), within="role") == ["layers.1.k", "layers.1.q", "layers.1.up"]


def test_tensors_and_transposed_ones_are_of_different_shape():
    rows = [Row("a", 1.0, shape=(2, 8)), Row("b", 2.0, shape=(2, 8)), Row("c", 9.0, shape=(8, 2))]
    assert select(rows, Budget(num_tensors=2), within="shape") == ["a", "c"]


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    data=st.data(),
    criterion=st.sampled_from(["kappa", "reversed:kappa", "random"]),
)
@settings(max_examples=200, deadline=None)
def test_groups_get_the_seats_of_sainte_laguë(sizes, data, criterion):
    rows = grouped(**{f"group_{index}": size for index, size in enumerate(sizes)})
    count = data.draw(st.integers(1, len(rows)))
    chosen = select(rows, Budget(num_tensors=count), criterion, within="shape")
    assert len(chosen) == count
    seats = [sum(name.endswith(f"group_{index}") for name in chosen) for index in range(len(sizes))]
    # Webster's condition: one divisor rounds every group's size to its seats, ties either way.
    low = max(Fraction(2 * seat - 1, 2 * size) for seat, size in zip(seats, sizes, strict=True))
    high = min(Fraction(2 * seat + 1, 2 * size) for seat, size in zip(seats, sizes, strict=True))
    assert low <= high
    # A larger budget keeps what a smaller one took.
    assert chosen[:-1] == (select(rows, Budget(num_tensors=count - 1), criterion, within="shape") if count > 1 else [])
    order = [row.name for row in rank(rows, criterion)]
    for index in range(len(sizes)):
        members = [name for name in order if name.endswith(f"group_{index}")]
        assert [name for name in chosen if name in members] == members[: seats[index]]


def test_parameter_limit_walks_the_groups_in_turn():
    rows = [
        Row("a", 1.0, 10, (1, 10)), Row("b", 2.0, 10, (1, 10)), Row("c", 3.0, 10, (1, 10)),
        Row("x", 10.0, 100, (1, 100)), Row("y", 20.0, 100, (1, 100)), Row("z", 30.0, 100, (1, 100)),
    ]  # fmt: skip
    assert select(rows, Budget(max_params=220), within="shape") == ["a", "x", "b", "y"]
    assert select(rows, Budget(max_params=130), within="shape") == ["a", "x", "b"]
    assert select(rows, Budget(max_params=130)) == ["a", "b", "c", "x"]


def test_kappa_limit_is_the_same_in_every_group():
    rows = grouped(low=3, high=3)
    for within in GROUPINGS:
        assert set(select(rows, Budget(max_kappa=2.0), within=within)) == {"layers.0.low", "layers.1.low"}


def test_unknown_grouping_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="within='layer' is unknown: use one of 'all', 'shape', 'role'"):
        rank(ROWS, within="layer")


def test_no_candidates_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        select([], Budget(top_p=0.5))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "exactly one budget.*got none"),
        ({"top_p": 0.1, "num_tensors": 3}, r"exactly one budget.*top_p=0\.1, num_tensors=3"),
        ({"max_kappa": 9.0, "max_params": 3}, r"exactly one budget.*max_kappa=9\.0, max_params=3"),
        ({"top_p": 0.0}, "top_p=0.0 is a budget of nothing"),
        ({"top_p": 0}, "top_p=0 is a budget of nothing"),
        ({"top_p": 1.01}, r"top_p=1\.01 is not a share"),
        ({"top_p": -0.1}, r"top_p=-0\.1 is not a share"),
        ({"top_p": math.nan}, "top_p=nan is not a share"),
        ({"top_p": 20}, "top_p=20 is not a share"),
        ({"num_tensors": 0}, "num_tensors=0 is a budget of nothing"),
        ({"num_tensors": -1}, "num_tensors=-1 is a budget of nothing"),
        ({"max_params": 0}, "max_params=0 is a budget of nothing"),
        ({"max_params": 0.0}, r"max_params=0\.0 is a budget of nothing"),
        ({"max_params": 1.5}, r"max_params=1\.5 is not a share"),
        ({"max_params": 1000.5}, r"max_params=1000\.5 is not a share"),
        ({"max_kappa": 0.99}, r"max_kappa=0\.99 is a budget of nothing"),
        ({"max_kappa": -5}, "max_kappa=-5 is a budget of nothing"),
        ({"max_kappa": math.nan}, "max_kappa=nan is a budget of nothing"),
    ],
)
def test_budget_out_of_range_is_an_error_that_shows_it(limits, message):
    with pytest.raises(ValueError, match=message):
        Budget(**limits)


@pytest.mark.parametrize("name", ["top_p", "num_tensors", "max_kappa", "max_params"])
@pytest.mark.parametrize("value", [True, False, "0.2", [1]])
def test_budget_that_is_no_number_is_a_type_error(name, value):
    with pytest.raises(TypeError, match=name):
        Budget(**{name: value})


def test_fractional_number_of_tensors_is_a_type_error_that_points_to_the_share():
    with pytest.raises(TypeError, match=r"num_tensors=0\.2.*top_p"):
        Budget(num_tensors=0.2)


def test_unknown_criterion_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="criterion='entropy' is unknown: use one of 'kappa'"):
        rank(ROWS, "entropy")


def test_criterion_that_a_user_adds_ranks_the_tensors(monkeypatch):
    monkeypatch.setitem(CRITERIA, "smallest first", lambda row: row.num_parameters)
    assert [row.name for row in rank(ROWS, "smallest first")] == ["e", "d", "c", "b", "a"]
    assert select(ROWS, Budget(num_tensors=2), "smallest first") == ["e", "d"]
    assert select(ROWS, Budget(max_params=41), "smallest first") == ["e", "d", "c"]
    # The limit on κ stays one on κ, whatever ranks.
    assert select(ROWS, Budget(max_kappa=3.0), "smallest first") == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(top_p=0.25), "top_p=0.25"),
        (Budget(num_tensors=3), "num_tensors=3"),
        (Budget(max_kappa=100), "max_kappa=100"),
        (Budget(max_params=0.5), "max_params=0.5"),
    ],
)
def test_budget_prints_as_the_argument_it_is(budget, text):
    assert str(budget) == text


kappas = st.lists(st.one_of(st.sampled_from([1.0, 2.0, 3.0, math.inf]), st.floats(1.0, 1e12)), min_size=1, max_size=30)
some_budget = st.one_of(
    st.floats(0.001, 1.0).map(lambda value: Budget(top_p=value)),
    st.integers(1, 30).map(lambda value: Budget(num_tensors=value)),
    st.floats(1.0, 1e12).map(lambda value: Budget(max_kappa=value)),
)


@given(values=kappas, budget=some_budget)
@settings(max_examples=300, deadline=None)
def test_no_tensor_trains_while_one_of_lower_kappa_is_frozen(values, budget):
    rows = rows_of(*values)
    if budget.num_tensors is not None and budget.num_tensors > len(rows):
        return
    if budget.max_kappa is not None and min(values) > budget.max_kappa:
        return
    chosen = select(rows, budget)
    assert chosen
    assert len(set(chosen)) == len(chosen)
    inside = [row.kappa for row in rows if row.name in chosen]
    outside = [row.kappa for row in rows if row.name not in chosen]
    assert not outside or max(inside) <= min(outside)


@given(values=kappas, sizes=st.lists(st.integers(1, 50), min_size=30, max_size=30), data=st.data())
@settings(max_examples=200, deadline=None)
def test_order_of_the_rows_does_not_matter(values, sizes, data):
    rows = [Row(f"t{index}", kappa, sizes[index]) for index, kappa in enumerate(values)]
    shuffled = data.draw(st.permutations(rows))
    for budget in (Budget(top_p=0.3), Budget(num_tensors=1), Budget(max_kappa=1e300), Budget(max_params=50)):
        if budget.max_kappa is not None and min(values) == math.inf:
            continue
        assert select(shuffled, budget) == select(rows, budget)


@given(values=kappas, sizes=st.lists(st.integers(1, 50), min_size=30, max_size=30), limit=st.integers(50, 500))
@settings(max_examples=200, deadline=None)
def test_parameter_limit_is_kept_and_the_first_tensor_left_out_does_not_fit(values, sizes, limit):
    rows = [Row(f"t{index}", kappa, sizes[index]) for index, kappa in enumerate(values)]
    chosen = select(rows, Budget(max_params=limit))
    used = sum(row.num_parameters for row in rows if row.name in chosen)
    assert used <= limit
    ranking = rank(rows)
    assert chosen == [row.name for row in ranking[: len(chosen)]]
    assert all(used + row.num_parameters > limit for row in ranking[len(chosen) : len(chosen) + 1])


def test_whole_float_above_one_is_a_number_of_parameters():
    budget = Budget(max_params=1000.0)
    assert budget == Budget(max_params=1000)
    assert type(budget.max_params) is int
    assert type(Budget(max_params=1.0).max_params) is float
    with pytest.raises(ValueError, match=r"max_params=1\.5 is not a share"):
        Budget(max_params=1.5)
    with pytest.raises(ValueError, match=r"max_params=inf is not a share|max_params=inf"):
        Budget(max_params=math.inf)

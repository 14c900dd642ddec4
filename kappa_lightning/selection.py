"""From the rows of a profile and a budget to the names of the tensors that train.

A criterion gives each row a score; the lowest scores train first. The budget says how far down the ranking to go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Scorable(Protocol):
    """What a criterion may look at: one row of a profile."""

    @property
    def name(self) -> str:
        """The parameter's name."""

    @property
    def kappa(self) -> float:
        """Condition number; ∞ for a rank-deficient matrix."""

    @property
    def num_parameters(self) -> int:
        """Number of entries of the tensor."""


Row = TypeVar("Row", bound=Scorable)
Criterion = Callable[[Scorable], float]


def kappa(row: Scorable) -> float:
    """The condition number, the paper's criterion: a low κ passes information evenly and may be retrained."""
    return row.kappa


CRITERIA: dict[str, Criterion] = {"kappa": kappa}
"""The criteria by name; add a function of a row to make it usable as ``criterion="its name"``."""


DEFAULT_TOP_P = 0.2
"""The budget where none is given: the fifth of the tensors with the lowest scores."""


@dataclass(frozen=True)
class Budget:
    """How much may train: exactly one of four limits.

    Attributes:
        top_p: a share of the tensors, in (0, 1]; at least one tensor.
        num_tensors: a number of tensors.
        max_kappa: every tensor whose κ is at most this.
        max_params: a number of parameters if an int, a share of the candidates' parameters in (0, 1] if a float; the
            ranking is walked once and every tensor that still fits is taken.

    Raises:
        TypeError: if a limit has the wrong type.
        ValueError: if none or several are given, or if the limit can select nothing.

    Example:
        >>> Budget(top_p=0.0)
        Traceback (most recent call last):
        ...
        ValueError: top_p=0.0 is a budget of nothing: give a share of the tensors in (0, 1]
    """

    top_p: float | None = None
    num_tensors: int | None = None
    max_kappa: float | None = None
    max_params: int | float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            found = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
            raise ValueError(f"give exactly one budget of top_p, num_tensors, max_kappa and max_params; got {found}")
        ((name, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}={value!r} is not a number")
        if name == "num_tensors" and not isinstance(value, int):
            raise TypeError(f"num_tensors={value!r} must be an int; for a share of the tensors use top_p")
        is_share = name == "top_p" or (name == "max_params" and isinstance(value, float))
        if is_share and not 0 < value <= 1:
            what = "tensors" if name == "top_p" else "parameters"
            problem = "is a budget of nothing" if value == 0 else "is not a share"
            count = "" if name == "top_p" else ", or an int for their number"
            raise ValueError(f"{name}={value!r} {problem}: give a share of the {what} in (0, 1]{count}")
        if not is_share and name != "max_kappa" and value < 1:
            raise ValueError(f"{name}={value!r} is a budget of nothing: give at least 1")
        if name == "max_kappa" and not value >= 1:
            raise ValueError(f"max_kappa={value!r} is a budget of nothing: no matrix has a condition number below 1")

    def __str__(self) -> str:
        return next(f"{name}={value!r}" for name, value in vars(self).items() if value is not None)


def criterion_of(name: str) -> Criterion:
    """The criterion of a name.

    Raises:
        ValueError: if there is none.
    """
    if name not in CRITERIA:
        raise ValueError(f"criterion={name!r} is unknown: use one of {', '.join(map(repr, CRITERIA))}")
    return CRITERIA[name]


def rank(rows: Iterable[Row], criterion: str = "kappa") -> list[Row]:
    """The rows from the first to train to the last; ties are broken by name, so every machine ranks alike.

    Raises:
        ValueError: if the criterion is unknown.
    """
    score = criterion_of(criterion)
    return sorted(rows, key=lambda row: (score(row), row.name))


def select(rows: Sequence[Row], budget: Budget, criterion: str = "kappa") -> list[str]:
    """The names that train, the first to train first.

    Args:
        rows: the candidates, in any order.
        budget: how much may train.
        criterion: a key of :data:`CRITERIA`.

    Raises:
        ValueError: if there is no candidate, the budget asks for more tensors than there are, or nothing fits it.
    """
    if not rows:
        raise ValueError("there is nothing to train: no tensor is a candidate")
    ranking = rank(rows, criterion)
    if budget.top_p is not None:
        return [row.name for row in ranking[: max(1, _share_of(budget.top_p, len(ranking)))]]
    if budget.num_tensors is not None:
        if budget.num_tensors > len(ranking):
            raise ValueError(f"num_tensors={budget.num_tensors} asks for more than the {len(ranking)} candidates")
        return [row.name for row in ranking[: budget.num_tensors]]
    if budget.max_kappa is not None:
        chosen = [row.name for row in ranking if row.kappa <= budget.max_kappa]
        if not chosen:
            lowest = min(rows, key=lambda row: (row.kappa, row.name))
            raise ValueError(
                f"nothing to train: no candidate has κ ≤ max_kappa={budget.max_kappa:g}; the lowest is "
                f"{lowest.kappa:.4g} of {lowest.name}"
            )
        return chosen
    return _fill(ranking, budget)


def _share_of(share: float, total: int) -> int:
    # Rounded down, but 0.29 · 100 is 28.999999999999996 in floating point.
    return math.floor(share * total * (1 + 1e-12))


def _fill(ranking: Sequence[Scorable], budget: Budget) -> list[str]:
    limit = budget.max_params
    assert limit is not None
    if isinstance(limit, float):
        limit = _share_of(limit, sum(row.num_parameters for row in ranking))
    chosen, used = [], 0
    for row in ranking:
        if used + row.num_parameters <= limit:
            chosen.append(row.name)
            used += row.num_parameters
    if not chosen:
        smallest = min(ranking, key=lambda row: (row.num_parameters, row.name))
        raise ValueError(
            f"nothing to train: {budget} allows {limit:,} parameters, and the smallest candidate, "
            f"{smallest.name}, has {smallest.num_parameters:,}"
        )
    return chosen

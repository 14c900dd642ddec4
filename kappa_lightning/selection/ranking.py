"""The ranking by a criterion, within groups or not, and what a budget takes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from fractions import Fraction
from typing import Protocol, TypeVar

from kappa_lightning.arguments import as_int
from kappa_lightning.selection.budget import Budget
from kappa_lightning.selection.criteria import Scorable, criterion_of
from kappa_lightning.weights.roles import depth_and_role

Row = TypeVar("Row", bound=Scorable)


class Sized(Protocol):
    """What a budget counts: one candidate."""

    @property
    def name(self) -> str:
        """The parameter's name."""

    @property
    def num_parameters(self) -> int:
        """Number of entries of the tensor."""


GROUPINGS: dict[str, Callable[[Scorable], Hashable]] = {
    "all": lambda row: None,
    "shape": lambda row: row.shape,
    "role": lambda row: depth_and_role(row.name)[1],
}
"""What tensors have in common that are ranked against each other: nothing, the shape, or the name without numbers."""


def check_ranking(criterion: str, within: str, seed: int) -> tuple[str, str, int]:
    """The three as plain Python values, or an error that names the argument if one of them is none."""
    seed = as_int(seed, "seed")
    criterion_of(criterion, seed)
    if within not in GROUPINGS:
        raise ValueError(f"within={within!r} is unknown: use one of {', '.join(map(repr, GROUPINGS))}")
    return str(criterion), str(within), seed


def rank(rows: Iterable[Row], criterion: str = "kappa", *, within: str = "all", seed: int = 0) -> list[Row]:
    """The rows from the first to train to the last; ties are broken by name, so every machine ranks alike.

    A tensor that is all zero has no singular directions: its score is ∞ under every criterion and its reverse, and what
    scores ∞ is last. A rank-deficient one has κ = ∞, so that it is last by ``kappa`` and first by ``reversed:kappa``.

    With ``within``, each group is ranked on its own, and the groups are then merged so that the i-th of the n tensors
    of a group stands at (i − ½)/n. The first k of the ranking hold the share of every group, rounded (Sainte-Laguë's
    apportionment; it never takes a tensor back as k grows). Where two stand at one place, the score decides.

    Args:
        rows: the candidates, in any order.
        criterion: a key of :data:`~kappa_lightning.selection.CRITERIA`, or one behind ``reversed:``.
        within: ``"all"`` ranks all together, ``"shape"`` tensors of one shape, ``"role"`` those whose names differ
            only in numbers.
        seed: of the criterion ``random``.

    Raises:
        TypeError: if the seed is no int.
        ValueError: if the criterion or the grouping is unknown, or a score is NaN.

    Example:
        >>> import torch
        >>> from kappa_lightning import KappaProfile
        >>> net = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in "abc"})
        >>> for layer, kappa in zip(net.values(), (3.0, 1.0, 2.0)):
        ...     _ = layer.weight.data.copy_(torch.diag(torch.tensor([kappa, 1.0])))
        >>> profile = KappaProfile.from_model(net, progress=False)
        >>> [row.name[0] for row in rank(profile)], [row.name[0] for row in rank(profile, "reversed:kappa")]
        (['b', 'c', 'a'], ['a', 'c', 'b'])
    """
    check_ranking(criterion, within, seed)
    rows = list(rows)
    score = criterion_of(criterion, seed)
    scores = {row.name: math.inf if row.frobenius_norm == 0 else score(row) for row in rows}
    for name, value in scores.items():
        if math.isnan(value):
            raise ValueError(f"criterion={criterion!r} gives {name} the score NaN, which has no place in a ranking")

    group_of = GROUPINGS[within]
    groups: dict[Hashable, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (scores[row.name], row.name)):
        groups.setdefault(group_of(row), []).append(row)
    place = {
        row.name: Fraction(2 * index + 1, 2 * len(group))
        for group in groups.values()
        for index, row in enumerate(group)
    }
    return sorted(rows, key=lambda row: (scores[row.name] == math.inf, place[row.name], scores[row.name], row.name))


def select(
    rows: Sequence[Row], budget: Budget, criterion: str = "kappa", *, within: str = "all", seed: int = 0
) -> list[str]:
    """The names that train, the first to train first: what the budget takes of :func:`rank`.

    ``top_p`` and ``num_tensors`` take the first ones, ``max_params`` those until the next does not fit, and
    ``max_kappa`` takes every tensor up to that κ, whatever the criterion and the groups.

    Args:
        rows: the candidates, in any order.
        budget: how much may train.
        criterion: as in :func:`rank`.
        within: as in :func:`rank`.
        seed: as in :func:`rank`.

    Raises:
        TypeError: as :func:`rank`.
        ValueError: as :func:`rank`, or if there is no candidate, the budget asks for more tensors than there are, or
            nothing fits it.
    """
    if not rows:
        raise ValueError("there is nothing to train: no tensor is a candidate")
    ranking = rank(rows, criterion, within=within, seed=seed)
    if budget.max_kappa is not None:
        chosen = [row.name for row in ranking if row.kappa <= budget.max_kappa]
        if not chosen:
            lowest = min(rows, key=lambda row: (row.kappa, row.name))
            raise ValueError(
                f"nothing to train: no candidate has κ ≤ max_kappa={budget.max_kappa:g}; the lowest is "
                f"{lowest.kappa:.4g} of {lowest.name}"
            )
        return chosen
    return take(ranking, budget)


def take(ranking: Sequence[Sized], budget: Budget) -> list[str]:
    """The names of what a budget of tensors or parameters takes of a ranking, whatever ranked it.

    Args:
        ranking: the candidates, the first to train first.
        budget: any but ``max_kappa``.

    Raises:
        ValueError: if the budget asks for more tensors than there are, or nothing fits it.
    """
    if budget.top_p is not None:
        return [row.name for row in ranking[: max(1, _share_of(budget.top_p, len(ranking)))]]
    if budget.num_tensors is not None:
        if budget.num_tensors > len(ranking):
            raise ValueError(f"num_tensors={budget.num_tensors} asks for more than the {len(ranking)} candidates")
        return [row.name for row in ranking[: budget.num_tensors]]
    return _fill(ranking, budget)


def _share_of(share: float, total: int) -> int:
    # Rounded down, but 0.29 · 100 is 28.999999999999996 in floating point.
    return math.floor(share * total * (1 + 1e-12))


def parameters_allowed(rows: Iterable[Sized], budget: Budget) -> int | None:
    """How many parameters of the candidates a budget lets train; ``None`` if it does not count them."""
    if isinstance(budget.max_params, float):
        return _share_of(budget.max_params, sum(row.num_parameters for row in rows))
    return budget.max_params


def _fill(ranking: Sequence[Sized], budget: Budget) -> list[str]:
    limit = parameters_allowed(ranking, budget)
    assert limit is not None
    chosen, left = [], limit
    for row in ranking:
        if row.num_parameters > limit:
            continue  # it would never fit, so it stops nobody behind it
        if row.num_parameters > left:
            break
        chosen.append(row.name)
        left -= row.num_parameters
    if not chosen:
        smallest = min(ranking, key=lambda row: (row.num_parameters, row.name))
        raise ValueError(
            f"nothing to train: {budget} allows {limit:,} parameters, and the smallest candidate, "
            f"{smallest.name}, has {smallest.num_parameters:,}"
        )
    return chosen

"""The choice where it is known what tensors change together, by the sensitivities of all pairs of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from kappa_lightning.selection import Budget, take
from kappa_lightning.sensitivity.choice import NOTHING, is_known, ranked, value
from kappa_lightning.sensitivity.interactions import Matrix
from kappa_lightning.sensitivity.row import SensitivityRow


def least_together(rows: Sequence[SensitivityRow], matrix: Matrix, budget: Budget | None) -> list[str]:
    """The names of a set of small Σ_TU M_TU/(Σb)², with M the sensitivities of all pairs along their movements.

    From every tensor a set grows by the one that brings the figure lowest: without a budget as long as it falls, and
    under one until nothing fits any more, since few tensors move farther for the same adaptation, which the figure does
    not know. The best of these sets is taken. That is no search of all sets, which are too many.

    Args:
        rows: the candidates.
        matrix: M in their order, symmetric and positive semidefinite.
        budget: what may train.

    Returns:
        The first to train first: what has the largest share Σ_U M_TU of what is changed for its signal comes last.

    Raises:
        ValueError: if nothing has a signal and a known sensitivity, or nothing fits the budget.
    """
    by_name = sorted(range(len(rows)), key=lambda i: rows[i].name)  # so ties are broken alike on every machine
    order = [i for i in by_name if value(rows[i]) > 0]
    if not order:
        raise ValueError(NOTHING)
    m, b = matrix[np.ix_(order, order)], np.array([rows[i].signal for i in order])
    sizes = np.array([rows[i].num_parameters for i in order])
    count, limit = _room(rows, budget)
    is_count = budget is not None and budget.max_params is None
    best: tuple[float, list[int]] = (math.inf, [])
    for first in range(len(order)):
        if sizes[first] > limit:
            continue
        chosen, free = [first], np.ones(len(order), dtype=bool)
        free[first] = False
        row_sums, total, signal, used = m[first].copy(), m[first, first], b[first], sizes[first]
        least = total / signal**2
        while len(chosen) < min(count, len(order)):
            with np.errstate(divide="ignore"):
                figures = (total + 2 * row_sums + np.diag(m)) / (signal + b) ** 2
            figures[~free | (used + sizes > limit)] = np.inf
            new = int(np.argmin(figures))
            if not figures[new] < np.inf or (figures[new] >= least and budget is None):
                break
            total += 2 * row_sums[new] + m[new, new]
            row_sums += m[new]
            signal, used, least = signal + b[new], used + sizes[new], float(figures[new])
            free[new] = False
            chosen.append(new)
        if least < best[0] * (1 - 1e-12):
            best = (least, chosen)
    if not best[1]:
        raise ValueError(f"no candidate fits {budget}: allow more")
    shares = m[np.ix_(best[1], best[1])].sum(1) / b[best[1]]
    found = [rows[order[i]].name for _, i in sorted(zip(shares.tolist(), best[1], strict=True))]
    # A number of tensors is kept to, whatever is known of the last ones.
    rest = [row.name for row in ranked(rows) if row.name not in found] if is_count else []
    return [*found, *rest[: count - len(found)]]


def _room(rows: Sequence[SensitivityRow], budget: Budget | None) -> tuple[int, int]:
    """How many tensors and how many parameters may train."""
    everything = sum(row.num_parameters for row in rows)
    if budget is None:
        return len(rows), everything
    if budget.max_params is not None:
        share = isinstance(budget.max_params, float)
        return len(rows), int(budget.max_params * everything) if share else int(budget.max_params)
    return len(take(rows, budget)), everything


def forgetting_together(rows: Sequence[SensitivityRow], matrix: Matrix, chosen: Collection[str]) -> float:
    """Σ_TU M_TU/(Σb)² of a choice; ∞ if it learns nothing, or holds a tensor that the reference has not reached."""
    places = [i for i, row in enumerate(rows) if row.name in chosen]
    signal = math.fsum(rows[i].signal for i in places)
    if signal == 0 or not all(is_known(rows[i]) for i in places):
        return math.inf
    return float(matrix[np.ix_(places, places)].sum()) / signal**2

"""From signals and sensitivities to what trains, how fast, and what it is predicted to cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from kappa_lightning.selection import Budget, take
from kappa_lightning.sensitivity.row import SensitivityRow

NOTHING = (
    "there is nothing to train: no candidate has both a signal (a gradient of the new task) and a sensitivity (the "
    "reference reaches it)"
)


def mean_square_step(row: SensitivityRow, optimizer: str) -> float:
    """The mean squared movement of an entry at unit rate, m: 1 under Adam, Σḡ_i²/n = b/n under gradient descent."""
    return row.signal / row.num_parameters if optimizer == "sgd" else 1.0


def cost(row: SensitivityRow, optimizer: str = "adam") -> float:
    """Twice the divergence of moving one tensor at unit rate, Σ F_ii u_i² ≈ c·m, in nats a row."""
    return row.sensitivity * mean_square_step(row, optimizer)


def is_known(row: SensitivityRow) -> bool:
    """Whether the reference has reached a tensor: one with c = 0 took no part in it, and its cost is unknown."""
    return row.sensitivity > 0


def predicted_forgetting(rows: Iterable[SensitivityRow], optimizer: str = "adam") -> float:
    """J = Σc·m / (Σb)²: what a choice of tensors forgets at a unit of adaptation, off-diagonals aside.

    All tensors move at one rate η. The task's loss falls by B = η Σb, and the outputs diverge by
    ½ η² Σc·m = ½ B² Σc·m/(Σb)². Only ratios of it compare choices: ½B²·J is in nats a row.

    Returns:
        ∞ if the choice learns nothing to first order, or holds a tensor that the reference has not reached.

    Example:
        >>> rows = [SensitivityRow("a", (2,), signal=2.0, sensitivity=1.0, num_parameters=2)]
        >>> predicted_forgetting(rows)
        0.25
    """
    chosen = list(rows)
    signal = math.fsum(row.signal for row in chosen)
    if signal == 0 or not all(is_known(row) for row in chosen):
        return math.inf
    return math.fsum(cost(row, optimizer) for row in chosen) / signal**2


def value(row: SensitivityRow, optimizer: str = "adam") -> float:
    """b²/(c·m·n): how little each parameter forgets for what it learns; 0 for a tensor that is not known.

    The reciprocal of a tensor's own J, shared among its n parameters. Under a budget of parameters, the largest first.
    """
    if not is_known(row) or row.signal == 0:
        return 0.0
    return row.signal**2 / (cost(row, optimizer) * row.num_parameters)


def ranked(rows: Iterable[SensitivityRow], optimizer: str = "adam") -> list[SensitivityRow]:
    """The rows by falling :func:`value`; ties are broken by name, so that every machine ranks alike."""
    return sorted(rows, key=lambda row: (-value(row, optimizer), row.name))


def choose(rows: Sequence[SensitivityRow], budget: Budget | None, optimizer: str = "adam") -> list[str]:
    """The names that train, the first to train first.

    With a budget these are the first ones of :func:`ranked`. Without one it is the set of least
    :func:`predicted_forgetting`, and how many it holds comes out of that. With C = Σc·m and B = Σb that set is a prefix
    of the tensors by rising c·m/b. All points (B, C) of sets lie in the polygon whose lower edge joins those of the
    prefixes, a convex curve through the origin. On each of its pieces C = α + βB with α ≤ 0, along which
    C/B² = α/B² + β/B has no minimum inside: where its slope is zero its curvature is 2α/B⁴ ≤ 0. As C/B² rises with C,
    no set is below the best corner.

    Raises:
        ValueError: if nothing has a signal and a known sensitivity, or nothing fits the budget.
    """
    usable = [row for row in rows if value(row, optimizer) > 0]
    if not usable:
        raise ValueError(NOTHING)
    if budget is not None:
        return take(ranked(rows, optimizer), budget)
    order = sorted(usable, key=lambda row: (cost(row, optimizer) / row.signal, row.name))
    best, least, total, signal = 0, math.inf, 0.0, 0.0
    for count, row in enumerate(order, start=1):
        total, signal = total + cost(row, optimizer), signal + row.signal
        if total / signal**2 < least:
            best, least = count, total / signal**2
    return [row.name for row in ranked(order[:best], optimizer)]


def learning_rates(rows: Sequence[SensitivityRow], optimizer: str = "adam") -> dict[str, float]:
    """For each tensor the factor of its learning rate, ∝ b/(c·m), when all of them train.

    Of all rates that lower the task's loss alike to first order, these change the outputs least: with rates η_T the
    loss falls by Σ η_T b_T and the divergence is ½ Σ η_T² c_T m_T, least for η_T ∝ b_T/(c_T m_T), where it is
    ½B²/Σ(b²/(c·m)). The factors are scaled so that Σ η_T b_T stays what it is with a factor of 1 for all.

    Returns:
        By name; 0 for what has no signal or whose sensitivity is not known.

    Raises:
        ValueError: if nothing has both.
    """
    usable = {row.name: row for row in rows if value(row, optimizer) > 0}
    if not usable:
        raise ValueError("there is nothing to train: no candidate has both a signal and a sensitivity")
    ratios = {name: row.signal / cost(row, optimizer) for name, row in usable.items()}
    before = math.fsum(row.signal for row in usable.values())
    after = math.fsum(row.signal * ratios[name] for name, row in usable.items())
    return {row.name: ratios.get(row.name, 0.0) * before / after for row in rows}

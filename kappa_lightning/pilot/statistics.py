"""Intervals and tests for a handful of paired seeds.

With ten seeds or fewer a percentile bootstrap is too narrow (with five, one of 95 % covers about 85 %), so that
intervals are Student's. A seed at which a candidate does not arrive has no value and is not left out either: it counts
as worse than any value, and then only ranks are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, its confidence interval (NaN where there is none), and the number of values that it is of."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class Contrast:
    """One candidate against another over paired seeds.

    Attributes:
        difference: one − other, over the seeds at which both arrived; without bounds, and with NaN for a mean, if at
            any seed only one or neither did, since that mean would be of the seeds that happen to suit.
        missing: seeds at which the first one did not arrive.
        missing_other: seeds at which the other one did not.
        p_t: two-sided p-value of Student's paired t test; NaN where there is no difference.
        p_exact: two-sided p-value that makes no assumption on the distribution: of flipping the signs of all
            differences, or of the sign test if somebody did not arrive.
        smallest_p: the smallest ``p_exact`` that this number of seeds can give.
    """

    difference: Interval
    missing: int
    missing_other: int
    p_t: float
    p_exact: float
    smallest_p: float


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean and Student's interval: mean ± t·s/√n with n − 1 degrees of freedom.

    Args:
        values: one for each seed, all finite.
        confidence: of the interval.

    Returns:
        An interval without bounds (NaN) for a single value, and NaN throughout for none.

    Example:
        >>> interval = t_interval([1.0, 2.0, 3.0])
        >>> round(interval.low, 3), interval.mean, round(interval.high, 3)
        (-0.484, 2.0, 4.484)
    """
    from scipy.stats import t

    count = len(values)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def contrast(one: Mapping[int, float | None], other: Mapping[int, float | None], confidence: float = 0.95) -> Contrast:
    """The paired comparison of two candidates, higher being better.

    Args:
        one: the value at each seed; ``None`` where it did not arrive.
        other: the same; only seeds that both ran are compared.
        confidence: of the interval.

    Example:
        >>> found = contrast({0: 0.9, 1: 0.8, 2: 0.7}, {0: 0.8, 1: 0.6, 2: 0.4, 3: 0.1})
        >>> round(found.difference.mean, 6), found.p_exact, round(found.p_t, 4)
        (0.2, 0.25, 0.0742)
        >>> contrast({0: 0.9, 1: None}, {0: 0.8, 1: 0.7}).missing
        1
    """
    seeds = sorted(one.keys() & other.keys())
    pairs = [(one[seed], other[seed]) for seed in seeds]
    missing = sum(first is None for first, _ in pairs)
    missing_other = sum(second is None for _, second in pairs)
    smallest = min(1.0, 2.0 ** (1 - len(pairs))) if pairs else math.nan
    if missing or missing_other:
        nothing = Interval(math.nan, math.nan, math.nan, len(pairs))
        signs = [_sign(first, second) for first, second in pairs]
        return Contrast(nothing, missing, missing_other, math.nan, sign_test(signs), smallest)
    differences = [first - second for first, second in pairs if first is not None and second is not None]
    return Contrast(t_interval(differences, confidence), 0, 0, t_test(differences), sign_flip(differences), smallest)


def t_test(differences: Sequence[float]) -> float:
    """The two-sided p-value of Student's t test of a mean of 0; NaN with fewer than two values.

    Equal values other than 0 have p = 0, and all zeros p = 1.
    """
    from scipy.stats import t

    if len(differences) < 2:
        return math.nan
    mean, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * t.sf(abs(mean) / deviation * math.sqrt(len(differences)), len(differences) - 1))


def sign_flip(differences: Sequence[float]) -> float:
    """The two-sided p-value of no difference, by flipping the signs of the paired differences in every way (Fisher).

    It is exact if seeds are exchangeable, and cannot fall below 2/2ⁿ with n seeds: 0.0625 with five, 0.002 with ten.

    Returns:
        NaN without a difference.

    Example:
        >>> sign_flip([1.0, 2.0, 3.0])
        0.25
    """
    if not len(differences):
        return math.nan
    values = np.asarray(differences, dtype=float)
    signs = np.array(list(product((1, -1), repeat=len(values))))
    sums = np.abs(signs @ values)
    # Rounding must not put the observed sum below its own mirror image.
    return float((sums >= abs(values.sum()) - 1e-12).mean())


def sign_test(signs: Sequence[int]) -> float:
    """The two-sided p-value of as many pluses as minuses; ties (0) do not count, and only ties give 1.

    Example:
        >>> sign_test([1, 1, 1, 1, 1]), sign_test([1, -1, 0])
        (0.0625, 1.0)
    """
    pluses, minuses = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
    count = pluses + minuses
    if count == 0:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(min(pluses, minuses) + 1)) / 2**count
    return float(min(1.0, 2 * tail))


def holm(
    p_values: Mapping[str, float], smallest: Mapping[str, float] | None = None, alpha: float = 0.05
) -> dict[str, float]:
    """P-values adjusted for their number, so that the chance of any false finding stays below each (Holm 1979).

    A test that cannot reach significance, whatever is observed, costs the others nothing: it is left out of the
    family (Tarone 1990), and its adjusted value is NaN.

    Args:
        p_values: of the family that was written down beforehand. NaN stays NaN and does not count.
        smallest: the smallest p-value that each test can give; 0 if not given.
        alpha: the level at which something is called significant.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
        >>> holm({"ten seeds": 0.02, "five seeds": 0.0625}, {"ten seeds": 0.002, "five seeds": 0.0625})
        {'ten seeds': 0.02, 'five seeds': nan}
    """
    known = {name: p for name, p in p_values.items() if not math.isnan(p)}
    attainable = {name: (smallest or {}).get(name, 0.0) for name in known}
    size = next(
        (k for k in range(1, len(known) + 1) if sum(p <= alpha / k for p in attainable.values()) <= k), len(known)
    )
    family = [name for name in sorted(known, key=lambda name: known[name]) if attainable[name] <= alpha / max(1, size)]
    adjusted = dict.fromkeys(p_values, math.nan)
    highest = 0.0
    for place, name in enumerate(family):
        highest = max(highest, min(1.0, known[name] * (len(family) - place)))
        adjusted[name] = highest
    return adjusted


def _sign(one: float | None, other: float | None) -> int:
    if one is None or other is None:
        return int(one is not None) - int(other is not None)
    return (one > other) - (one < other)

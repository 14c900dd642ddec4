"""From paths of (task loss, retention) to retention at equal adaptation, with intervals paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

Path = Sequence[tuple[float, float]]
"""(held-out task loss, retention) at each evaluation of a run, the one before the first step first."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, its bootstrap interval, and the number of values that it is of."""

    mean: float
    low: float
    high: float
    count: int


def loss_level(path: Path, share: float) -> float:
    """The task loss at which a run has done a share of its adaptation: start − share·(start − lowest).

    Args:
        path: a run's, by convention that of full fine-tuning with the same seed.
        share: 0 is the loss before the first step, 1 the lowest of the run.

    Raises:
        ValueError: if the run never got below where it started.

    Example:
        >>> loss_level([(4.0, 1.0), (1.0, 0.9), (2.0, 0.8)], 0.5)
        2.5
    """
    start, lowest = path[0][0], min(loss for loss, _ in path)
    if not lowest < start:
        raise ValueError(f"the loss never fell below {start:g}, where it started: there is no adaptation to compare at")
    return start - share * (start - lowest)


def retention_at(path: Path, level: float) -> float:
    """The retention when the task loss first reaches a level, linear in the loss between evaluations.

    NaN if it never does, or if the run already starts below.

    Example:
        >>> retention_at([(4.0, 1.0), (3.0, 0.9), (1.0, 0.5), (0.5, 0.6)], level=2.0)
        0.7
        >>> retention_at([(4.0, 1.0), (3.0, 0.9)], level=2.0)
        nan
    """
    for (before, retained), (loss, retention) in pairwise(path):
        if loss <= level <= before:
            weight = 0.0 if before == loss else (before - level) / (before - loss)
            return retained + weight * (retention - retained)
    return math.nan


def bootstrap(values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean and its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    With a handful of values such an interval is too narrow: with five, one of 95 % covers about 85 % of the time.

    Args:
        values: one for each seed; NaN where there is none.
        confidence: of the interval.
        resamples: how many samples are drawn with replacement.
        seed: of the draws.

    Returns:
        NaN in all three if there is no value, and an interval without bounds (NaN) if there is only one.
    """
    known = np.array([value for value in values if not math.isnan(value)])
    if len(known) < 2:
        return Interval(float(known[0]) if len(known) else math.nan, math.nan, math.nan, len(known))
    draws = np.random.default_rng(seed).integers(len(known), size=(resamples, len(known)))
    low, high = np.quantile(known[draws].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(known.mean()), float(low), float(high), len(known))


def paired_difference(one: Mapping[int, float], other: Mapping[int, float], **options: float) -> Interval:
    """The mean over seeds of one − other, with a bootstrap over seeds; only seeds at which both have a value count.

    Example:
        >>> paired_difference({0: 0.9, 1: 0.8}, {0: 0.85, 1: 0.75, 2: 0.1}).count
        2
    """
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    return bootstrap(differences, **options)  # type: ignore[arg-type]


def sign_flip(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """The two-sided p-value of no difference, by flipping the signs of the paired differences in every way (Fisher).

    It is exact if seeds are exchangeable, and cannot fall below 2/2ⁿ with n seeds: 0.0625 with five, 0.002 with ten.

    Returns:
        NaN if no seed has both values.

    Example:
        >>> sign_flip({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 0.0, 2: 0.0})
        0.25
    """
    differences = np.array([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])
    if not len(differences):
        return math.nan
    signs = np.array(list(product((1, -1), repeat=len(differences))))
    sums = np.abs(signs @ differences)
    # Rounding must not put the observed sum below its own mirror image.
    return float((sums >= abs(differences.sum()) - 1e-12).mean())


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for their number, so that the chance of any false finding stays below each (Holm 1979).

    NaN stays NaN and does not count.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    adjusted = dict(p_values)
    known = sorted((name for name, p in p_values.items() if not math.isnan(p)), key=lambda name: p_values[name])
    highest = 0.0
    for place, name in enumerate(known):
        highest = max(highest, min(1.0, p_values[name] * (len(known) - place)))
        adjusted[name] = highest
    return adjusted

"""From paths of (task loss, retention) to retention at equal adaptation, with intervals paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

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

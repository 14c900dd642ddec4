"""How far a run has come with the new task, and the slowest learning rate with which a run gets there.

Runs are compared at equal *adaptation*: where the held-out loss of the new task first comes down to one absolute level,
the same for all candidates, rates and seeds. A run that never comes down to it does not *arrive*, which is an outcome.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

STEPS_PER_DOUBLING = 2
"""Learning rates are numbered in steps of √2, so that neighbors are as near as a search can tell them apart."""

WIDEST = 12
"""A search goes at most this many steps from where it begins: a factor of 64 to either side."""

_STRIDE = 2
"""Steps by which a search goes on until it has passed the end: a factor of two."""


@dataclass(frozen=True, slots=True)
class Point:
    """An evaluation.

    Attributes:
        position: batches trained so far; on the way back to the pretrained weights the share of the movement kept.
        loss: the held-out loss of the new task.
        retention: of each probe: its metric over the pretrained model's, inverted where lower is better.
    """

    position: float
    loss: float
    retention: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reading:
    """What is kept where a path first reaches a level of the loss.

    Attributes:
        position: see :class:`Point`.
        retention: of each probe.
    """

    position: float
    retention: Mapping[str, float]

    @property
    def kept(self) -> float:
        """The mean retention over the probes."""
        return sum(self.retention.values()) / len(self.retention)

    @property
    def nats(self) -> float:
        """The mean of −ln retention: nats a token for a perplexity, the divergence for an agreement."""
        return sum(nats_of(value) for value in self.retention.values()) / len(self.retention)


def nats_of(retention: float) -> float:
    """−ln of a retention.

    For :class:`~kappa_lightning.PerplexityProbe` it is the rise of the loss in nats a token, for
    :class:`~kappa_lightning.AgreementProbe` the divergence; for other metrics a logarithmic ratio. Nothing kept is ∞.

    Example:
        >>> round(nats_of(0.996), 3), round(nats_of(0.34), 3), nats_of(0.0)
        (0.004, 1.079, inf)
    """
    return math.inf if retention <= 0 else -math.log(retention)


def read_at(path: Sequence[Point], level: float) -> Reading | None:
    """What is kept where the loss first reaches a level, on the line between the two evaluations around it.

    Args:
        path: the evaluations of a run in order, the one before the first step first; or those on the way from the
            pretrained to the trained weights.
        level: of the held-out loss.

    Returns:
        ``None`` if the path never reaches the level, or begins below it.

    Example:
        >>> path = [Point(0, 4.0, {"text": 1.0}), Point(10, 3.0, {"text": 0.9}), Point(20, 1.0, {"text": 0.5})]
        >>> reading = read_at(path, level=2.0)
        >>> reading.position, round(reading.kept, 6), read_at(path, level=0.5)
        (15.0, 0.7, None)
    """
    for before, after in pairwise(path):
        if after.loss <= level <= before.loss:
            weight = 0.0 if after.loss == before.loss else (before.loss - level) / (before.loss - after.loss)
            retention = {
                name: value + weight * (after.retention[name] - value) for name, value in before.retention.items()
            }
            return Reading(before.position + weight * (after.position - before.position), retention)
    return None


def lowest_loss(path: Sequence[Point]) -> float:
    """The lowest loss of a path; what is not finite does not count, and a path without anything else has ∞."""
    return min((point.loss for point in path if math.isfinite(point.loss)), default=math.inf)


def level_of(paths: Sequence[Sequence[Point]], target: float) -> float:
    """The loss at which the best of some runs has done a share of its adaptation: start − target·(start − lowest).

    Args:
        paths: runs of full fine-tuning from the same weights, at several rates.
        target: the share, in (0, 1).

    Raises:
        ValueError: if no run came below where it started.

    Example:
        >>> level_of([[Point(0, 4.0, {}), Point(9, 2.0, {})], [Point(0, 4.0, {}), Point(9, 1.0, {})]], target=0.5)
        2.5
    """
    start, lowest = paths[0][0].loss, min(map(lowest_loss, paths))
    if not lowest < start:
        raise ValueError(
            f"full fine-tuning never got below a loss of {start:g}, where it started: there is no adaptation to "
            "compare at. Give more steps or other learning rates, or see that the monitored loss is the new task's"
        )
    return start - target * (start - lowest)


def factor_of(step: int) -> float:
    """The factor on the module's own learning rates at a step: √2 to the power of it.

    Example:
        >>> factor_of(0), factor_of(4), factor_of(-2)
        (1.0, 4.0, 0.5)
    """
    return float(2.0 ** (step / STEPS_PER_DOUBLING))


def slowest(tried: Mapping[int, float], level: float) -> int | None:
    """The lowest step among those tried whose run arrived; ``None`` if none did."""
    return min((step for step, loss in tried.items() if loss <= level), default=None)


def next_step(tried: Mapping[int, float], level: float, start: int = 0, widest: int = WIDEST) -> int | None:
    """The learning rate to try next on the way to the slowest one that arrives.

    From ``start`` the search halves the rate until it no longer arrives, or, as long as nothing arrives, follows the
    lower loss up or down; then it halves the interval on the logarithm until a rate that arrives and one that does
    not are a factor of √2 apart. It depends on what was tried alone, so that an interrupted search goes on.

    Args:
        tried: the lowest loss of each run so far, by the step of its rate (:func:`factor_of`).
        level: the loss at which a run has arrived.
        start: where the search begins.
        widest: how many steps away from there it may go.

    Returns:
        ``None`` when the search is over: :func:`slowest` has the answer.

    Example:
        >>> next_step({}, 1.0), next_step({0: 0.9}, 1.0), next_step({0: 0.9, -2: 1.1}, 1.0)
        (0, -2, -1)
        >>> next_step({0: 0.9, -1: 1.05, -2: 1.1}, 1.0) is None
        True
    """
    if not tried:
        return start
    low, high = start - widest, start + widest
    arrived = slowest(tried, level)
    if arrived is not None:
        below = [step for step in tried if step < arrived]
        if not below:
            return None if arrived == low else max(low, arrived - _STRIDE)
        gap = arrived - max(below)
        return None if gap == 1 else arrived - gap // 2
    best = min(tried, key=lambda step: (tried[step], step))
    for stride in (_STRIDE, -_STRIDE, 1, -1):
        step = best + stride
        if step not in tried and low <= step <= high:
            return step
    return None

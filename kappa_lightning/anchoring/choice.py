"""Which point of a path to stay at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

_FINEST = 1e-6
"""Factors that differ by less are the same."""


@dataclass(frozen=True, slots=True)
class Point:
    """A point of the path and what was measured there.

    Attributes:
        factors: for each group how much of its update is left.
        monitor: the new task's figure.
        retention: of each probe, 1 being all.
    """

    factors: Mapping[str, float]
    monitor: float
    retention: Mapping[str, float]

    @property
    def alpha(self) -> float:
        """The mean of the factors."""
        return sum(self.factors.values()) / len(self.factors)

    @property
    def lowest_retention(self) -> float:
        """That of the probe that lost most; −∞ where one is not a number."""
        return min(-math.inf if math.isnan(value) else value for value in self.retention.values())

    def record(self) -> dict[str, Any]:
        """As plain values."""
        retention = {f"{name}/retention": value for name, value in self.retention.items()}
        return {
            "alpha": self.alpha,
            "factors": dict(self.factors),
            "monitor": self.monitor,
            "retention": self.lowest_retention,
            **retention,
        }


@dataclass(frozen=True, slots=True)
class Goal:
    """What is demanded of a point and what is best among those that satisfy it; exactly one limit is given.

    Attributes:
        min_retention: no probe may keep less; among those points the best monitor wins.
        monitor_limit: the monitor may be no worse; among those points the highest retention wins.
        higher_is_better: the monitor's direction.

    Example:
        >>> points = [Point({"all": a}, 1 - a, {"old": 1 - a / 4}) for a in (0.0, 0.5, 1.0)]
        >>> Goal(min_retention=0.8).best(points).alpha, Goal(monitor_limit=0.6).best(points).alpha
        (0.5, 0.5)
    """

    min_retention: float | None = None
    monitor_limit: float | None = None
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        if (self.min_retention is None) == (self.monitor_limit is None):
            raise ValueError(
                f"min_retention={self.min_retention} and monitor_limit={self.monitor_limit}: give exactly one of the "
                "two; the other figure is then as good as it can be"
            )
        if self.min_retention is not None and not 0 < self.min_retention <= 1:
            raise ValueError(f"min_retention={self.min_retention!r} must be in (0, 1], 1 being all")

    def __str__(self) -> str:
        if self.min_retention is not None:
            return f"min_retention={self.min_retention:g}"
        return f"monitor_limit={self.monitor_limit:g}"

    def is_met(self, point: Point) -> bool:
        """Whether a point satisfies what is demanded."""
        if self.min_retention is not None:
            return point.lowest_retention >= self.min_retention
        assert self.monitor_limit is not None
        return self._merit(point) >= (self.monitor_limit if self.higher_is_better else -self.monitor_limit)

    def best(self, points: Sequence[Point]) -> Point:
        """The best point; where none satisfies the demand, the one that comes nearest. Of equals the most trained."""
        return max(points, key=self._rank)

    def stretch(self, points: Sequence[Point]) -> tuple[Point, Point] | None:
        """The last point that satisfies the demand and the next one that misses it, on the way to what would be better.

        The way goes from the best point to the nearest that is no worse than it but for missing the demand. Where both
        figures change steadily along it, the best point of all lies between the two.

        Returns:
            ``None`` if the best point misses the demand itself, or if nothing that misses it would be better.
        """
        best = self.best(points)
        if not self.is_met(best):
            return None
        beyond = [
            point
            for point in points
            if not self.is_met(point) and self._other(point) >= self._other(best) and _distance(best, point) > _FINEST
        ]
        if not beyond:
            return None
        end = min(beyond, key=partial(_distance, best))
        way = {place: point for point in points if (place := _place(best, end, point)) is not None}
        missed = min(place for place, point in way.items() if not self.is_met(point))
        return way[max(place for place in way if place < missed)], way[missed]

    def _other(self, point: Point) -> float:
        """The figure that is not demanded, higher being better."""
        return self._merit(point) if self.min_retention is not None else point.lowest_retention

    def _rank(self, point: Point) -> tuple[bool, float, float]:
        met = self.is_met(point)
        # What is demanded decides among those that miss it, the other figure among those that do not.
        demanded = point.lowest_retention if self.min_retention is not None else self._merit(point)
        return met, self._other(point) if met else demanded, point.alpha

    def _merit(self, point: Point) -> float:
        if math.isnan(point.monitor):
            return -math.inf
        return point.monitor if self.higher_is_better else -point.monitor


def search(
    measure: Callable[[Mapping[str, float]], Point],
    goal: Goal,
    groups: Sequence[str],
    points: Sequence[float],
    bisections: int = 0,
) -> Iterator[Point]:
    """Measure the points at which all groups have one factor, then one group after the other, then between points.

    Args:
        measure: measures the point with these factors.
        goal: decides which is best.
        groups: the names of the factors.
        points: the values that a factor takes.
        bisections: how often the stretch between the best of these points and the next one, which misses the demand,
            is halved; see :meth:`Goal.stretch`.

    Yields:
        Every point that was measured, as it comes: ``len(points)``, with several groups
        ``len(groups) · (len(points) − 1)`` more, and up to ``bisections`` more.

    Example:
        >>> def measure(factors):  # keeps 0.8 up to 0.57
        ...     return Point(factors, 1 - factors["all"], {"old": 1 - 0.35 * factors["all"]})
        >>> [point.alpha for point in search(measure, Goal(min_retention=0.8), ["all"], (0.0, 0.5, 1.0), 3)]
        [0.0, 0.5, 1.0, 0.75, 0.625, 0.5625]
    """
    seen = []
    for value in points:
        seen.append(measure(dict.fromkeys(groups, value)))
        yield seen[-1]
    for group in groups if len(groups) > 1 else ():
        best = goal.best(seen)
        for value in points:
            if value != best.factors[group]:
                seen.append(measure({**best.factors, group: value}))
                yield seen[-1]
    stretch = goal.stretch(seen) if bisections else None
    for _ in range(bisections):
        if stretch is None or _distance(*stretch) < _FINEST:
            return
        met, missed = stretch
        middle = measure({group: (met.factors[group] + missed.factors[group]) / 2 for group in groups})
        yield middle
        stretch = (middle, missed) if goal.is_met(middle) else (met, middle)


def on_the_line(points: Sequence[Point]) -> list[Point]:
    """Those at which all groups have one factor, by rising factor."""
    return sorted((point for point in points if len(set(point.factors.values())) == 1), key=lambda point: point.alpha)


def num_points(num_groups: int, num_values: int, bisections: int = 0) -> int:
    """How many points :func:`search` measures at most."""
    return num_values + (0 if num_groups == 1 else num_groups * (num_values - 1)) + bisections


def _distance(one: Point, other: Point) -> float:
    return max(abs(one.factors[group] - other.factors[group]) for group in one.factors)


def _place(start: Point, end: Point, point: Point) -> float | None:
    """Where a point lies on the straight way from one to another, in [0, 1]; ``None`` if it does not."""
    way = {group: end.factors[group] - factor for group, factor in start.factors.items()}
    done = {group: point.factors[group] - factor for group, factor in start.factors.items()}
    longest = max(way, key=lambda group: abs(way[group]))
    place = done[longest] / way[longest]
    straight = all(abs(done[group] - place * way[group]) < _FINEST for group in way)
    return place if straight and 0 <= place <= 1 else None


def check_points(points: int | Sequence[float]) -> tuple[float, ...]:
    """The factors to try, from pretrained to trained.

    Args:
        points: how many, evenly spaced, or which; 0 and 1 are always among them.

    Raises:
        ValueError: if there are fewer than two, or one lies outside of [0, 1].

    Example:
        >>> check_points(3), check_points([0.5])
        ((0.0, 0.5, 1.0), (0.0, 0.5, 1.0))
    """
    if isinstance(points, int) and not isinstance(points, bool):
        if points < 2:
            raise ValueError(f"points={points} must be at least 2, the two ends")
        return tuple(place / (points - 1) for place in range(points))
    if isinstance(points, str | bool) or not isinstance(points, Sequence):
        raise ValueError(f"points={points!r} must be a number of points, or a list of factors in [0, 1]")
    for value in points:
        if not 0 <= value <= 1:
            raise ValueError(f"points: the factor {value!r} is not in [0, 1], 0 being pretrained and 1 trained")
    return tuple(sorted({0.0, 1.0, *map(float, points)}))


def check_bisections(bisections: int | None, points: int | Sequence[float]) -> int:
    """How often to halve: 3 times where nothing is said, and not at all where the points are given one by one.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is negative.
    """
    if bisections is None:
        return 3 if isinstance(points, int) else 0
    if isinstance(bisections, bool) or not isinstance(bisections, int):
        raise TypeError(f"bisections={bisections!r} must be an integer, 0 for the points alone")
    if bisections < 0:
        raise ValueError(f"bisections={bisections} must not be negative; 0 is for the points alone")
    return bisections

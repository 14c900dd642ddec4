"""A row of a pilot's table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kappa_lightning.pilot.adaptation import Point, Reading
from kappa_lightning.pilot.statistics import Interval, t_interval

Readings = Mapping[int, Reading | None]
"""By seed; ``None`` where the level was not reached."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A candidate in the table, along its runs or walked back from their ends.

    Attributes:
        name: of the candidate.
        walked: whether it is read on the way from the trained back to the pretrained weights.
        stage: how far it came: ``"confirmed"``, ``"raced"``, ``"searched"`` (its rate is known and no more),
            ``"not arrived"`` at any rate, ``"cut off"`` (the hours did not suffice for its search), or ``"failed"``.
            Only what was confirmed has an interval and may be in the set.
        arrived: seeds at which it reached the level, of that stage.
        seeds: seeds of that stage.
        retention: the mean over the seeds that arrived.
        nats: of −ln retention; see :class:`~kappa_lightning.pilot.adaptation.Reading`.
        probes: the mean retention of each probe.
        factor: on the module's own learning rates; NaN if no rate arrived.
        share: of the movement that is kept where it was walked back; 1 otherwise.
        trainable: parameters that train.
        seconds: of a run.
        lowest_loss: the lowest held-out loss of its runs.
        p: of no difference to the best one, Holm-adjusted; NaN where nothing was compared.
        in_set: whether it cannot be told from the best.
        near: whether its mean is within the margin of the best's as well.
        keeps: whether its mean is at least ``min_retention``.
        searched: the mean retention on the half of the probes' data that the search saw; NaN if it was not seen there.
        error: what its first run raised, if it failed, or later ones that counted as diverged.
        init: its callbacks as a LightningCLI configuration has them; ``None`` for a function of the user's.
    """

    name: str
    walked: bool
    stage: str
    arrived: int
    seeds: int
    retention: Interval
    nats: Interval
    probes: Mapping[str, float]
    factor: float
    share: float
    trainable: int
    seconds: float
    lowest_loss: float
    p: float
    in_set: bool
    near: bool
    keeps: bool
    searched: float
    init: Sequence[Mapping[str, Any]] | None
    error: str = ""

    @property
    def label(self) -> str:
        """The name, and whether it was walked back."""
        return f"{self.name}, walked back" if self.walked else self.name


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A point of an entry's runs: nobody else lost less and had learned as much.

    Attributes:
        label: of the entry.
        loss: the held-out loss of the new task.
        retention: the mean over the probes.
    """

    label: str
    loss: float
    retention: float


def summary(readings: Readings) -> tuple[Interval, Interval, dict[str, float], float]:
    """Retention, nats, the retention of each probe, and the mean position, over the seeds that arrived."""
    known = [reading for reading in readings.values() if reading is not None]
    names = list(known[0].retention) if known else []
    probes = {name: sum(reading.retention[name] for reading in known) / len(known) for name in names}
    position = sum(reading.position for reading in known) / len(known) if known else math.nan
    return t_interval([r.kept for r in known]), t_interval([r.nats for r in known]), probes, position


def front_of(paths: Mapping[str, Sequence[Sequence[Point]]]) -> list[FrontPoint]:
    """The points that no other point beats in both loss and retention, by falling loss.

    Args:
        paths: of each entry.

    Example:
        >>> steep = [Point(0, 2.0, {"a": 1.0}), Point(1, 1.0, {"a": 0.5})]
        >>> flat = [Point(0, 2.0, {"a": 1.0}), Point(1, 1.0, {"a": 0.9}), Point(2, 0.8, {"a": 0.8})]
        >>> [(point.label, point.loss) for point in front_of({"steep": [steep], "flat": [flat]})]
        [('steep', 2.0), ('flat', 1.0), ('flat', 0.8)]
    """
    points = [
        FrontPoint(label, point.loss, sum(point.retention.values()) / len(point.retention))
        for label, runs in paths.items()
        for run in runs
        for point in run
        if math.isfinite(point.loss)
    ]
    front: list[FrontPoint] = []
    for point in sorted(points, key=lambda p: (p.loss, -p.retention)):
        if not front or point.retention > front[-1].retention:
            front.append(point)
    return front[::-1]

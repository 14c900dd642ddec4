"""The rows of a pilot's table, and the lines of its picture, from what has happened in the race."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kappa_lightning.pilot.adaptation import factor_of, lowest_loss, next_step
from kappa_lightning.pilot.candidates import CallbackSpec
from kappa_lightning.pilot.entry import Entry, Readings, summary
from kappa_lightning.pilot.race import Course, judge
from kappa_lightning.pilot.rates import RateFactor
from kappa_lightning.pilot.statistics import Interval
from kappa_lightning.pilot.trial import Run
from kappa_lightning.text import counted


def entries_of(
    course: Course,
    names: Sequence[str],
    inits: Mapping[str, Any],
    min_retention: float,
    margin: float,
    back: CallbackSpec,
) -> tuple[Entry, ...]:
    """The rows, in the order in which they are shown.

    Args:
        course: of the race.
        names: of the candidates.
        inits: the callbacks of each as a configuration has them; ``None`` for a function of the user's.
        min_retention: what was asked for.
        margin: the difference in retention that does not count.
        back: what walks back to the level.
    """
    readings: dict[tuple[str, bool], Readings] = {}
    for name, outcomes in course.confirmed.items():
        readings[name, False] = {seed: outcome.along for seed, outcome in outcomes.items()}
        if any(outcome.walked is not None for outcome in outcomes.values()):
            readings[name, True] = {seed: outcome.walked for seed, outcome in outcomes.items()}
    verdicts = judge(readings, margin)
    entries = []
    for name in names:
        runs = _runs_of(course, name)
        # What raised took a time that is not known.
        times = [run.seconds for run in runs if run.spec not in course.raised]
        for walked in (False, True):
            if (name, walked) in readings:
                stage, seen = "confirmed", readings[name, walked]
            elif name in course.raced and name not in course.confirmed:
                outcomes = course.raced[name]
                seen = {seed: outcome.walked if walked else outcome.along for seed, outcome in outcomes.items()}
                stage = "raced" if len(outcomes) > 1 else "searched"
            elif walked or name in course.confirmed:
                continue
            else:
                stage, seen = _without_a_rate(course, name), {}
            retention, nats, probes, position = summary(seen)
            if walked and not retention.count:
                continue
            if stage != "confirmed":
                retention, nats = (Interval(i.mean, math.nan, math.nan, i.count) for i in (retention, nats))
            verdict = verdicts.get((name, walked)) if stage == "confirmed" else None
            step = course.rates.get(name)
            entries.append(
                Entry(
                    name=name,
                    walked=walked,
                    stage=stage,
                    arrived=retention.count,
                    seeds=len(seen),
                    retention=retention,
                    nats=nats,
                    probes=probes,
                    factor=math.nan if step is None else factor_of(_median_step(course, name, step)),
                    share=position if walked else 1.0,
                    trainable=runs[0].trainable if runs else 0,
                    seconds=sum(times) / len(times) if times else math.nan,
                    lowest_loss=min((lowest_loss(run.path) for run in runs), default=math.nan),
                    p=math.nan if verdict is None else verdict.p,
                    in_set=verdict is not None and verdict.in_set,
                    near=verdict is not None and verdict.near,
                    keeps=retention.count > 0 and retention.mean >= min_retention,
                    searched=_searched(course, name, walked),
                    error=_error(course, name),
                    init=_with_factor(inits[name], course, name, back if walked else None),
                )
            )
    order = {"confirmed": 0, "raced": 1, "searched": 2, "not arrived": 3, "cut off": 4, "failed": 5}
    return tuple(
        sorted(
            entries,
            key=lambda e: (
                (0 if e.near else 1, not e.keeps, e.trainable, e.walked, e.seconds)
                if e.in_set
                else (2, order[e.stage], -e.retention.mean if e.retention.count else math.inf, e.walked, e.trainable)
            ),
        )
    )


def _without_a_rate(course: Course, name: str) -> str:
    if name in course.failed:
        return "failed"
    tried = {step: lowest_loss(run.path) for step, run in course.searches.get(name, {}).items()}
    return "not arrived" if next_step(tried, course.level) is None else "cut off"


def _error(course: Course, name: str) -> str:
    if name in course.failed:
        return f"failed: {_words(course.failed[name])}"
    raised = [error for spec, error in course.raised.items() if spec.candidate == name]
    return f"{counted(len(raised), 'run')} raised and counted as diverged: {_words(raised[-1])}" if raised else ""


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _searched(course: Course, name: str, walked: bool) -> float:
    outcomes = course.raced.get(name, {}).values()
    seen = [reading.kept for o in outcomes if (reading := o.walked if walked else o.along) is not None]
    return sum(seen) / len(seen) if seen else math.nan


def _median_step(course: Course, name: str, step: int) -> int:
    """The step at which most runs of the confirmation arrived: what is recommended."""
    steps = sorted(outcome.run.spec.step for outcome in course.confirmed.get(name, {}).values())
    return steps[len(steps) // 2] if steps else step


def _with_factor(
    init: Sequence[Mapping[str, Any]] | None, course: Course, name: str, back: CallbackSpec | None
) -> list[Mapping[str, Any]] | None:
    step = course.rates.get(name)
    if init is None or step is None:
        return None if init is None else list(init)
    factor = CallbackSpec(RateFactor, {"factor": factor_of(_median_step(course, name, step))}).to_dict()
    return [factor, *init, *([] if back is None else [back.to_dict()])]


def _runs_of(course: Course, name: str) -> list[Run]:
    outcomes = course.confirmed.get(name) or course.raced.get(name) or {}
    return [outcome.run for outcome in outcomes.values()] or list(course.searches.get(name, {}).values())


def paths_of(course: Course) -> dict[str, list[Any]]:
    """The paths of loss and retention by the label of their row; those of the race if nothing was confirmed."""
    paths: dict[str, list[Any]] = {}
    for name, outcomes in (course.confirmed or course.raced).items():
        runs = [outcome.run for outcome in outcomes.values()]
        paths[name] = [run.path for run in runs]
        if any(run.line for run in runs):
            paths[f"{name}, walked back"] = [run.line for run in runs if run.line]
    return paths

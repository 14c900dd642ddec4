"""The race: which candidates are worth confirming, and which of those cannot be told from the best.

1. The level: full fine-tuning at several rates; a share of what its best run learned is the loss at which all is read.
2. The rates: for each candidate the slowest one at which it arrives at the level.
3. The race: one seed after another on the first half of the probes' data; who is dominated drops out.
4. The confirmation: those left with fresh seeds on the other half. Only this stage is reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kappa_lightning.pilot.adaptation import Reading, level_of, lowest_loss, next_step, slowest
from kappa_lightning.pilot.executor import Executor, OutOfTimeError
from kappa_lightning.pilot.halves import Half
from kappa_lightning.pilot.search import Outcome, at_seed
from kappa_lightning.pilot.statistics import contrast, holm, t_test
from kappa_lightning.pilot.trial import Run, Spec

LEVEL_STEPS = (0, -2, 2)
"""The rates of full fine-tuning, in steps of √2 from the module's own, by which the level is set."""

_WIDEN = 2
"""Further rates beyond an end at which full fine-tuning is best."""

_DROP_AT = 0.8
"""Confidence of the intervals by which the race drops a candidate; the confirmation judges those left."""

SHARES = {"level": 0.25, "rates": 0.55, "race": 0.7, "confirm": 1.0}
"""The share of the time that may be spent by the end of each stage."""


@dataclass(frozen=True)
class Rules:
    """How the race goes.

    Attributes:
        target: the share of full fine-tuning's adaptation at which everything is read, unless ``level`` is given.
        level: the held-out loss at which everything is read.
        seed: of the searches; those of the race and of the confirmation follow it.
        race_seeds: seeds of the race beyond that of the searches.
        confirm_seeds: seeds of the confirmation.
        finalists: candidates that are confirmed at most.
        margin: the difference in retention that does not count.
        climbs: faster rates that are tried at a seed that does not arrive.
    """

    target: float
    level: float | None
    seed: int
    race_seeds: int
    confirm_seeds: int
    finalists: int
    margin: float = 0.0
    climbs: int = 2

    def seeds(self, stage: str) -> range:
        """The seeds of ``race`` or ``confirm``, none of which is in both."""
        first = self.seed + 1 + (self.race_seeds if stage == "confirm" else 0)
        return range(first, first + (self.race_seeds if stage == "race" else self.confirm_seeds))


@dataclass
class Course:
    """What has happened.

    Attributes:
        level: at which everything is read.
        full: the runs that set it.
        searches: the runs of each candidate's search, by step.
        rates: the step of each candidate's rate; ``None`` where none arrived.
        raced: outcomes by candidate and seed, that of the search included.
        dropped: the seeds after which a candidate had dropped out of the race.
        confirmed: outcomes of the confirmation by candidate and seed.
        unfinished: the stages that the time did not suffice for.
        failed: the error of each candidate whose first run raised one.
        raised: the errors of later runs, which count as diverged.
    """

    level: float = math.nan
    full: list[Run] = field(default_factory=list)
    searches: dict[str, dict[int, Run]] = field(default_factory=dict)
    rates: dict[str, int | None] = field(default_factory=dict)
    raced: dict[str, dict[int, Outcome]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    confirmed: dict[str, dict[int, Outcome]] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    failed: dict[str, Exception] = field(default_factory=dict)
    raised: Mapping[Spec, Exception] = field(default_factory=dict)


def race(execute: Executor, names: Sequence[str], rules: Rules) -> Course:
    """Run the whole race, as far as the executor's time goes.

    Args:
        execute: makes the runs; its ``limit`` is that of all stages.
        names: of the candidates.
        rules: how it goes.

    Raises:
        ValueError: if full fine-tuning learns nothing, or no candidate arrives at the level.
        OutOfTimeError: if there was no time for the level, or for one rate of any candidate.
    """
    course = Course(raised=execute.raised)
    whole = execute.limit
    for stage, job in (("level", _level), ("rates", _rates), ("race", _race), ("confirm", _confirm)):
        execute.limit = None if whole is None else whole * SHARES[stage]
        try:
            job(execute, names, rules, course)
        except OutOfTimeError:
            if stage == "level":
                raise
            course.unfinished.append(stage)
        if stage == "rates":
            _settle_rates(names, course)
    execute.limit = whole
    return course


def _level(execute: Executor, names: Sequence[str], rules: Rules, course: Course) -> None:
    if rules.level is not None:
        course.level = rules.level
        return
    specs = [Spec("full", step, rules.seed, "search") for step in LEVEL_STEPS]
    # The first alone, so that it says how long a run takes.
    runs = {run.spec.step: run for run in execute(specs[:1]) + execute(specs[1:])}
    for _ in range(_WIDEN):
        best = min(runs, key=lambda step: (lowest_loss(runs[step].path), step))
        if best not in (min(runs), max(runs)):
            break
        step = best + (2 if best == max(runs) else -2)
        (runs[step],) = execute([Spec("full", step, rules.seed, "search")])
    course.full = list(runs.values())
    course.level = level_of([run.path for run in course.full], rules.target)


def _rates(execute: Executor, names: Sequence[str], rules: Rules, course: Course) -> None:
    course.searches = {name: {} for name in names}
    if "full" in names:
        course.searches["full"] = {run.spec.step: run for run in course.full}
    # A run of each in turn, so that time that is too short is too short for all.
    while True:
        asked = []
        for name in (name for name in names if name not in course.failed):
            tried = {step: lowest_loss(run.path) for step, run in course.searches[name].items()}
            step = next_step(tried, course.level)
            if step is not None:
                asked.append(Spec(name, step, rules.seed, "search"))
        if not asked:
            return
        size = execute.workers
        for batch in (asked[at : at + size] for at in range(0, len(asked), size)):
            runs, failed = execute.attempt(batch)
            course.failed |= failed
            if course.failed.keys() >= set(names):
                # The module's own, and none of a candidate.
                raise course.failed[names[0]]
            for run in runs:
                course.searches[run.spec.candidate][run.spec.step] = run
                if run.path[0].loss <= course.level:
                    raise ValueError(
                        f"level={course.level:g} is not below the held-out loss before training, "
                        f"{run.path[0].loss:g}: there is nothing to learn down to it, give a lower one"
                    )


def _settle_rates(names: Sequence[str], course: Course) -> None:
    for name in names:
        tried = {step: lowest_loss(run.path) for step, run in course.searches.get(name, {}).items()}
        course.rates[name] = None if name in course.failed else slowest(tried, course.level)
    if not any(course.searches.values()):
        raise OutOfTimeError("there was no time for a run of any candidate: give more hours")
    if all(step is None for step in course.rates.values()):
        more = "more hours, " if "rates" in course.unfinished else ""
        lowest = {
            name: min((lowest_loss(run.path) for run in runs.values()), default=math.inf)
            for name, runs in course.searches.items()
        }
        best = min(lowest, key=lambda name: lowest[name])
        raise ValueError(
            f"no candidate comes down to a loss of {course.level:.4g}; the nearest, {best!r}, got to "
            f"{lowest[best]:.4g}: give {more}more steps, a smaller target or a level"
        )


def _race(execute: Executor, names: Sequence[str], rules: Rules, course: Course) -> None:
    for name, step in course.rates.items():
        if step is not None:
            run = course.searches[name][step]
            course.raced[name] = {rules.seed: Outcome.of(run, course.level, len(course.searches[name]))}
    for number, seed in enumerate(rules.seeds("race"), start=1):
        for name, outcome in _outcomes(execute, _in_race(course), rules, course, seed, "search").items():
            course.raced[name][seed] = outcome
        for name in dominated({name: course.raced[name] for name in _in_race(course)}, rules.margin):
            course.dropped[name] = number


def _outcomes(
    execute: Executor, names: Sequence[str], rules: Rules, course: Course, seed: int, half: Half
) -> dict[str, Outcome]:
    steps = {name: step for name in names if (step := course.rates[name]) is not None}
    return at_seed(execute, steps, course.level, seed=seed, half=half, climbs=rules.climbs)


def _in_race(course: Course) -> list[str]:
    return [name for name in course.raced if name not in course.dropped]


def dominated(raced: Mapping[str, Mapping[int, Outcome]], margin: float = 0.0) -> list[str]:
    """Who is behind the one with the highest mean by more than the margin and chance, or arrives less often than it."""
    values = {name: {seed: best_of(outcome) for seed, outcome in outcomes.items()} for name, outcomes in raced.items()}
    leader = _leader(values)
    behind = []
    for name, own in values.items():
        if name == leader:
            continue
        found = contrast(values[leader], own, confidence=_DROP_AT)
        if found.missing_other > found.missing or found.difference.low > margin:
            behind.append(name)
    return behind


def _confirm(execute: Executor, names: Sequence[str], rules: Rules, course: Course) -> None:
    left = _in_race(course)
    values = {name: {seed: best_of(o) for seed, o in outcomes.items()} for name, outcomes in course.raced.items()}
    # Behind those who are left who dropped out last: the best needs somebody to be compared with.
    order = sorted(values, key=lambda name: (course.dropped.get(name, math.inf), *_merit(values[name])), reverse=True)
    finalists = order[: min(rules.finalists, max(2, len(left)))]
    for seed in rules.seeds("confirm"):
        for name, outcome in _outcomes(execute, finalists, rules, course, seed, "confirm").items():
            course.confirmed.setdefault(name, {})[seed] = outcome


def best_of(outcome: Outcome) -> float | None:
    """What a candidate keeps with a seed, along the run or walked back, whichever keeps more."""
    values = [reading.kept for reading in (outcome.along, outcome.walked) if reading is not None]
    return max(values, default=None)


def _leader(values: Mapping[str, Mapping[int, float | None]]) -> str:
    return max(values, key=lambda name: _merit(values[name]))


def _merit(values: Mapping[int, float | None]) -> tuple[float, float]:
    """First the share of seeds that arrived, then the mean."""
    known = [value for value in values.values() if value is not None]
    return len(known) / len(values), sum(known) / len(known) if known else -math.inf


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the confirmation says of an entry: a candidate, along its runs or walked back.

    Attributes:
        retention: by seed; ``None`` where it did not arrive.
        p: of keeping no less than the best by more than the margin, Holm-adjusted over the entries; 1 for the best
            itself, NaN if there are not two seeds, or some did not arrive.
        in_set: whether it cannot be told from the best.
        near: whether its mean is within the margin of the best's as well; the others of the set are undecided.
    """

    retention: Mapping[int, float | None]
    p: float
    in_set: bool
    near: bool


def judge(
    entries: Mapping[tuple[str, bool], Mapping[int, Reading | None]], margin: float = 0.0, alpha: float = 0.05
) -> dict[tuple[str, bool], Verdict]:
    """Which entries cannot be told from the one with the highest mean retention.

    Nothing is in the set if nothing arrives. An entry that misses the level at a seed at which the best reaches it is
    not, since it cannot be relied on to learn the task. The others are left out if Student's paired t test, adjusted
    after Holm, finds that they keep less than the best by more than the margin: a difference that nobody cares for does
    not count, however small the noise is (the indifference zone of ranking and selection, Bechhofer 1954).

    Args:
        entries: the readings of the confirmation by (candidate, walked back) and seed.
        margin: the difference in retention that does not count.
        alpha: the level at which something is told apart.
    """
    values = {
        entry: {seed: None if reading is None else reading.kept for seed, reading in readings.items()}
        for entry, readings in entries.items()
    }
    if not values:
        return {}
    best = max(values, key=lambda entry: _merit(values[entry]))
    if all(value is None for value in values[best].values()):
        return {entry: Verdict(own, math.nan, False, False) for entry, own in values.items()}
    compared = {entry: contrast(values[best], own) for entry, own in values.items() if entry != best}
    complete = {entry: c for entry, c in compared.items() if not (c.missing or c.missing_other)}
    labels = {str(number): entry for number, entry in enumerate(complete)}
    adjusted = holm({label: _p_beyond(values[best], values[entry], margin) for label, entry in labels.items()})
    p_values = {entry: adjusted[label] for label, entry in labels.items()} | {best: 1.0}
    verdicts = {}
    for entry, own in values.items():
        p = p_values.get(entry, math.nan)
        # Without a p-value nothing was told apart, unless it failed to arrive where the best did.
        arrives = entry == best or entry in complete or compared[entry].missing_other <= compared[entry].missing
        in_set = arrives and not p <= alpha
        near = in_set and (entry == best or compared[entry].difference.mean <= margin)
        verdicts[entry] = Verdict(own, p, in_set, near)
    return verdicts


def _p_beyond(best: Mapping[int, float | None], own: Mapping[int, float | None], margin: float) -> float:
    """The p-value of no difference beyond a margin, over seeds at which both arrived."""
    pairs = [(best[seed], own[seed]) for seed in sorted(best.keys() & own.keys())]
    beyond = [one - other - margin for one, other in pairs if one is not None and other is not None]
    p = t_test(beyond)
    # Behind by less than the margin is no difference, however surely it is less.
    return 1.0 if sum(beyond) <= 0 and not math.isnan(p) else p

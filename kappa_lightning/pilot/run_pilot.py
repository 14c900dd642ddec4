"""``pilot``: the one call that tries the candidates on a module and says which to use."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from kappa_lightning.pilot.adaptation import factor_of, lowest_loss
from kappa_lightning.pilot.candidates import Build, CallbackSpec, Candidate, candidate, candidates_of, walk_back_of
from kappa_lightning.pilot.entry import Entry, Readings, summary
from kappa_lightning.pilot.executor import Executor
from kappa_lightning.pilot.given import made_by, probes_of
from kappa_lightning.pilot.journal import Journal
from kappa_lightning.pilot.race import Course, Rules, judge, race
from kappa_lightning.pilot.rates import RateFactor
from kappa_lightning.pilot.result import PilotResult
from kappa_lightning.pilot.settings import settings_of
from kappa_lightning.pilot.statistics import Interval
from kappa_lightning.pilot.trial import OWN, SEEDS, Data, Run, Setup
from kappa_lightning.probes import Probe
from kappa_lightning.restoring import environment_restored, random_numbers_restored

DEFAULT_CANDIDATES = (
    "full",
    "kappa 0.25",
    "reversed:kappa 0.25",
    "sensitivity",
    "sensitivity 0.25",
    "random 0.25",
    "last_layers 0.25",
    "lora r16",
)

Asked = Sequence[str | Candidate | Build] | Mapping[str, str | Build]


def pilot(
    make_module: Callable[..., pl.LightningModule],
    make_data: Callable[..., Data],
    probes: Mapping[str, Probe] | Callable[[pl.LightningModule], Mapping[str, Probe]],
    candidates: Asked = DEFAULT_CANDIDATES,
    monitor: str = "val/loss",
    *,
    target: float = 0.8,
    level: float | None = None,
    min_retention: float = 0.95,
    steps: int = 300,
    evaluations: int = 10,
    hours: float | None = None,
    race_seeds: int = 2,
    confirm_seeds: int = 5,
    finalists: int = 3,
    margin: float = 0.01,
    always_train: Sequence[str] = (),
    exclude: Sequence[str] = (),
    trainer: Mapping[str, Any] | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    workers: int = 1,
    progress: bool = True,
) -> PilotResult:
    """Try candidates on a module and say which of them keeps most of what the module knew, at equal adaptation.

    Every run trains a copy of the pretrained module on the new task, with the module's own optimizers and schedules,
    whose
    learning rates are multiplied by one factor. Candidates are compared where the held-out loss first comes down to one
    absolute level, each at the slowest rate with which it does. A race on one half of the probes' data drops what is
    dominated; the rest is confirmed with fresh seeds on the other half, and only that is reported with intervals.

    Args:
        make_module: returns the pretrained module. It is called for every run and may return the same module each time,
            which is never changed. If it has a parameter ``seed``, it gets the run's.
        make_data: returns the new task's ``LightningDataModule``, or a pair of dataloaders to train with and to
            validate with. It may take a ``seed``, too.
        probes: what is to be kept, by name; or a function from the module to that. Each needs at least two samples or
            batches, since one half of them serves the search.
        candidates: names (:mod:`kappa_lightning.pilot.candidates`), functions from a module to callbacks, or a mapping
            from names to either. ``full`` is run in any case if it must set the level.
        monitor: the held-out loss of the new task that the module logs in validation; lower is better.
        target: the share of full fine-tuning's reduction of that loss at which all are compared, in (0, 1).
        level: the loss itself, in place of ``target``.
        min_retention: what is to be kept; those of the answer that do come first.
        steps: optimizer steps of a run.
        evaluations: of loss and probes in a run.
        hours: what all runs together may take. Stages that do not fit are cut short, and the result says which.
        race_seeds: seeds of the race.
        confirm_seeds: seeds of the confirmation.
        finalists: candidates that are confirmed at most.
        margin: the difference in retention that does not count: what is behind the best by less cannot be told from it.
        always_train: globs of what is new (heads, projectors): it trains with every candidate and is not walked back.
        exclude: globs of what no choice takes.
        trainer: arguments of your own run's ``Trainer``: precision, clipping, accumulation, devices, strategy,
            callbacks.
        seed: the first of the seeds.
        folder: where finished runs are kept, so that the same call goes on after an interruption; a temporary folder if
            ``None``.
        workers: processes that make runs at the same time, each with its share of the threads; what you give must
            then be defined at the top of a module.
        progress: say what is done, on rank zero.

    Raises:
        TypeError: if a function returns something else than it should, or an argument has the wrong type.
        ValueError: if an argument is out of range, a candidate is unknown, the folder has runs of other settings, the
            module does not log ``monitor``, or full fine-tuning learns nothing.
        OutOfTimeError: if ``hours`` do not suffice for a first run of each stage.

    Example:
        >>> result = pilot(make_module, make_data, {"old": probe}, candidates=["full", "kappa 0.25"])  # doctest: +SKIP
        >>> print(result.table)  # doctest: +SKIP
    """
    _check_kinds(make_module, make_data, trainer)
    options = dict(trainer or {})
    _check(
        target, level, min_retention, margin, steps, evaluations, hours, race_seeds, confirm_seeds, finalists, workers,
        options,
    )  # fmt: skip
    found = candidates_of(candidates, always_train=always_train, exclude=exclude, seed=seed)
    by_name = {one.name: one for one in found}
    if level is None and "full" not in by_name:
        by_name["full"] = candidate("full")
    setup = Setup(
        make_module, make_data, probes, monitor, steps, evaluations,
        always_train=tuple(always_train), exclude=tuple(exclude), draw=seed, trainer=options,
    )  # fmt: skip
    rules = Rules(target, level, seed, race_seeds, confirm_seeds, finalists, margin)
    with random_numbers_restored(), environment_restored(*SEEDS), tempfile.TemporaryDirectory() as temporary:
        pl.seed_everything(seed, workers=True, verbose=False)
        module = made_by(make_module, seed, pl.LightningModule, "make_module")
        if isinstance(probes, Mapping):
            probes_of(probes, module)
        inits = {one.name: _init(one, module) for one in by_name.values()}
        settings = settings_of(setup, module)
        del module
        journal = Journal(temporary if folder is None else folder, settings)
        journal.require(inits)
        say = _Progress(progress, len(found), rules, hours)
        say.begin()
        with Executor(
            setup, by_name, journal, limit=None if hours is None else hours * 3600, workers=workers, report=say.run
        ) as execute:
            course = race(execute, [one.name for one in found], rules)
    back = walk_back_of(monitor, course.level, setup.always_train)
    result = PilotResult(
        entries=_entries(course, [one.name for one in found], inits, min_retention, margin, back),
        level=course.level,
        start_loss=next(iter(execute.made.values())).path[0].loss,
        min_retention=min_retention,
        margin=margin,
        runs=len(execute.made),
        seconds=execute.spent,
        unfinished=tuple(course.unfinished),
        paths=_paths(course),
        settings={**settings, "target": target, "seed": seed},
        builds={one.name: one.build for one in by_name.values()},
    )
    say.end(result)
    return result


def _entries(
    course: Course,
    names: Sequence[str],
    inits: Mapping[str, Any],
    min_retention: float,
    margin: float,
    back: CallbackSpec,
) -> tuple[Entry, ...]:
    readings: dict[tuple[str, bool], Readings] = {}
    for name, outcomes in course.confirmed.items():
        readings[name, False] = {seed: outcome.along for seed, outcome in outcomes.items()}
        if any(outcome.walked is not None for outcome in outcomes.values()):
            readings[name, True] = {seed: outcome.walked for seed, outcome in outcomes.items()}
    verdicts = judge(readings, margin)
    entries = []
    for name in names:
        runs = _runs_of(course, name)
        if not runs:
            continue
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
                stage, seen = "not arrived", {}
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
                    trainable=runs[0].trainable,
                    seconds=sum(run.seconds for run in runs) / len(runs),
                    lowest_loss=min(lowest_loss(run.path) for run in runs),
                    p=math.nan if verdict is None else verdict.p,
                    in_set=verdict is not None and verdict.in_set,
                    near=verdict is not None and verdict.near,
                    keeps=retention.count > 0 and retention.mean >= min_retention,
                    searched=_searched(course, name, walked),
                    init=_with_factor(inits[name], course, name, back if walked else None),
                )
            )
    order = {"confirmed": 0, "raced": 1, "searched": 2, "not arrived": 3}
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


def _init(one: Candidate, module: pl.LightningModule) -> list[dict[str, Any]] | None:
    return None if one.specs is None else [spec.to_dict() for spec in one.specs(module)]


def _runs_of(course: Course, name: str) -> list[Run]:
    outcomes = course.confirmed.get(name) or course.raced.get(name) or {}
    return [outcome.run for outcome in outcomes.values()] or list(course.searches.get(name, {}).values())


def _paths(course: Course) -> dict[str, list[Any]]:
    paths: dict[str, list[Any]] = {}
    for name, outcomes in (course.confirmed or course.raced).items():
        runs = [outcome.run for outcome in outcomes.values()]
        paths[name] = [run.path for run in runs]
        if any(run.line for run in runs):
            paths[f"{name}, walked back"] = [run.line for run in runs if run.line]
    return paths


def _check_kinds(make_module: Any, make_data: Any, trainer: Any) -> None:
    for argument, make in (("make_module", make_module), ("make_data", make_data)):
        # A module can be called, too.
        if not callable(make) or isinstance(make, pl.LightningModule):
            raise TypeError(
                f"{argument} is a {type(make).__name__}: give a function that returns it, such as lambda: "
                f"{argument.removeprefix('make_')}"
            )
    if trainer is not None and not isinstance(trainer, Mapping):
        raise TypeError(
            f"trainer is a {type(trainer).__name__}: give a dict of a Trainer's arguments, such as "
            '{"precision": "bf16-mixed"}, since every run has a Trainer of its own'
        )


def _check(
    target: float, level: float | None, min_retention: float, margin: float, steps: int, evaluations: int,
    hours: float | None, race_seeds: int, confirm_seeds: int, finalists: int, workers: int, trainer: Mapping[str, Any],
) -> None:  # fmt: skip
    numbers = {"target": target, "level": level, "min_retention": min_retention, "margin": margin, "hours": hours}
    for argument, number in numbers.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise TypeError(f"{argument}={number!r} is a {type(number).__name__}: give a number")
    if not 0 < target < 1:
        raise ValueError(f"target={target!r} must be between 0 and 1: the share of full fine-tuning's adaptation")
    if level is not None and not math.isfinite(level):
        raise ValueError(f"level={level!r} must be a finite loss")
    if not 0 < min_retention <= 1:
        raise ValueError(f"min_retention={min_retention!r} must be in (0, 1], 1 being all")
    if not 0 <= margin < 1:
        raise ValueError(f"margin={margin!r} must be at least 0 and below 1: a difference in retention")
    if hours is not None and not hours > 0:
        raise ValueError(f"hours={hours!r} must be above 0")
    counts = {
        "steps": (steps, 1), "evaluations": (evaluations, 1), "race_seeds": (race_seeds, 0),
        "confirm_seeds": (confirm_seeds, 1), "finalists": (finalists, 1), "workers": (workers, 1),
    }  # fmt: skip
    for argument, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{argument}={value!r} must be an int of at least {least}")
    if evaluations > steps:
        raise ValueError(f"evaluations={evaluations} are more than the steps={steps} of a run")
    if mine := sorted(OWN & trainer.keys()):
        raise ValueError(f"trainer holds {', '.join(mine)}, which a pilot sets itself: leave it out")


class _Progress:
    """What a pilot says while it runs, a line a run, so that a log file can be read as well."""

    def __init__(self, shown: bool, candidates: int, rules: Rules, hours: float | None) -> None:
        self.console = Console(stderr=True)
        self.shown = shown
        self.hours = hours
        level = 0 if rules.level is not None else 4
        self.expected = level + 3 * candidates + max(0, candidates - 1) * rules.race_seeds
        self.expected += min(rules.finalists, candidates) * rules.confirm_seeds
        self.count = 0
        self.seconds = 0.0

    def begin(self) -> None:
        limit = "" if self.hours is None else f"; at most {self.hours:g} hours, and less is done if they do not suffice"
        self._say(f"pilot: about {self.expected} runs{limit}. The first one says how long they take")

    def run(self, run: Run, known: bool) -> None:
        self.count += 1
        self.seconds += run.seconds
        last = run.path[-1]
        kept = sum(last.retention.values()) / len(last.retention)
        left = max(0, self.expected - self.count) * self.seconds / self.count
        self._say(
            f"{self.count}/~{self.expected} {run.spec.candidate}, rate × {factor_of(run.spec.step):.3g}, seed "
            f"{run.spec.seed}, {run.spec.half}: loss {last.loss:.4g}, {kept:.4f} kept, "
            + ("done before" if known else f"{run.seconds:.0f} s")
            + f"; about {left / 60:.0f} min left"
        )

    def end(self, result: PilotResult) -> None:
        self._say(result.table)

    @rank_zero_only
    def _say(self, text: str) -> None:
        if self.shown:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

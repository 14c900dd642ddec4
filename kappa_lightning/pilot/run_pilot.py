"""``pilot``: the one call that tries the candidates on a module and says which to use."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from kappa_lightning.pilot.candidates import Build, Candidate, candidate, candidates_of, walk_back_of
from kappa_lightning.pilot.executor import CONTAINED, Executor
from kappa_lightning.pilot.given import made_by, probes_of
from kappa_lightning.pilot.journal import Journal
from kappa_lightning.pilot.progress import Progress
from kappa_lightning.pilot.race import Rules, race
from kappa_lightning.pilot.rehearsal import seconds_of_a_run
from kappa_lightning.pilot.result import PilotResult
from kappa_lightning.pilot.rows import entries_of, paths_of
from kappa_lightning.pilot.settings import settings_of
from kappa_lightning.pilot.trial import OWN, SEEDS, Data, Setup, configured
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
    whose learning rates are multiplied by one factor. Candidates are compared where the held-out loss first comes down
    to one absolute level, each at the slowest rate with which it does. A race on one half of the probes' data drops
    what is dominated; the rest is confirmed with fresh seeds on the other half, and only that is reported with
    intervals.

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
        module = configured(made_by(make_module, seed, pl.LightningModule, "make_module"), options)
        kept = probes_of(probes, module)
        data = made_by(make_data, seed, (pl.LightningDataModule, tuple, list), "make_data")
        inits = {one.name: _init(one, module) for one in by_name.values()}
        settings = settings_of(setup, module, data, kept)
        del module, data, kept
        journal = Journal(temporary if folder is None else folder, settings)
        journal.require(inits)
        say = Progress(progress, len(found), rules, hours, workers)
        say.begin(_seconds_of_a_run(setup, found[0], journal, seed, workers) if progress else None)
        with Executor(
            setup, by_name, journal, limit=None if hours is None else hours * 3600, workers=workers, report=say.run
        ) as execute:
            course = race(execute, [one.name for one in found], rules)
    back = walk_back_of(monitor, course.level, setup.always_train)
    result = PilotResult(
        entries=entries_of(course, [one.name for one in found], inits, min_retention, margin, back),
        level=course.level,
        start_loss=next(iter(execute.made.values())).path[0].loss,
        min_retention=min_retention,
        margin=margin,
        runs=len(execute.made),
        seconds=execute.spent,
        unfinished=tuple(course.unfinished),
        paths=paths_of(course),
        settings={**settings, "target": target, "seed": seed},
        builds={one.name: one.build for one in by_name.values()},
        probes=probes,
    )
    say.end(result)
    return result


def _seconds_of_a_run(setup: Setup, first: Candidate, journal: Journal, seed: int, workers: int) -> float | None:
    """What a run takes, from those that are done or from a rehearsal; ``None`` if the first candidate fails."""
    done = [run.seconds for run in journal.runs()]
    if done:
        return sum(done) / len(done)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))  # as many as each process will have
    try:
        return seconds_of_a_run(setup, first, seed)
    except CONTAINED:
        return None  # the runs will say what is wrong, and whether it is the candidate's fault
    finally:
        torch.set_num_threads(threads)


def _init(one: Candidate, module: pl.LightningModule) -> list[dict[str, Any]] | None:
    try:
        return None if one.specs is None else [spec.to_dict() for spec in one.specs(module)]
    except CONTAINED:
        return None  # its first run will raise the same, and the others go on


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

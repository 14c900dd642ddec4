"""All runs of a protocol: first those that find each method's rate, then those that are reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.forgetting.controls import method
from benchmarks.forgetting.protocol import Protocol
from benchmarks.forgetting.registry import TASKS
from benchmarks.forgetting.task import LOSS, Task
from kappa_lightning.pilot.adaptation import level_of, lowest_loss, slowest
from kappa_lightning.pilot.journal import Journal
from kappa_lightning.pilot.search import Execute, Outcome, at_seed, find_rate
from kappa_lightning.pilot.trial import Run, Setup, Spec, run_trial


class NotRunError(LookupError):
    """A run that is not there, where none may be made."""


@dataclass
class Comparison:
    """What is there of a protocol.

    Attributes:
        level: the held-out loss at which everything is read; ``None`` if it is not known yet.
        rates: the step of each method's rate; ``None`` if it does not arrive at any, absent if its search is not over.
        tuning: the runs of each search by step.
        outcomes: of each method by seed.
    """

    level: float | None = None
    rates: dict[str, int | None] = field(default_factory=dict)
    tuning: dict[str, dict[int, Run]] = field(default_factory=dict)
    outcomes: dict[str, dict[int, Outcome]] = field(default_factory=dict)


def compare(protocol: Protocol, execute: Execute, *, seeds: Sequence[int] | None = None) -> Comparison:
    """Make the runs of a protocol, or as many of them as ``execute`` gives.

    Args:
        protocol: what is compared.
        execute: makes a run, takes it from where it is kept, or raises :class:`NotRunError`.
        seeds: only these of the protocol's.
    """
    found = Comparison(level=protocol.level)
    if found.level is None:
        try:
            full = execute([Spec("full", step, protocol.tuning_seed) for step in protocol.level_steps])
        except NotRunError:
            return found
        found.level = level_of([run.path for run in full], protocol.target)
    for name in protocol.methods:
        _search(protocol, execute, name, found.level, found)
    # Seed by seed, so that an interrupted comparison has whole pairs.
    for seed in protocol.seeds if seeds is None else seeds:
        for name, step in found.rates.items():
            if step is None:
                continue
            try:
                outcome = at_seed(execute, {name: step}, found.level, seed=seed, half="all", climbs=protocol.climbs)
            except NotRunError:
                continue
            found.outcomes.setdefault(name, {})[seed] = outcome[name]
    return found


def _search(protocol: Protocol, execute: Execute, name: str, level: float, found: Comparison) -> None:
    tried: dict[int, Run] = {}

    def remembered(specs: Sequence[Spec]) -> list[Run]:
        runs = execute(specs)
        tried.update({run.spec.step: run for run in runs})
        return runs

    start = protocol.starts.get(name, 0)
    try:
        step, _ = find_rate(remembered, name, level, seed=protocol.tuning_seed, half="all", start=start)
    except NotRunError:
        pass
    else:
        found.rates[name] = step
    found.tuning[name] = tried


def rate_so_far(runs: Mapping[int, Run], level: float) -> int | None:
    """The slowest rate of an unfinished search that arrived."""
    return slowest({step: lowest_loss(run.path) for step, run in runs.items()}, level)


def executing(protocol: Protocol, folder: Path, finished: Iterable[Run] = ()) -> Execute:
    """Make what is not kept yet, one run after another; every finished run is kept as a file and said in a line.

    Args:
        protocol: what is compared.
        folder: where runs are kept.
        finished: runs of the same settings that were made elsewhere.
    """
    journal = Journal(folder / "runs", protocol.settings())
    for run in finished:
        if journal.find(run.spec) is None:
            journal.add(run)
    console = Console(stderr=True)
    task = TASKS[protocol.task](**protocol.options)
    setup = setup_of(protocol, task, folder)

    def execute(specs: Sequence[Spec]) -> list[Run]:
        runs = []
        for spec in specs:
            run = journal.find(spec)
            if run is None:
                run = run_trial(setup, spec, method(spec.candidate, task, spec.seed, protocol.exclude))
                journal.add(run)
                last = run.path[-1]
                kept = ", ".join(f"{name} {value:.4f}" for name, value in last.retention.items())
                console.print(
                    f"{spec.candidate}, rate step {spec.step}, seed {spec.seed}: loss {last.loss:.4g}, {kept}, "
                    f"{run.seconds:.0f} s",
                    highlight=False,
                )
            runs.append(run)
        return runs

    return execute


def looking_up(runs: Iterable[Run]) -> Execute:
    """Give finished runs and make none."""
    known = {run.spec: run for run in runs}

    def execute(specs: Sequence[Spec]) -> list[Run]:
        if missing := [spec for spec in specs if spec not in known]:
            raise NotRunError(f"{missing[0]} has not been run")
        return [known[spec] for spec in specs]

    return execute


def kept_runs(folder: Path) -> list[Run]:
    """All finished runs in a folder."""
    if not (folder / "runs").is_dir():
        return []
    settings = folder / "runs" / "settings.json"
    return list(Journal(folder / "runs", Journal.settings_of(settings)).runs())


def setup_of(protocol: Protocol, task: Task, folder: Path) -> Setup:
    """The setup of the pilot that is a task's; data may need what belongs to the module, such as its tokenizer."""
    made: dict[str, Any] = {}

    def make_module(seed: int) -> Any:
        made["module"] = task.model(seed, protocol.lr, folder / "shared")
        made["seed"] = seed
        return made["module"]

    def make_data(seed: int) -> Any:
        return task.data(made["module"], seed)

    return Setup(
        make_module,
        make_data,
        lambda module: task.probes(made["module"], made["seed"]),
        LOSS,
        protocol.steps,
        protocol.evaluations,
        protocol.blends,
        always_train=task.new,
        trainer={"accelerator": "cpu", **protocol.trainer},
    )

"""All runs of a comparison: first those that choose each method's learning rate, then those that are reported."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.forgetting.run import Plan, Run, execute
from benchmarks.forgetting.settings import Settings
from benchmarks.forgetting.statistics import loss_level, retention_at


@dataclass(frozen=True)
class Sweep:
    """The finished runs.

    Attributes:
        tuning: those with the tuning seed.
        runs: those of each method at its chosen learning rate, by seed.
    """

    tuning: dict[str, list[Run]]
    runs: dict[str, dict[int, Run]]


@dataclass(frozen=True)
class Place:
    """Where and how runs are executed.

    Attributes:
        folder: where each run is kept as soon as it is finished. An interrupted comparison goes on from there.
        workers: processes, each with one thread; 1 runs everything in this one, with as many threads as it has.
        only_report: take what is there and run nothing.
        keep_weights: keep what each run trained, too, so that a walk back from there need not train again.
    """

    folder: Path
    workers: int = 1
    only_report: bool = False
    keep_weights: bool = False


def sweep(settings: Settings, place: Place) -> Sweep:
    """Run what is not in the folder yet.

    Args:
        settings: what is compared.
        place: where and how. With ``only_report``, a method without a tuning run is left out.

    Raises:
        ValueError: if the folder has runs of other settings, or, with ``only_report``, none of ``full``.
    """
    tuning = {"full": _tune("full", settings, place, ())}
    if not tuning["full"]:
        raise ValueError(f"{place.folder} has no run of 'full' with the tuning seed: there is nothing to report")
    for method in settings.methods:
        tuning[method] = tuning.get(method) or _tune(method, settings, place, tuning["full"])
    tuning = {method: tuning[method] for method in settings.methods}
    chosen = {method: choose(runs, tuning["full"], settings.level) for method, runs in tuning.items() if runs}
    # Seed by seed, so that an interrupted comparison has whole pairs.
    asked = [replace(plan, seed=seed) for seed in settings.seeds for plan in chosen.values()]
    runs: dict[str, dict[int, Run]] = {method: {} for method in chosen}
    for run in _run(asked, place):
        runs[run.plan.method][run.plan.seed] = run
    return Sweep(tuning, runs)


def _tune(method: str, settings: Settings, place: Place, full: Sequence[Run]) -> list[Run]:
    """A method's runs with the tuning seed: at every learning rate, and beyond while the best one is at an end."""
    lrs = list(settings.lrs)
    while True:
        runs = _run(settings.plans(method, settings.tuning_seed, lrs), place)
        if not runs:
            return []
        best = choose(runs, full or runs, settings.level).lr
        beyond = wider(lrs, best)
        if beyond is None or len(lrs) >= len(settings.lrs) + settings.widen:
            return runs
        lrs = sorted([*lrs, beyond])


def wider(lrs: Sequence[float], best: float) -> float | None:
    """The next learning rate beyond the best one if that is at an end of a geometric grid, to two digits.

    Example:
        >>> wider([1e-3, 2e-3, 4e-3], 4e-3), wider([1e-3, 2e-3, 4e-3], 1e-3), wider([1e-3, 2e-3, 4e-3], 2e-3)
        (0.008, 0.0005, None)
    """
    grid = sorted(lrs)
    if len(grid) < 2 or best not in (grid[0], grid[-1]):
        return None
    ratio = grid[0] / grid[1] if best == grid[0] else grid[-1] / grid[-2]
    return float(f"{best * ratio:.2g}")


def choose(runs: Sequence[Run], full: Sequence[Run], level: float) -> Plan:
    """The plan whose run retains most where the loss reaches the level; of those that never do, the lowest loss.

    Args:
        runs: a method's, with one seed.
        full: those of full fine-tuning with the same seed; the level is that of the lowest loss among them.
        level: a share of that adaptation.
    """
    loss = tuning_loss(full, level)

    def merit(run: Run) -> tuple[float, float]:
        retention = retention_at(run.path, loss)
        return (-math.inf if math.isnan(retention) else retention), -min(point[0] for point in run.path)

    return max(runs, key=merit).plan


def tuning_loss(full: Sequence[Run], level: float) -> float:
    """The loss at a share of full fine-tuning's adaptation, by the one of its runs that gets lowest."""
    return loss_level(min((run.path for run in full), key=lambda path: min(point[0] for point in path)), level)


def _run(plans: Sequence[Plan], place: Place) -> list[Run]:
    """The runs of the plans, in their order, those that are missing executed first."""
    missing = [plan for plan in plans if Run.load(plan, place.folder) is None]
    if not place.only_report:
        console = Console(stderr=True)
        for finished, run in enumerate(_executed(missing, place), start=1):
            loss, retention = run.path[-1]
            console.print(
                f"{finished}/{len(missing)} {run.plan.method}, lr {run.plan.lr:g}, seed {run.plan.seed}: "
                f"loss {loss:.4g}, retention {retention:.3f}, {run.seconds:.0f} s",
                highlight=False,
            )
    found = (Run.load(plan, place.folder) for plan in plans)
    return [run for run in found if run is not None]


def _executed(plans: Sequence[Plan], place: Place) -> Iterator[Run]:
    if place.workers == 1:
        yield from (_execute_and_save(plan, place) for plan in plans)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        place.workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(_execute_and_save, plan, place) for plan in plans]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _execute_and_save(plan: Plan, place: Place) -> Run:
    run = execute(plan, place.folder, keep_weights=place.keep_weights)
    run.save(place.folder)
    return run

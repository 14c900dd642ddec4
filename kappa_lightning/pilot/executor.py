"""Making runs: one after another or in several processes, each kept when it is done, and within a number of hours."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, Self

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from kappa_lightning.pilot.adaptation import Point, factor_of
from kappa_lightning.pilot.candidates import Candidate
from kappa_lightning.pilot.journal import Journal
from kappa_lightning.pilot.trial import Run, Setup, Spec, run_trial

Report = Callable[[Run, bool], None]
"""Told of each run, and whether it had been done before."""


CONTAINED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    MisconfigurationException,
)
"""What a candidate that does not suit a module raises, or one that does not fit into memory."""


class OutOfTimeError(RuntimeError):
    """There is no time left for what was asked."""


class Executor:
    """Makes runs, or takes those that a journal has.

    Time is what the runs themselves took, those of an earlier, interrupted pilot included: so the same runs are made
    however often it is interrupted, and on every rank of several.

    Args:
        setup: what all runs have in common.
        candidates: by name.
        journal: where runs are kept.
        limit: the seconds that all runs together may take; ``None`` for no end.
        workers: processes, each with its share of the threads; 1 makes the runs in this one.
        report: told of each run.

    Attributes:
        raised: the errors of runs that count as diverged.

    Raises:
        RuntimeError: if there are several workers, and the script that asks for them is just being imported by one.
        ValueError: if there are several workers, and the setup or a candidate cannot be sent to another process.
    """

    def __init__(
        self,
        setup: Setup,
        candidates: Mapping[str, Candidate],
        journal: Journal,
        *,
        limit: float | None = None,
        workers: int = 1,
        report: Report = lambda run, known: None,
    ) -> None:
        self.setup = setup
        self.candidates = candidates
        self.journal = journal
        self.limit = limit
        self.workers = workers
        self.report = report
        self.made: dict[Spec, Run] = {}
        self.raised: dict[Spec, Exception] = {}
        self._spent = 0.0
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            _require_guard()
            _require_picklable(setup, candidates)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """End the other processes."""
        self._close()

    @property
    def spent(self) -> float:
        """The seconds of the runs so far, those that the processes made side by side counted once."""
        return self._spent

    @property
    def seconds_per_run(self) -> float:
        """What a run takes, by the longest so far; 0 before the first."""
        return max((run.seconds for run in self.made.values()), default=0.0)

    def __call__(self, specs: Sequence[Spec]) -> list[Run]:
        """The runs of the specs, in their order.

        Raises:
            Exception: what the first run of a candidate raised, when the others are done.
            OutOfTimeError: before any of them is made, if they would not fit into the limit.
            BrokenProcessPool: if another process has died.
        """
        for error in self._make(specs).values():
            raise error
        return [self.made[spec] for spec in specs]

    def attempt(self, specs: Sequence[Spec]) -> tuple[list[Run], dict[str, Exception]]:
        """The runs of those specs that can be made, and by candidate the error of the others.

        A candidate may not suit the module, or not fit into memory, which is no reason to do without the others. A
        candidate that has made a run before suits it: what raises at another rate or seed, such as a distribution of
        what is no number any longer, has diverged.

        Raises:
            OutOfTimeError: as above.
            BrokenProcessPool: if another process has died.
        """
        failed = self._make(specs)
        return [self.made[spec] for spec in specs if spec in self.made], failed

    def _make(self, specs: Sequence[Spec]) -> dict[str, Exception]:
        new = [spec for spec in dict.fromkeys(specs) if spec not in self.made]
        known = {spec: run for spec in new if (run := self.journal.find(spec)) is not None}
        missing = [spec for spec in new if spec not in known]
        # A run that is known counts as if it were made now, or an interruption would change what follows.
        expected = self.spent + makespan([self.seconds_per_run] * len(new), self.workers)
        if self.limit is not None and new and expected > self.limit:
            raise OutOfTimeError(
                f"the hours do not suffice: the runs so far and {len(new)} more of about {self.seconds_per_run:.3g} s "
                f"would take {expected:.3g} s, and {self.limit:.3g} s are for this stage and those before it; "
                "give more hours, or fewer steps"
            )
        for spec, run in known.items():
            self.made[spec] = run
            self.report(run, True)
        try:
            if self.workers == 1 or len(missing) < 2:
                return self._one_by_one(missing)
            return self._share(missing)
        finally:
            self._spent += makespan([self.made[spec].seconds for spec in new if spec in self.made], self.workers)

    def _one_by_one(self, specs: Sequence[Spec]) -> dict[str, Exception]:
        failed: dict[str, Exception] = {}
        for spec in specs:
            try:
                run = run_trial(self.setup, spec, self.candidates[spec.candidate])
            except CONTAINED as error:
                self._raised(spec, error, failed)
            else:
                self._keep(run)
        return failed

    def _raised(self, spec: Spec, error: Exception, failed: dict[str, Exception]) -> None:
        """The candidate has failed, or, if it has made a run before, this one has diverged."""
        before = next((run for run in self.made.values() if run.spec.candidate == spec.candidate), None)
        if before is None:
            failed[spec.candidate] = error
            return
        start = before.path[0]
        end = Point(float(self.setup.steps), math.inf, dict.fromkeys(start.retention, 0.0))
        # How long it took to raise is not known; that of the earlier run counts, so that the hours cannot be overrun.
        self.made[spec] = replace(before, spec=spec, path=(start, end), line=())
        self.raised[spec] = error
        rank_zero_warn(
            f"the candidate {spec.candidate!r} at its rate × {factor_of(spec.step):.3g} and seed {spec.seed} raised "
            f"{type(error).__name__}: {error}. It counts as a run that diverged"
        )

    def _keep(self, run: Run) -> None:
        self._add(run)
        self.made[run.spec] = run
        self.report(run, False)

    @rank_zero_only
    def _add(self, run: Run) -> None:
        self.journal.add(run)

    def _share(self, specs: Sequence[Spec]) -> dict[str, Exception]:
        failed: dict[str, Exception] = {}
        if self._pool is None:
            # They stay for all runs: to start one takes as long as a short run.
            threads = max(1, torch.get_num_threads() // self.workers)
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(threads, self._devices()),
            )
        pool = self._pool
        try:
            futures = {
                pool.submit(run_trial, self.setup, spec, self.candidates[spec.candidate]): spec for spec in specs
            }
            for future in as_completed(futures):
                try:
                    run = future.result()
                except BrokenProcessPool:
                    raise
                except CONTAINED as error:
                    self._raised(futures[future], error, failed)
                else:
                    self._keep(run)
        except BrokenProcessPool as error:
            self._close()
            raise BrokenProcessPool(
                "a process that makes runs has died: perhaps there was not memory enough for several, or the process "
                "could not import what you gave. Give functions of a file (not of a notebook or of 'python -c'), and "
                "in a script call pilot under \"if __name__ == '__main__':\", since each process imports the script; "
                "or use workers=1. In a folder, the runs that are done are kept"
            ) from error
        except BaseException:
            # What the others are at is not waited for. Python has a public way to end them from 3.14 on only.
            for process in list(pool._processes.values()):
                process.terminate()
            self._close()
            raise
        return failed

    def _devices(self) -> Any:
        """A queue of what each process shall see of several CUDA devices; ``None`` where there is nothing to share."""
        count = torch.cuda.device_count()
        if count < 2 or {"devices", "strategy"} & self.setup.trainer.keys():
            return None
        queue = multiprocessing.get_context("spawn").Queue()
        for device in devices_of(self.workers, count, os.environ.get("CUDA_VISIBLE_DEVICES")):
            queue.put(device)
        return queue

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def makespan(seconds: Sequence[float], workers: int) -> float:
    """How long runs take that are handed out in their order, each to whoever is free.

    Example:
        >>> makespan([3.0, 1.0, 1.0], 2), makespan([3.0, 1.0, 1.0], 1)
        (3.0, 5.0)
    """
    free = [0.0] * workers
    for each in seconds:
        first = min(range(workers), key=free.__getitem__)
        free[first] += each
    return max(free)


def devices_of(workers: int, count: int, visible: str | None) -> list[str]:
    """Which CUDA device each process sees, as ``CUDA_VISIBLE_DEVICES`` has it.

    Example:
        >>> devices_of(3, 2, None), devices_of(2, 2, "4,6")
        (['0', '1', '0'], ['4', '6'])
    """
    names = [str(number) for number in range(count)] if visible is None else visible.split(",")[:count]
    return [names[number % len(names)].strip() for number in range(workers)]


def _begin(threads: int, devices: Any = None) -> None:
    torch.set_num_threads(threads)
    if devices is not None:
        # Before anything asks for a device in this process.
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()
    # Ctrl-C at a terminal goes to all processes: the first one says what there is to say.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A first process that is killed cannot end the others, which would wait for work forever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _require_guard() -> None:
    # As multiprocessing itself asks, but before any run.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "pilot is called while a process of its workers imports your script: put the call under "
            "\"if __name__ == '__main__':\""
        )


def _require_picklable(setup: Setup, candidates: Mapping[str, Candidate]) -> None:
    given = {name: getattr(setup, name) for name in ("make_module", "make_data", "probes", "trainer")}
    given |= {f"the candidate {name!r}": one for name, one in candidates.items()}
    for argument, value in given.items():
        try:
            pickle.dumps(value)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{argument} cannot be sent to another process ({error}): define it at the top of a module (no "
                "lambda), give probes as a function, or use workers=1"
            ) from error

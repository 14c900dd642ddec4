"""Making runs: one after another or in several processes, each kept when it is done, and within a number of hours."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Self

import torch
from lightning.pytorch.utilities import rank_zero_only

from kappa_lightning.pilot.candidates import Candidate
from kappa_lightning.pilot.journal import Journal
from kappa_lightning.pilot.trial import Run, Setup, Spec, run_trial

Report = Callable[[Run, bool], None]
"""Told of each run, and whether it had been done before."""


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

    Raises:
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
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            _require_picklable(setup)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """End the other processes."""
        self._close()

    @property
    def spent(self) -> float:
        """The seconds of the runs so far, over the processes that share them."""
        return sum(run.seconds for run in self.made.values()) / self.workers

    @property
    def seconds_per_run(self) -> float:
        """What a run takes, by the longest so far; 0 before the first."""
        return max((run.seconds for run in self.made.values()), default=0.0)

    def __call__(self, specs: Sequence[Spec]) -> list[Run]:
        """The runs of the specs, in their order.

        Raises:
            OutOfTimeError: before any of them is made, if they would not fit into the limit.
        """
        new = [spec for spec in dict.fromkeys(specs) if spec not in self.made]
        known = {spec: run for spec in new if (run := self.journal.find(spec)) is not None}
        missing = [spec for spec in new if spec not in known]
        # A run that is known counts as if it were made now, or an interruption would change what follows.
        expected = self.spent + self.seconds_per_run * len(new) / self.workers
        if self.limit is not None and new and expected > self.limit:
            raise OutOfTimeError(f"{expected:.0f} s of at most {self.limit:.0f} s for {len(new)} more run(s)")
        for spec, run in known.items():
            self.made[spec] = run
            self.report(run, True)
        if self.workers == 1 or len(missing) < 2:
            for spec in missing:
                self._keep(run_trial(self.setup, spec, self.candidates[spec.candidate]))
        else:
            self._share(missing)
        return [self.made[spec] for spec in specs]

    def _keep(self, run: Run) -> None:
        self._add(run)
        self.made[run.spec] = run
        self.report(run, False)

    @rank_zero_only
    def _add(self, run: Run) -> None:
        self.journal.add(run)

    def _sendable(self, name: str) -> str | Candidate:
        # A candidate of a name is made anew there; a function of the user's travels.
        known = self.candidates[name]
        return known if known.source is None else known.source

    def _share(self, specs: Sequence[Spec]) -> None:
        if self._pool is None:
            # They stay for all runs: to start one takes as long as a short run.
            threads = max(1, torch.get_num_threads() // self.workers)
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(threads,),
            )
        futures = [self._pool.submit(run_trial, self.setup, spec, self._sendable(spec.candidate)) for spec in specs]
        try:
            for future in as_completed(futures):
                self._keep(future.result())
        except BaseException:
            # What the others are at is not waited for. Python has a public way to end them from 3.14 on only.
            for process in list(self._pool._processes.values()):
                process.terminate()
            self._close()
            raise

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    # Ctrl-C at a terminal goes to all processes: the first one says what there is to say.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _require_picklable(setup: Setup) -> None:
    for argument in ("make_module", "make_data", "probes"):
        try:
            pickle.dumps(getattr(setup, argument))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{argument} cannot be sent to another process ({error}): define it at the top of a module (no "
                "lambda), give probes as a function, or use workers=1"
            ) from error

"""What a pilot says while it runs."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from kappa_lightning.pilot.adaptation import factor_of
from kappa_lightning.pilot.race import Rules
from kappa_lightning.pilot.result import PilotResult
from kappa_lightning.pilot.trial import Run


class Progress:
    """A line a run, so that a log file can be read as well, and the table at the end; on rank zero.

    Args:
        shown: whether anything is said.
        candidates: how many there are.
        rules: of the race.
        hours: what all runs together may take.
        workers: processes that make runs at the same time.
    """

    def __init__(self, shown: bool, candidates: int, rules: Rules, hours: float | None, workers: int = 1) -> None:
        self.console = Console(stderr=True)
        self.shown = shown
        self.hours = hours
        self.workers = workers
        level = 0 if rules.level is not None else 4
        self.expected = level + 3 * candidates + max(0, candidates - 1) * rules.race_seeds
        self.expected += min(rules.finalists, candidates) * rules.confirm_seeds
        self.count = 0
        self.seconds = 0.0

    def begin(self, seconds: float | None) -> None:
        """How many runs there will be, and how long they will take.

        Args:
            seconds: of a run, as far as it is known.
        """
        limit = "" if self.hours is None else f"; at most {self.hours:g} hours, and less is done if they do not suffice"
        if seconds is None:
            self._say(f"pilot: about {self.expected} runs{limit}. The first one says how long they take")
            return
        minutes = self.expected * seconds / self.workers / 60
        whole = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
        self._say(f"pilot: about {self.expected} runs of some {seconds:.0f} s, {whole} in all{limit}")

    def run(self, run: Run, known: bool) -> None:
        """A run is there, or had been done before."""
        self.count += 1
        self.seconds += run.seconds
        last = run.path[-1]
        kept = sum(last.retention.values()) / len(last.retention)
        left = max(0, self.expected - self.count) * self.seconds / self.count / self.workers
        self._say(
            f"{self.count}/~{self.expected} {run.spec.candidate}, rate × {factor_of(run.spec.step):.3g}, seed "
            f"{run.spec.seed}, {run.spec.half}: loss {last.loss:.4g}, {kept:.4f} kept, "
            + ("done before" if known else f"{run.seconds:.0f} s")
            + f"; about {left / 60:.0f} min left"
        )

    def end(self, result: PilotResult) -> None:
        """The table."""
        self._say(result.table)

    @rank_zero_only
    def _say(self, text: str) -> None:
        if self.shown:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

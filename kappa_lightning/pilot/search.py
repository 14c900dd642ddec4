"""A candidate's runs: the slowest rate at which it arrives, and what it keeps at the level with each seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kappa_lightning.pilot.adaptation import Reading, lowest_loss, next_step, read_at, slowest
from kappa_lightning.pilot.halves import Half
from kappa_lightning.pilot.trial import Run, Spec

CLIMBS = 3
"""How often a seed at which a run does not arrive is tried again with the next faster rate."""

Execute = Callable[[Sequence[Spec]], list[Run]]
"""Runs some specs, or takes those that are done from where they are kept; in the order asked."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A candidate with one seed.

    Attributes:
        run: the slowest of the runs that arrived; the last one if none did.
        along: what is kept where the run first reaches the level; ``None`` if it never does.
        walked: the same on the way back from the end of the run.
        runs: how many were made.
    """

    run: Run
    along: Reading | None
    walked: Reading | None
    runs: int

    @property
    def arrived(self) -> bool:
        """Whether the level was reached during training."""
        return self.along is not None

    @classmethod
    def of(cls, run: Run, level: float, runs: int = 1) -> Outcome:
        """Read a run at a level of the loss."""
        return cls(run, read_at(run.path, level), read_at(run.line, level), runs)


def find_rate(
    execute: Execute, candidate: str, level: float, *, seed: int, half: Half, start: int = 0, limit: int | None = None
) -> tuple[int | None, dict[int, Run]]:
    """The slowest rate at which a candidate arrives, to a factor of √2.

    Args:
        execute: makes the runs.
        candidate: its name.
        level: of the held-out loss.
        seed: of all these runs.
        half: of the probes' data.
        start: the step of the rate at which the search begins.
        limit: how many runs it may make.

    Returns:
        The step of the rate, ``None`` if no rate that was tried arrives; and the runs by their steps.
    """
    tried: dict[int, Run] = {}
    while limit is None or len(tried) < limit:
        step = next_step({at: lowest_loss(run.path) for at, run in tried.items()}, level, start)
        if step is None:
            break
        (tried[step],) = execute([Spec(candidate, step, seed, half)])
    return slowest({at: lowest_loss(run.path) for at, run in tried.items()}, level), tried


def at_seed(
    execute: Execute, steps: Mapping[str, int], level: float, *, seed: int, half: Half, climbs: int = CLIMBS
) -> dict[str, Outcome]:
    """What candidates keep at the level with a seed, each at the slowest rate from a given one on that arrives.

    A rate that just arrives with one seed just misses with about every other one; such a seed is run again at rates
    √2 faster each, so that it has a value, and a seed with which none arrives has none, which is an outcome.

    Args:
        execute: makes the runs, those of all candidates together.
        steps: by candidate the step of the rate at which it begins.
        level: of the held-out loss.
        seed: of the runs.
        half: of the probes' data.
        climbs: how many faster rates are tried.
    """
    outcomes: dict[str, Outcome] = {}
    for climb in range(climbs + 1):
        left = [name for name in steps if name not in outcomes or not outcomes[name].arrived]
        if not left:
            break
        for run in execute([Spec(name, steps[name] + climb, seed, half) for name in left]):
            outcomes[run.spec.candidate] = Outcome.of(run, level, climb + 1)
    return outcomes

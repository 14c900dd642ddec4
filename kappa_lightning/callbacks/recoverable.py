"""What of a capability comes back after a few steps, beside what is left of it now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl

from kappa_lightning.arguments import as_count
from kappa_lightning.callbacks.evaluation import circumstances_of
from kappa_lightning.callbacks.trainer import batch_limit
from kappa_lightning.evaluation import SameOptimizers, measure_rest, require_recoverable, retention
from kappa_lightning.probes import Probe


class Recoverable:
    """The retention of each probe after some steps on its first batches, over its other batches.

    Args:
        steps: how many; ``None`` measures nothing.
        probes: by name.

    Attributes:
        before: each probe's metric on the other batches before the first step.

    Raises:
        ValueError: if ``steps`` is below 1, or a probe has no loss, no other batches or a shuffling dataloader.
    """

    def __init__(self, steps: int | None, probes: Mapping[str, Probe]) -> None:
        self.steps = None if steps is None else as_count(steps, "recoverable")
        self.probes = dict(probes) if steps is not None else {}
        self.before: dict[str, float] = {}
        for name, probe in self.probes.items():
            require_recoverable(name, probe, self.steps or 1)

    def begin(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Measure the baseline, after that of all batches; ``within`` makes a context around it."""
        self.before = {name: self._measure(trainer, module, name, False, within) for name in self.probes}

    def restore(self, saved: Mapping[str, float], source: str) -> None:
        """Take over the baseline of the run that is resumed.

        Raises:
            ValueError: if it lacks a probe's.
        """
        for name in self.probes:
            if name not in saved:
                raise ValueError(
                    f"{source} has no baseline for recoverable={self.steps} of the probe {name!r}, and measuring one "
                    "on weights that are trained already would hide what they forgot: leave recoverable as it was there"
                )
        self.before = {name: saved[name] for name in self.probes}

    def figures(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        """The retention after the steps, under its tags."""
        return {
            f"forgetting/{name}/recoverable": retention(
                self.before[name], self._measure(trainer, module, name, True), probe.higher_is_better
            )
            for name, probe in self.probes.items()
        }

    def _measure(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        name: str,
        learns: bool,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> float:
        assert self.steps is not None
        if learns and not trainer.optimizers:
            raise ValueError(f"recoverable={self.steps} takes steps like the module's optimizer, and it has none")
        limit = batch_limit(trainer)
        steps = self.steps if limit is None else min(self.steps, limit)
        circumstances = circumstances_of(trainer, module, name)
        make_optimizers = SameOptimizers(trainer.optimizers) if learns else None
        return measure_rest(module, self.probes[name], circumstances, steps, make_optimizers, name, within).value

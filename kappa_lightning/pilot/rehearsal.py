"""How long a run will take, from a few steps of one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from kappa_lightning.pilot.candidates import Candidate
from kappa_lightning.pilot.trial import Setup, Spec, run_trial

STEPS = 4
"""Optimizer steps of a rehearsal; the first pays for what is set up once, and is not counted."""


class _Clock(Callback):
    """Seconds of each batch that was trained on, and of each evaluation in between."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[float] = []
        self.evaluations: list[float] = []
        self._batch = self._evaluation = 0.0

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # a run copies the callbacks that it is given

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self._evaluated()
        self._batch = time.perf_counter()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.batches.append(time.perf_counter() - self._batch)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluation = time.perf_counter()

    @override
    def on_train_start(self, *_: Any) -> None:
        self._evaluation = 0.0  # that of before the fit

    @override
    def on_train_end(self, *_: Any) -> None:
        self._evaluated()

    def _evaluated(self) -> None:
        # The probes come behind the validation, so it ends when something else begins.
        if self._evaluation:
            self.evaluations.append(time.perf_counter() - self._evaluation)
            self._evaluation = 0.0


def seconds_of_a_run(setup: Setup, by: Candidate, seed: int) -> float:
    """An estimate of the seconds that a run takes; the module is left as it was.

    Args:
        setup: of all runs.
        by: the candidate that is tried.
        seed: of the run.
    """
    clock = _Clock()
    given = setup.trainer.get("callbacks") or []
    own = [*given] if isinstance(given, list | tuple) else [given]
    steps = min(setup.steps, STEPS)
    trainer: Mapping[str, Any] = {**setup.trainer, "callbacks": [clock, *own]}
    short = replace(setup, steps=steps, evaluations=1, blends=0, trainer=trainer)
    run = run_trial(short, Spec(by.name, 0, seed, "search"), by)
    trained, evaluated = sum(clock.batches), sum(clock.evaluations)
    batches = clock.batches[1:] or clock.batches
    each = evaluated / max(1, len(clock.evaluations))
    per_step = sum(batches) / max(1, len(batches)) * len(clock.batches) / steps
    ready = max(0.0, run.seconds - trained - evaluated)
    return ready + per_step * setup.steps + each * (setup.evaluations + setup.blends)

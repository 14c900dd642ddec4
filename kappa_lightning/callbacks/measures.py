"""The probes of a ForgettingEval on its module: what they gave before the first step, and what they give now."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from kappa_lightning.callbacks.breach import Limit
from kappa_lightning.callbacks.evaluation import measure
from kappa_lightning.callbacks.recoverable import Recoverable
from kappa_lightning.callbacks.retention import figures_of, require_ratios
from kappa_lightning.callbacks.trainer import batch_limit
from kappa_lightning.evaluation import Items, Measurement, adapters_off, has_adapters
from kappa_lightning.probes import Probe

NO_BASELINE = (
    "{source} has no baseline of the probe {probe!r}, and measuring one on weights that are trained already would hide "
    "what they forgot: leave this probe out, or load the weights into a new module and call fit without ckpt_path to "
    "start from them"
)
_IDENTITY = 1e-4
"""Relative: more than kernels and precisions differ by."""


class Measures:
    """Measures probes, and keeps what each gave before the first step.

    Args:
        probes: by name.
        recoverable: the number of steps back; ``None`` takes none.

    Attributes:
        baseline: each probe's metric before the first step.
        items: those of the baseline, for the probes whose metric can be taken apart.
        recovery: the retention after the steps back.

    Raises:
        ValueError: if a probe cannot take the steps back.
    """

    def __init__(self, probes: Mapping[str, Probe], recoverable: int | None) -> None:
        self.probes = dict(probes)
        self.recovery = Recoverable(recoverable, self.probes)
        self.baseline: dict[str, float] = {}
        self.items: dict[str, Items] = {}

    def forget(self) -> None:
        """Have no baseline any longer."""
        self.baseline, self.items = {}, {}

    def take(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> dict[str, Measurement]:
        """Measure each probe on the module as it is now; ``within`` makes a context around all batches of one.

        Raises:
            ValueError: if a metric is NaN, or infinite where that is no capability that is gone.
        """
        measured = {name: measure(trainer, module, name, probe, within) for name, probe in self.probes.items()}
        for name, measurement in measured.items():
            value = measurement.value
            # An infinite perplexity is a capability that is gone; it has a retention, 0.
            ratio = math.isfinite(value) or (
                self.baseline and value == math.inf and not self.probes[name].higher_is_better
            )
            if not ratio and batch_limit(trainer) is None:
                raise ValueError(
                    f"the probe {name!r} returned {self.probes[name].name}={value} at step {trainer.global_step}: "
                    + (
                        "check its data and its step on the untrained model"
                        if trainer.global_step == 0
                        else "the model has probably diverged; lower the learning rate or resume from a checkpoint"
                    )
                )
        return measured

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, limit: Limit) -> dict[str, Measurement]:
        """The first evaluation of a run, which also measures the baseline if there is none yet.

        With adapters in the module the baseline is that of the model without them.

        Raises:
            ValueError: if a baseline is nothing that can be lost, or has not what the limit looks at.
        """
        if self.baseline:
            return self.take(trainer, module)
        for probe in self.probes.values():
            probe.begin_baseline()
        adapted = has_adapters(module)
        within = partial(adapters_off, module) if adapted else nullcontext
        base = self.take(trainer, module, within)
        self.recovery.begin(trainer, module, within)
        values = {name: measurement.value for name, measurement in base.items()}
        if batch_limit(trainer) is None:
            require_ratios(self.probes, values)
            limit.require_intervals(base)
        self.baseline = values
        self.items = {name: m.items for name, m in base.items() if m.items is not None}
        if not adapted:
            return base
        now = self.take(trainer, module)
        for name, measurement in now.items():
            if not math.isclose(measurement.value, values[name], rel_tol=_IDENTITY):
                rank_zero_warn(
                    f"the module's adapters are not the identity before the first step: the probe {name!r} has "
                    f"{self.probes[name].name}={measurement.value:g} with them and {values[name]:g} without; the "
                    "retention is relative to the base model without them"
                )
        return now

    def figures(
        self, trainer: pl.Trainer, module: pl.LightningModule, measured: Mapping[str, Measurement]
    ) -> dict[str, float]:
        """What is logged of all probes, under its tags; with the steps back, which are taken here."""
        scalars: dict[str, float] = {}
        for name, measurement in measured.items():
            scalars |= figures_of(name, self.probes[name], self.baseline[name], self.items.get(name), measurement)
        return scalars | self.recovery.figures(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "baseline": dict(self.baseline),
            "probes": {name: probe.state_dict() for name, probe in self.probes.items()},
            "items": {name: items.state_dict() for name, items in self.items.items()},
            "rest": dict(self.recovery.before),
        }

    def resume(self, saved: Mapping[str, Any], source: str) -> None:
        """Take over what a checkpoint held; one of version 0.1.0 has the baseline and the probes alone.

        Raises:
            ValueError: if it has no baseline of a probe; the message names ``source``.
        """
        missing = [name for name in self.probes if name not in saved["baseline"]]
        if missing:
            raise ValueError(NO_BASELINE.format(source=source, probe=missing[0]))
        self.recovery.restore(saved.get("rest", {}), source)
        self.baseline = dict(saved["baseline"])
        self.items = {name: Items.from_state(items) for name, items in saved.get("items", {}).items()}
        for name, probe in self.probes.items():
            probe.load_state_dict(saved.get("probes", {}).get(name, {}))

"""What is measured at a point of the way back: the probes in two halves, and the validation loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import RandomSampler

from kappa_lightning.callbacks.evaluation import evaluate
from kappa_lightning.probes import Probe, known_length


class HalvedProbes:
    """Probes of which every other batch chooses and the others report.

    Args:
        probes: by name.
        have_begun: whether what they record of the pretrained model is there already.

    Raises:
        ValueError: if a probe has fewer than two batches, or gives them in another order each time.
    """

    def __init__(self, probes: Mapping[str, Probe], have_begun: bool) -> None:
        self.probes = dict(probes)
        self.have_begun = have_begun
        self._baseline: tuple[dict[str, float], dict[str, float]] = ({}, {})
        for name, probe in self.probes.items():
            length = known_length(probe.dataloader)
            if length is not None and length < 2:
                raise ValueError(
                    f"the probe {name!r} has one batch, which cannot both choose a point and report on it: give it "
                    "smaller batches, at least two"
                )
            if isinstance(getattr(probe.dataloader, "sampler", None), RandomSampler):
                raise ValueError(
                    f"the probe {name!r} shuffles its data, so its two halves would mix: give a dataloader with "
                    "shuffle=False"
                )

    def begin_choice(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure what retention is relative to, with the pretrained weights in the module."""
        if not self.have_begun:
            for name, probe in self.probes.items():
                if type(probe).begin_baseline is not Probe.begin_baseline:
                    # It records in this pass, of both halves.
                    probe.begin_baseline()
                    evaluate(trainer, module, name, probe)
        self._baseline = (self._measured(trainer, module, 0), {})

    def begin_report(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The same for the half that reports."""
        self._baseline = (self._baseline[0], self._measured(trainer, module, 1))

    def choice(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        """The retention of each probe on the half that chooses."""
        return self._retention(trainer, module, 0)

    def report(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        """The retention of each probe on the half that reports."""
        return self._retention(trainer, module, 1)

    @staticmethod
    def whole(trainer: pl.Trainer, module: pl.LightningModule, name: str, probe: Probe) -> float:
        """A probe's metric on all of its batches."""
        return evaluate(trainer, module, name, probe)

    def _retention(self, trainer: pl.Trainer, module: pl.LightningModule, half: int) -> dict[str, float]:
        values = self._measured(trainer, module, half)
        return {name: self._ratio(name, self._baseline[half][name], value) for name, value in values.items()}

    def _ratio(self, name: str, before: float, now: float) -> float:
        numerator, denominator = (now, before) if self.probes[name].higher_is_better else (before, now)
        return numerator / denominator if denominator else float("nan")

    def _measured(self, trainer: pl.Trainer, module: pl.LightningModule, half: int) -> dict[str, float]:
        found = {}
        for name, probe in self.probes.items():
            with _half_of(probe, half):
                found[name] = evaluate(trainer, module, name, probe)
        return found


class _EverySecond(Iterable[Any]):
    """Every second batch of an iterable."""

    def __init__(self, batches: Iterable[Any], first: int) -> None:
        self.batches = batches
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.first, None, 2)

    def __len__(self) -> int:
        length = known_length(self.batches)
        if length is None:
            raise TypeError("the length is known only at the end")
        return len(range(self.first, length, 2))


@contextmanager
def _half_of(probe: Probe, half: int) -> Iterator[None]:
    whole = probe.dataloader
    probe.dataloader = _EverySecond(whole, half)
    try:
        yield
    finally:
        probe.dataloader = whole


def validated(trainer: pl.Trainer, monitor: str, *, keep: bool = False) -> float:
    """Run the validation loop of a fit once more, out of sight of callbacks and loggers, and return a metric of it.

    Args:
        trainer: whose fit has ended, or is between two epochs.
        monitor: the metric's name.
        keep: whether ``trainer.callback_metrics`` keep what this run found.

    Raises:
        ValueError: if the loop logs no such metric.
    """
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    connector = trainer._logger_connector
    before = {name: dict(getattr(connector, name)) for name in ("_callback_metrics", "_logged_metrics")}
    first, training = connector._first_loop_iter, trainer.training
    trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
    try:
        connector._callback_metrics.pop(monitor, None)
        trainer.validating = True
        with isolate_rng():
            trainer.fit_loop.epoch_loop.val_loop.run()
        found = dict(trainer.callback_metrics)
    finally:
        trainer.training = training
        connector._first_loop_iter = first
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        if not keep:
            for name, metrics in before.items():
                getattr(connector, name).clear()
                getattr(connector, name).update(metrics)
    if monitor not in found:
        raise ValueError(
            f"the validation loop logs no metric {monitor!r}, but {', '.join(sorted(found)) or 'none'}: name one of "
            "these as monitor"
        )
    return float(found[monitor])

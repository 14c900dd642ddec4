"""Evaluate a probe under a Trainer's precision and strategy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl

from kappa_lightning.callbacks.progress import track
from kappa_lightning.callbacks.trainer import batch_limit
from kappa_lightning.evaluation import Circumstances, Measurement, measure_probe
from kappa_lightning.probes import Probe
from kappa_lightning.strategies import adapter_for


def evaluate(trainer: pl.Trainer, module: pl.LightningModule, name: str, probe: Probe) -> float:
    """A probe's metric on the module as it is now, under the Trainer's precision; see :func:`measure`."""
    return measure(trainer, module, name, probe).value


def measure(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    name: str,
    probe: Probe,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Measurement:
    """A probe's metric on the module as it is now, under the Trainer's precision, and its items.

    Several processes share the batches, each of which counts once, and all get the same value; it differs from that
    of one process only in the order of its sums. With ``fast_dev_run=n`` each reads only n batches, as in Lightning's
    own loops. ``within`` makes a context around all batches.

    Raises:
        ValueError: if the dataloader gives no batch or the metric is no scalar; this and any error of the probe's own
            code names the probe.
    """
    return measure_probe(module, probe, circumstances_of(trainer, module, name), name, within)


def circumstances_of(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> Circumstances:
    """What a Trainer adds to the evaluation of the probe of a name."""
    adapter = adapter_for(trainer)
    return Circumstances(
        device=trainer.strategy.root_device,
        processes=adapter.processes(trainer),
        share=adapter.share(trainer),
        limit=batch_limit(trainer),
        convert=trainer.precision_plugin.convert_input,
        precision=trainer.precision_plugin.val_step_context,
        evaluating=partial(adapter.evaluating, module),
        settle=partial(adapter.settle, module),
        track=lambda batches, total: track(trainer, batches, total=total, description=f"Probe {name}", unit="batch"),
    )

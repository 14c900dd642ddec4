"""Evaluate a probe on a module that is training, and leave no trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from kappa_lightning.callbacks.progress import track
from kappa_lightning.probes import Probe, known_length


def batch_limit(trainer: pl.Trainer) -> int | None:
    """How many batches each loop may read under ``fast_dev_run``; ``None`` without it."""
    batches: int = trainer.fast_dev_run  # type: ignore[attr-defined]
    return int(batches) or None


def evaluate(trainer: pl.Trainer, module: pl.LightningModule, name: str, probe: Probe) -> float:
    """A probe's metric on the module as it is now, under the Trainer's precision.

    With ``fast_dev_run=n`` only n batches are read, as in Lightning's own loops.

    Raises:
        ValueError: if the dataloader gives no batch or the metric is no scalar; this and any error of the probe's own
            code names the probe.
    """
    limit = batch_limit(trainer)
    total = known_length(probe.dataloader)
    device = trainer.strategy.root_device
    with undisturbed(module):
        probe.metric.reset()
        probe.metric.to(device)
        try:
            count = 0
            batches = islice(probe.dataloader, limit)
            total = min(total, limit) if total is not None and limit is not None else total
            for batch in track(trainer, batches, total=total, description=f"Probe {name}", unit="batch"):
                batch = probe.prepare(batch, trainer.precision_plugin.convert_input)
                batch = move_data_to_device(batch, device)
                with trainer.precision_plugin.val_step_context():
                    probe.update(module, batch)
                count += 1
            if count == 0:
                raise ValueError("the dataloader gave no batch: there is nothing to measure")
            return probe.compute()
        except Exception as error:
            # Nothing is caught for good: the note tells whose step or metric the error comes from.
            error.add_note(f"in ForgettingEval's probe {name!r}")
            raise
        finally:
            probe.metric.reset()


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode without gradients, and leave everything as found afterwards.

    Restored are the mode of each submodule, the state of every random number generator, and the running statistics of
    BatchNorm, even if the code inside calls ``module.train()``.
    """
    modes = {submodule: submodule.training for submodule in module.modules()}
    norms = [submodule for submodule in module.modules() if isinstance(submodule, _NormBase)]
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    # Lightning validates in inference mode; tensors that a module caches there could not be used in training.
    with isolate_rng(), _isolate_mps(), torch.inference_mode(False), torch.no_grad():
        module.eval()
        try:
            yield
        finally:
            for submodule, training in modes.items():
                submodule.training = training
            for buffer, value in statistics:
                buffer.copy_(value)


@contextmanager
def _isolate_mps() -> Iterator[None]:
    if not torch.backends.mps.is_available():
        yield
        return
    state = torch.mps.get_rng_state()
    try:
        yield
    finally:
        torch.mps.set_rng_state(state)

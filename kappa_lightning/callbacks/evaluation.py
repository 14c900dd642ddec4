"""Evaluate a probe on a module that is training, and leave no trace of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric

from kappa_lightning.callbacks.batches import SharedBatches
from kappa_lightning.callbacks.progress import track
from kappa_lightning.probes import Probe
from kappa_lightning.processes import Processes
from kappa_lightning.strategies import Share, adapter_for


def batch_limit(trainer: pl.Trainer) -> int | None:
    """How many batches each loop may read under ``fast_dev_run``; ``None`` without it."""
    batches: int = trainer.fast_dev_run  # type: ignore[attr-defined]
    return int(batches) or None


def evaluate(trainer: pl.Trainer, module: pl.LightningModule, name: str, probe: Probe) -> float:
    """A probe's metric on the module as it is now, under the Trainer's precision.

    Several processes share the batches, each of which counts once, and all get the same value; it differs from that
    of one process only in the order of its sums. With ``fast_dev_run=n`` each reads only n batches, as in Lightning's
    own loops.

    Raises:
        ValueError: if the dataloader gives no batch or the metric is no scalar; this and any error of the probe's own
            code names the probe.
    """
    adapter = adapter_for(trainer)
    share, processes = adapter.share(trainer), adapter.processes(trainer)
    device = trainer.strategy.root_device
    batches = SharedBatches(probe.dataloader, share, limit=batch_limit(trainer))
    # In lockstep a process that fails leaves the others in a forward pass, where they cannot be told.
    together = Processes() if share.lockstep else processes
    with undisturbed(module), adapter.evaluating(module):
        _seed_alike(processes)
        probe.metric.reset()
        probe.metric.to(device)
        try:
            count = 0
            with together.failing_together():
                shown = track(trainer, batches, total=batches.length, description=f"Probe {name}", unit="batch")
                for batch, counts in shown:
                    batch = probe.prepare(batch, trainer.precision_plugin.convert_input)
                    batch = move_data_to_device(batch, device)
                    with trainer.precision_plugin.val_step_context():
                        if counts:
                            probe.update(module, batch)
                        else:
                            probe.step(module, batch)
                    count += 1
                if count == 0:
                    raise ValueError("the dataloader gave no batch: there is nothing to measure")
            with _added_up(probe.metric, share, batches.split):
                value = probe.compute()
            return processes.broadcast(value)
        except Exception as error:
            # Nothing is caught for good: the note tells whose step or metric the error comes from.
            error.add_note(f"in ForgettingEval's probe {name!r}")
            raise
        finally:
            probe.metric.reset()
            adapter.settle(module)


@contextmanager
def _added_up(metric: Metric, share: Share, split: bool) -> Iterator[None]:
    """Let a metric add up the processes that have seen different batches, and only those, when it is computed."""
    metrics = [part for part in metric.modules() if isinstance(part, Metric)]
    for part in metrics:
        if split and not part.sync_on_compute:
            raise ValueError(
                f"{type(part).__name__} has sync_on_compute=False, and the processes have seen different batches: "
                "leave that argument out"
            )
    before = [(part.distributed_available_fn, part.process_group) for part in metrics]
    for part in metrics:
        part.distributed_available_fn, part.process_group = (lambda: split), share.group
    try:
        yield
    finally:
        for part, (available, group) in zip(metrics, before, strict=True):
            part.distributed_available_fn, part.process_group = available, group


def _seed_alike(processes: Processes) -> None:
    """Give all processes the same random numbers, so that a shuffled dataloader gives them one order to share."""
    if processes.world_size > 1:
        seed = processes.broadcast(int(torch.randint(2**31, ()).item()))
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the generator that samplers draw from
        random.seed(seed)


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

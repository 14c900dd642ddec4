"""Evaluate a probe on a module that may be training, and leave no trace of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torchmetrics import Metric

from kappa_lightning.evaluation.batches import Share, SharedBatches
from kappa_lightning.evaluation.items import ItemRecorder, Items, key_of
from kappa_lightning.evaluation.trace import undisturbed
from kappa_lightning.probes import Probe
from kappa_lightning.processes import Processes


def _as_it_is(batch: Any) -> Any:
    return batch


def _untracked(batches: Iterable[Any], _: int | None) -> Iterable[Any]:
    return batches


@dataclass(frozen=True)
class Circumstances:
    """What a Trainer and its strategy add to an evaluation; the defaults are one process without a Trainer.

    Attributes:
        device: where the batches go; by default where the module's first parameter is.
        processes: who takes part.
        share: which of the batches this process reads.
        limit: how many batches each process reads at most.
        convert: casts the floats of a batch to the precision of the module.
        precision: makes the context in which a batch runs, such as autocast.
        evaluating: makes the context around all batches.
        settle: called when the last batch has run.
        track: passes on the batches, of which there may be a known number, to show progress.
    """

    device: torch.device | None = None
    processes: Processes = field(default_factory=Processes)
    share: Share = field(default_factory=Share)
    limit: int | None = None
    convert: Callable[[Any], Any] = _as_it_is
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext
    settle: Callable[[], None] = lambda: None
    track: Callable[[Iterable[Any], int | None], Iterable[Any]] = _untracked


def evaluate_probe(module: nn.Module, probe: Probe) -> float:
    """A probe's metric on a module as it is now, for a script or a notebook.

    The module is in eval mode and without gradients meanwhile, and afterwards everything it holds is as it was
    (:func:`~kappa_lightning.evaluation.undisturbed`), the global random number generators included. Batches go to the
    device of the module's first parameter. Inside a fit :class:`~kappa_lightning.ForgettingEval` does the same under
    the Trainer's precision and strategy.

    Args:
        module: any module that the probe's step takes, such as a LightningModule or a model of transformers.
        probe: what is measured. A probe that compares with what the model was before
            (:class:`~kappa_lightning.AgreementProbe`) records in the first evaluation after ``begin_baseline()``.

    Returns:
        The metric over all batches.

    Raises:
        ValueError: if the dataloader gives no batch, or the metric is no scalar.
        RuntimeError: if the probe's step changed the module's weights or gradients.

    Example:
        >>> from kappa_lightning import AccuracyProbe
        >>> model = torch.nn.Linear(4, 3)
        >>> inputs = torch.randn(8, 4)
        >>> evaluate_probe(model, AccuracyProbe([(inputs, model(inputs).argmax(-1))]))
        1.0
    """
    return run_probe(module, probe, Circumstances())


@dataclass(frozen=True)
class Measurement:
    """What an evaluation found.

    Attributes:
        value: the metric over all batches.
        items: what each sample or batch added to it, if the metric can be taken apart.
    """

    value: float
    items: Items | None = None


def run_probe(module: nn.Module, probe: Probe, circumstances: Circumstances, name: str | None = None) -> float:
    """A probe's metric on a module under what a Trainer adds; see :func:`measure_probe`."""
    return measure_probe(module, probe, circumstances, name).value


def measure_probe(
    module: nn.Module,
    probe: Probe,
    circumstances: Circumstances,
    name: str | None = None,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    dataloader: Iterable[Any] | None = None,
    moved: Collection[nn.Parameter] = (),
) -> Measurement:
    """A probe's metric on a module under what a Trainer adds, and its items; see :func:`evaluate_probe`.

    Several processes share the batches, each of which counts once, and all get the same value; it differs from that of
    one process only in the order of its sums.

    Args:
        module: what is measured.
        probe: how.
        circumstances: what a Trainer adds.
        name: the probe's, for the notes of errors that its own code raises.
        within: makes a context around all batches, inside which what it changes in the module is put back.
        dataloader: other batches than the probe's own.
        moved: parameters that ``within`` moves and puts back itself.
    """
    share, processes = circumstances.share, circumstances.processes
    device = circumstances.device or _device_of(module)
    batches = SharedBatches(probe.dataloader if dataloader is None else dataloader, share, limit=circumstances.limit)
    # In lockstep a process that fails leaves the others in a forward pass, where they cannot be told.
    together = Processes() if share.lockstep else processes
    with undisturbed(module, moved), _seeded_alike(processes), circumstances.evaluating(), within():
        probe.metric.reset()
        probe.metric.to(device)
        recorder = ItemRecorder(probe)
        try:
            count = 0
            with together.failing_together():
                for batch, counts in circumstances.track(batches, batches.length):
                    key = key_of(batch) if counts and recorder.works else ""
                    batch = probe.prepare(batch, circumstances.convert)
                    batch = move_data_to_device(batch, device)
                    with circumstances.precision():
                        if counts:
                            recorder.begin_batch()
                            recorder.end_batch(key, probe.update(module, batch), batch)
                        else:
                            probe.step(module, batch)
                    count += 1
                if count == 0:
                    raise ValueError("the dataloader gave no batch: there is nothing to measure")
            with _added_up(probe.metric, share, batches.split):
                value = probe.compute()
            return Measurement(processes.broadcast(value), recorder.items(processes, share, batches.split))
        except Exception as error:
            # Nothing is caught for good: the note tells whose step or metric the error comes from.
            if name is not None:
                error.add_note(f"in ForgettingEval's probe {name!r}")
            raise
        finally:
            probe.metric.reset()
            circumstances.settle()


def _device_of(module: nn.Module) -> torch.device:
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


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


@contextmanager
def _seeded_alike(processes: Processes) -> Iterator[None]:
    """Give all processes the same random numbers, so that a shuffled dataloader gives them one order to share."""
    if processes.world_size > 1:
        seed = processes.broadcast(int(torch.randint(2**31, ()).item()))
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the generator that samplers draw from
        random.seed(seed)
    yield

"""The new task as a Trainer has it: its first batches and its loss, before training begins and without a trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from kappa_lightning.callbacks.streams import stream_beside
from kappa_lightning.fingerprint import fingerprint
from kappa_lightning.processes import Processes
from kappa_lightning.restoring import random_numbers_restored

OWN_LOSS = "adaptation_loss"
"""The method of a module that gives the loss of a batch, where ``training_step`` does not return it."""


def require_loss(trainer: pl.Trainer, module: pl.LightningModule, who: str) -> None:
    """Make sure that the loss of a batch can be asked for.

    Raises:
        ValueError: if ``training_step`` steps the optimizers itself, or draws its batches itself.
    """
    if callable(getattr(module, OWN_LOSS, None)):
        return
    if not module.automatic_optimization:
        raise ValueError(
            f"{who} takes the new task's gradient from the loss that training_step returns, and with manual "
            f"optimization (automatic_optimization=False) it steps the optimizers itself: give "
            f"{type(module).__name__} a method {OWN_LOSS}(self, batch) that returns the loss of a batch, or use "
            "KappaFreezeCallback"
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"{who} gives training_step one batch, and {type(module).__name__}'s takes a dataloader_iter: give it a "
            f"method {OWN_LOSS}(self, batch) that returns the loss of a batch"
        )


def loss_of(trainer: pl.Trainer) -> Callable[[Any, Any], Tensor]:
    """The loss of a batch, as ``training_step`` returns it."""

    def loss(module: pl.LightningModule, batch: Any) -> Tensor:
        own = getattr(module, OWN_LOSS, None)
        if callable(own):
            returned = own(batch)
        elif is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
            returned = module.training_step(batch, 0)
        else:
            returned = module.training_step(batch)
        found: Tensor = returned["loss"] if isinstance(returned, dict) and "loss" in returned else returned
        return found

    return loss


def placing(trainer: pl.Trainer) -> Callable[[Any], Any]:
    """How a batch of the new task gets to the module, as in Lightning's training loop."""

    def place(batch: Any) -> Any:
        module = trainer.lightning_module
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)

    return place


def placing_reference(trainer: pl.Trainer) -> Callable[[Any], Any]:
    """How any other batch gets to the module: in its precision, on its device."""

    def place(batch: Any) -> Any:
        return move_data_to_device(trainer.precision_plugin.convert_input(batch), trainer.strategy.root_device)

    return place


@contextmanager
def silenced(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Nothing is logged by the module in the block, neither through ``log`` nor through its loggers."""
    loggers = list(trainer.loggers)
    # In the instance, where they come before those of the class.
    module.__dict__["log"] = module.__dict__["log_dict"] = _log_nothing
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers
        del module.__dict__["log"], module.__dict__["log_dict"]


def _log_nothing(*_: Any, **__: Any) -> None:
    """In place of ``LightningModule.log``."""


def train_batches(trainer: pl.Trainer, count: int, seed: int, processes: Processes) -> list[Any]:
    """The first batches of the train dataloader, on the CPU, the same in every process.

    They are read from a dataloader of their own in this process, without workers: the training later reads its batches
    as if this had not been. The order of a shuffled one comes from ``seed``. Samples are not dealt to the processes.

    Args:
        trainer: whose fit begins.
        count: how many at most; ``fast_dev_run`` and ``limit_train_batches`` limit them, too.
        seed: of the order.
        processes: who reads.

    Raises:
        ValueError: if the processes read different batches.
    """
    for limit in (int(trainer.fast_dev_run), trainer.limit_train_batches):  # type: ignore[attr-defined]
        if isinstance(limit, int) and limit > 0:
            count = min(count, limit)
    with random_numbers_restored():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - the generator that samplers draw from
        random.seed(seed)
        # Lightning asks for it again when the training begins, and would deal its samples out.
        loaders = trainer.fit_loop._data_source.dataloader()
        with _generators_restored(loaders):
            given = isinstance(loaders, CombinedLoader)
            plain = tree_map_only(DataLoader, _plain, loaders.iterables if given else loaders)
            combined = CombinedLoader(plain, loaders._mode if given else "max_size_cycle")
            iter(combined)
            batches = [batch for batch, _, _ in islice(combined, count)]
    if processes.world_size > 1:
        marks = processes.gather([_mark(batch) for batch in batches])
        if any(other != marks[0] for other in marks):
            raise ValueError(
                "the train dataloader gives the processes different batches, so its samples are dealt out already: "
                "leave that to Lightning (use_distributed_sampler=True), so that what is measured does not depend on "
                "the number of processes"
            )
    return batches


def _plain(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A dataloader of the same batches that has no workers and deals no samples out."""
    if type(loader) is not DataLoader:
        if isinstance(loader.dataset, IterableDataset):
            rank_zero_warn(
                f"{type(loader).__name__} reads a stream: if it goes on from where it was read last, training does not "
                "see the batches that are read now. Give a profile= that was measured on other batches"
            )
        return loader  # its batches may be its own
    dataset, collate = loader.dataset, loader.collate_fn
    if isinstance(dataset, IterableDataset):
        stream = stream_beside(dataset)
        return DataLoader(stream, loader.batch_size, collate_fn=collate, drop_last=loader.drop_last)
    sampler: Any = loader.sampler
    if isinstance(sampler, DistributedSampler):
        sampler = RandomSampler(dataset) if sampler.shuffle else SequentialSampler(dataset)  # type: ignore[arg-type]
    if loader.batch_sampler is None:
        return DataLoader(dataset, batch_size=None, sampler=sampler, collate_fn=collate)
    batches: Any = loader.batch_sampler
    if type(batches) is BatchSampler:
        batches = BatchSampler(sampler, batches.batch_size, batches.drop_last)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate)


def generators_of(loaders: Any) -> list[torch.Generator]:
    """The generators that dataloaders and their samplers hold, each once."""
    found: dict[int, torch.Generator] = {}
    leaves = loaders.flattened if isinstance(loaders, CombinedLoader) else tree_flatten(loaders)[0]
    for loader in leaves:
        batches = getattr(loader, "batch_sampler", None)
        for holder in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


@contextmanager
def _generators_restored(loaders: Any) -> Iterator[None]:
    """The generators that dataloaders and samplers hold go on as if nobody had drawn from them."""
    kept = [(generator, generator.get_state()) for generator in generators_of(loaders)]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)


def _mark(batch: Any) -> list[str]:
    return [fingerprint(leaf) if isinstance(leaf, Tensor) else repr(leaf)[:200] for leaf in tree_flatten(batch)[0]]

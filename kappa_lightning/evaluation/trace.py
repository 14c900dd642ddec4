"""Let a module be evaluated and leave it exactly as it was, whatever it keeps."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from kappa_lightning.evaluation.kept import Kept
from kappa_lightning.restoring import random_numbers_restored


@contextmanager
def undisturbed(module: nn.Module, moved: Collection[nn.Parameter] = ()) -> Iterator[None]:
    """Put a module into eval mode without gradients, and leave everything as found afterwards.

    Restored are, also after an exception and even if the code inside calls ``module.train()``:

    - the mode of every submodule, through its own ``train(mode)``, and the weights of layers that change them there
      (LoRA that merges its update for evaluation takes it out again, and with it the rounding);
    - all buffers, and every other attribute of every submodule: tensors, arrays, bytes, numbers, generators of random
      numbers, the contents of lists, deques, tuples, sets, dicts and buffers in memory, hooks and what they collect
      into, the settings in transformers' configurations, attributes of scripted modules and of the script's classes;
    - the same of modules that it hides from PyTorch, in a list for instance;
    - the attributes of objects that it keeps, such as meters, with or without ``__slots__``, but not the Trainer,
      datasets, loaders, loggers, callbacks and optimizers, and nothing that holds a lock, a thread or a file;
    - the state of torchmetrics in the module, also of those in its lists and dicts;
    - ``requires_grad``, the gradients, and the memory that a parameter stands for (``half()`` exchanges it);
    - the state of every global random number generator.

    Nothing is logged: ``log`` and ``log_dict`` of a LightningModule and the Trainer's loggers do nothing inside.
    Iterators that the module keeps are exchanged for copies, or, where there can be none (generators, iterators of
    dataloaders), for stand-ins that raise when they are read.

    Args:
        module: what is evaluated.
        moved: parameters that the code inside moves and puts back itself.

    Raises:
        RuntimeError: if the code inside reads from an iterator of the module that cannot be copied, or changed a
            weight or a gradient, or a large table of integers, in place, which is not copied beforehand; the message
            names it. Everything else has been restored then.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with undisturbed(norm):
        ...     _ = norm.train()(torch.randn(4, 2) + 5)
        >>> norm.training, norm.running_mean.tolist()
        (True, [0.0, 0.0])
    """
    # Lightning validates in inference mode; tensors that a module caches there could not be used in training.
    with random_numbers_restored(), torch.inference_mode(False), torch.no_grad():
        kept = Kept(module, moved)
        try:
            with ExitStack() as stack:
                _silence(module, stack)
                module.eval()
                yield
        finally:
            changed = kept.restore()
        # After an exception that one is told.
        if changed:
            raise RuntimeError(
                f"evaluating a probe changed {changed[0]} in place, and it cannot be put back: let the probe's step "
                "leave the module's weights and gradients alone"
            )


def _silence(module: nn.Module, stack: ExitStack) -> None:
    trainers: dict[int, pl.Trainer] = {}
    for submodule in module.modules():
        if isinstance(submodule, pl.LightningModule):
            # In the instance, where they come before those of the class; they go with all other new attributes.
            submodule.__dict__["log"] = submodule.__dict__["log_dict"] = _log_nothing
            if submodule._trainer is not None:
                trainers[id(submodule._trainer)] = submodule._trainer
    for trainer in trainers.values():
        # What a step writes to them by itself.
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]


def _log_nothing(*_: Any, **__: Any) -> None:
    """In place of ``LightningModule.log``."""

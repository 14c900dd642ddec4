"""The contract between the callbacks and a strategy."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from kappa_lightning.evaluation import Share
from kappa_lightning.processes import Processes
from kappa_lightning.strategies.optimizers import drop_from_optimizers
from kappa_lightning.weights import plain_parameters


class StrategyAdapter:
    """What the callbacks need of a strategy; this base serves one process on one device.

    An adapter for a strategy of one's own derives from this or from another adapter, changes what differs, and is
    made known with :func:`~kappa_lightning.strategies.register_adapter`.
    """

    def processes(self, trainer: pl.Trainer) -> Processes:
        """Who shares the work on a profile, and must come to the same selection."""
        return Processes()

    def share(self, trainer: pl.Trainer) -> Share:
        """Which batches of an evaluation this process reads."""
        return Share()

    def checkpoint_path(self, trainer: pl.Trainer, callback: Callback) -> str | os.PathLike[str] | None:
        """The checkpoint that this fit resumes from, asked in ``on_fit_start``.

        Most strategies have restored it by then. One that does so later hands the callback its state here, through
        ``on_load_checkpoint`` and ``load_state_dict``.
        """
        return trainer.ckpt_path

    def numbering(self, trainer: pl.Trainer) -> str:
        """What numbers the optimizers' states in a checkpoint: ``"optimizer"``, ``"module"`` or ``"name"``.

        The order of the optimizer's own parameters, that of all parameters of the module, or nothing but their names.
        """
        return "optimizer"

    def require_numbering(self, trainer: pl.Trainer, saved: str, kept: Collection[str]) -> None:
        """Make sure that the optimizers' states in a checkpoint will go to the parameters that they are of.

        Args:
            trainer: has the optimizers that get them, from which nothing has been dropped yet.
            saved: the :meth:`numbering` with which they were saved.
            kept: the names of the parameters that stay in the optimizers.

        Raises:
            ValueError: if they would be mixed up.
        """
        if saved != "module":
            return
        numbers = {id(p): place for place, p in enumerate(plain_parameters(trainer.lightning_module).values())}
        wanted = {id(p) for name, p in plain_parameters(trainer.lightning_module).items() if name in kept}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                order = [numbers[id(parameter)] for parameter in group["params"] if id(parameter) in wanted]
                if order != sorted(order):
                    raise ValueError(
                        "the checkpoint was saved by ModelParallelStrategy, with the optimizer's states in the order "
                        "of the module's parameters, and the optimizer here has them in another: give it them in the "
                        "order of module.parameters(), or load the weights into the module and call fit without "
                        "ckpt_path"
                    )

    def require_steps(self, trainer: pl.Trainer, dropped: Iterable[nn.Parameter]) -> None:
        """Make sure that every optimizer can still step once parameters have left it.

        Raises:
            ValueError: if a GradScaler would refuse a step of one that is left without a gradient.
        """
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            return
        gone = {id(parameter) for parameter in dropped}
        for number, optimizer in enumerate(trainer.optimizers):
            training = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            if training and all(id(parameter) in gone for parameter in training):
                raise ValueError(
                    f"optimizer {number} ({type(optimizer).__name__}) is left without a tensor that trains, and the "
                    'GradScaler of precision="16-mixed" refuses its step: name one of its tensors in always_train, '
                    'use precision="bf16-mixed", or leave the optimizer out'
                )

    def drop_from_optimizers(self, trainer: pl.Trainer, parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
        """Take parameters out of every optimizer and return a function that puts them back."""
        return drop_from_optimizers(trainer.optimizers, parameters)

    def requires_grad_changed(self, trainer: pl.Trainer) -> None:
        """Let whatever wraps the module know, once ``requires_grad`` of its parameters is as it will be."""

    def evaluating(self, module: pl.LightningModule) -> AbstractContextManager[None]:
        """What must hold while the module is evaluated, such as equal buffers on all processes."""
        return nullcontext()

    @property
    def averages_in_backward(self) -> bool:
        """Whether a backward pass on the module itself, outside of its wrapper, leaves gradients that all share."""
        return True

    def average_gradients(self, trainer: pl.Trainer, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients that such a pass left on each process, where it does not do so itself."""

    def settle(self, module: pl.LightningModule) -> None:
        """Put the module's parameters back to how they are between steps, after a forward pass or before a read."""

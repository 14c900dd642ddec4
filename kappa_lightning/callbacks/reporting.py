"""Figures and texts to the Trainer's loggers, and figures to the callbacks that monitor them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Write scalars to every logger at the global step, and show them to ``ModelCheckpoint`` and ``EarlyStopping``.

    ``LightningModule.log`` would write at the number of batches and only in some hooks; here the step is the
    optimizer's, in every hook.
    """
    publish(trainer, scalars)
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        # Lightning adds the epoch to whatever it logs; a table of figures is joined by it.
        logger.log_metrics({**scalars, "epoch": trainer.current_epoch}, step=trainer.global_step)
        logger.save()


def publish(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Show scalars to the callbacks that monitor a metric, without logging them."""
    tensors = {key: torch.tensor(value) for key, value in scalars.items()}
    # Both properties return the Trainer's own dictionaries, to which Lightning adds and from which it removes nothing
    # until the next run.
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)


def log_text(trainer: pl.Trainer, tag: str, markdown: str) -> None:
    """Write a text to every TensorBoard logger."""
    for logger in _tensorboards(trainer):
        logger.experiment.add_text(tag, markdown, trainer.global_step)


def log_figure(trainer: pl.Trainer, tag: str, figure: Figure) -> None:
    """Write a picture to every TensorBoard logger."""
    for logger in _tensorboards(trainer):
        logger.experiment.add_figure(tag, figure, trainer.global_step, close=False)


def shows_pictures(trainer: pl.Trainer) -> bool:
    """Whether any of the Trainer's loggers takes pictures, so that one is worth drawing."""
    return any(True for _ in _tensorboards(trainer))


def _tensorboards(trainer: pl.Trainer) -> Iterator[TensorBoardLogger]:
    if trainer.is_global_zero:
        yield from (logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))

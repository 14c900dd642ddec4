"""Questions to a Trainer that several callbacks ask."""

from __future__ import annotations

from typing import TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

Kind = TypeVar("Kind", bound=Callback)


def callbacks_of(trainer: pl.Trainer, kind: type[Kind]) -> list[Kind]:
    """The Trainer's callbacks of a kind, in their order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def batch_limit(trainer: pl.Trainer) -> int | None:
    """How many batches each loop may read under ``fast_dev_run``; ``None`` without it."""
    batches: int = trainer.fast_dev_run  # type: ignore[attr-defined]
    return int(batches) or None


def has_trained(trainer: pl.Trainer) -> bool:
    """Whether the Trainer has trained before.

    The batches count, too, since the global step stands still where a module steps its bare optimizers by hand.
    """
    return trainer.global_step > 0 or trainer.fit_loop.epoch_loop.batch_progress.total.completed > 0


def saves_on_exception(trainer: pl.Trainer) -> bool:
    """Whether a callback saves a checkpoint when a fit fails."""
    keeps = any(callback.save_on_exception for callback in callbacks_of(trainer, ModelCheckpoint))
    return keeps or bool(callbacks_of(trainer, OnExceptionCheckpoint))

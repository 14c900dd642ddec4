"""When a callback that measures is due: after epochs, after optimizer steps, or both."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from kappa_lightning.arguments import as_count


@dataclass(frozen=True, slots=True)
class Schedule:
    """After every n-th epoch, every n-th optimizer step, or both.

    Attributes:
        every_n_epochs: epochs between; ``None`` is 1 without ``every_n_train_steps``, and never with it.
        every_n_train_steps: optimizer steps between, as ``Trainer.global_step`` counts them; ``None`` is never.

    Raises:
        ValueError: if a number is not an int of at least 1.

    Example:
        >>> Schedule(), Schedule(every_n_train_steps=100)
        (Schedule(every_n_epochs=1, every_n_train_steps=None), Schedule(every_n_epochs=None, every_n_train_steps=100))
        >>> Schedule(every_n_train_steps=100).passes_step(99, 100)
        True
    """

    every_n_epochs: int | None = None
    every_n_train_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("every_n_epochs", "every_n_train_steps"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_count(value, name))
        if self.every_n_epochs is None and self.every_n_train_steps is None:
            object.__setattr__(self, "every_n_epochs", 1)

    def passes_step(self, before: int, now: int) -> bool:
        """Whether a multiple of ``every_n_train_steps`` lies after one global step, and up to another.

        Where several optimizers step in one batch, the global step moves by more than one.
        """
        n = self.every_n_train_steps
        return n is not None and now // n > before // n

    def missed_step(self, last: int, now: int) -> bool:
        """Whether it is due at a global step itself, and was measured last before that.

        A checkpoint may have been saved at this step before the callback had its turn.
        """
        return last < now and self.every_n_train_steps is not None and now % self.every_n_train_steps == 0

    def ends_epoch(self, epochs: int) -> bool:
        """Whether this number of completed epochs is one after which it is due."""
        return self.every_n_epochs is not None and epochs % self.every_n_epochs == 0

    @property
    def often(self) -> str:
        """In words, such as "every 2 epochs"."""
        words = []
        if self.every_n_train_steps is not None:
            words.append(
                "after every step" if self.every_n_train_steps == 1 else f"every {self.every_n_train_steps} steps"
            )
        if self.every_n_epochs is not None:
            words.append("after every epoch" if self.every_n_epochs == 1 else f"every {self.every_n_epochs} epochs")
        return " and ".join(words)


def warn_of_stale_monitors(trainer: pl.Trainer, schedule: Schedule) -> None:
    """Warn of callbacks that look at a retention more often than it is measured."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        monitor = str(getattr(callback, "monitor", None))
        if isinstance(callback, ModelCheckpoint | EarlyStopping) and monitor.startswith("forgetting/"):
            message = _stale(trainer, schedule, callback)
            if message is not None:
                rank_zero_warn(f"{type(callback).__name__} monitors {monitor}, which is measured {message}")


def _stale(trainer: pl.Trainer, schedule: Schedule, callback: ModelCheckpoint | EarlyStopping) -> str | None:
    n, steps = schedule.every_n_epochs, schedule.every_n_train_steps
    # What these arguments are kept in has no public form.
    looks_by_steps = callback._every_n_train_steps if isinstance(callback, ModelCheckpoint) else 0
    looks_by_epochs = callback._every_n_epochs if isinstance(callback, ModelCheckpoint) else 1
    if looks_by_steps and steps is not None:
        if looks_by_steps % steps == 0:
            return None
        return (
            f"{schedule.often}, and it looks every {looks_by_steps}; between, it sees the last figure, at first the "
            f"1.0 from before training. Use ModelCheckpoint(every_n_train_steps={steps})"
        )
    if n is None:
        return (
            f"{schedule.often}; at the end of an epoch or of a validation it sees the last figure, from up to "
            f"{steps} steps before. Use ModelCheckpoint(every_n_train_steps={steps}), or give ForgettingEval "
            "every_n_epochs=1 as well"
        )
    seldom = isinstance(callback, ModelCheckpoint) and looks_by_epochs % n == 0
    if looks_by_epochs < 1 or (n > 1 and not seldom):
        return (
            f"{schedule.often}; between, it sees the last figure, at first the 1.0 from before training. Use "
            f"ForgettingEval(every_n_epochs=1) and ModelCheckpoint(every_n_epochs={n})"
        )
    at_epoch_end = getattr(callback, "_save_on_train_epoch_end", None) or getattr(
        callback, "_check_on_train_epoch_end", False
    )
    mid_epoch = trainer.check_val_every_n_epoch is not None and trainer.val_check_interval != 1.0
    if mid_epoch and not at_epoch_end:
        return (
            "after an epoch, and validation runs within it "
            f"(val_check_interval={trainer.val_check_interval}); there it sees the figure of the epoch before, at "
            "first the 1.0 from before training. Let it look at the end of an epoch: "
            "ModelCheckpoint(save_on_train_epoch_end=True), EarlyStopping(check_on_train_epoch_end=True)"
        )
    return None

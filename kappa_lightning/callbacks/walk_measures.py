"""The validation loop of a fit, run once more at a point of the way back."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from torch import Tensor

from kappa_lightning.restoring import random_numbers_restored


def validated(trainer: pl.Trainer, monitor: str, *, keep: bool = False) -> float:
    """Run the validation loop of a fit once more, out of sight of callbacks and loggers, and return a metric of it.

    Args:
        trainer: whose fit has ended, or is between two epochs.
        monitor: the metric's name.
        keep: whether ``trainer.callback_metrics`` keep what this run found.

    Raises:
        ValueError: if the loop logs no such metric.
    """
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    connector = trainer._logger_connector
    before = {name: dict(getattr(connector, name)) for name in ("_callback_metrics", "_logged_metrics")}
    first, training = connector._first_loop_iter, trainer.training
    # The bar stays, since its own thread looks for it there, but draws nothing.
    bar = trainer.progress_bar_callback
    draws = bar is not None and bar.is_enabled  # type: ignore[attr-defined]
    trainer.callbacks = [] if bar is None else [bar]  # type: ignore[attr-defined]
    trainer.loggers = []
    try:
        if bar is not None and draws:
            bar.disable()
        connector._callback_metrics.pop(monitor, None)
        trainer.validating = True
        with random_numbers_restored():
            trainer.fit_loop.epoch_loop.val_loop.run()
        found = dict(trainer.callback_metrics)
    finally:
        trainer.training = training
        connector._first_loop_iter = first
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        if bar is not None and draws:
            bar.enable()
        if not keep:
            for name, metrics in before.items():
                getattr(connector, name).clear()
                getattr(connector, name).update(metrics)
    require_logged(monitor, found)
    return float(found[monitor])


def require_logged(monitor: str, found: Mapping[str, Tensor]) -> None:
    """Check that the validation loop logs a metric.

    Raises:
        ValueError: if it does not; the message has what it logs.
    """
    if monitor not in found:
        raise ValueError(
            f"the validation loop logs no metric {monitor!r}, but {', '.join(sorted(found)) or 'none'}: name one of "
            "these as monitor"
        )

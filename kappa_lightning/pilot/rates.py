"""One factor on all of a module's own learning rates, whatever its optimizers and schedules are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override


class RateFactor(Callback):
    """Multiply every learning rate that the module's optimizers and schedules set.

    The factor applies while an optimizer steps and is gone again behind the step. So schedules, of which some compute
    a rate from the last one, see their own figures, and so do checkpoints and a ``LearningRateMonitor``: a resumed run
    needs this callback, too. Works for automatic and manual optimization and for any number of optimizers.

    Args:
        factor: greater than 0.

    Raises:
        ValueError: if the factor is none.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = Trainer(
        ...     callbacks=[RateFactor(2.0)], fast_dev_run=True, accelerator="cpu", enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < math.inf:
            raise ValueError(f"factor={factor!r} must be a finite number above 0")
        self.factor = float(factor)
        self._undo: list[Callable[[], None]] = []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            self._undo += _scaled(optimizer, self.factor)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._let_go()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()

    def __getstate__(self) -> dict[str, Any]:
        # The handles are of one process' optimizers.
        return self.__dict__ | {"_undo": []}

    def _let_go(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []


def _scaled(optimizer: Optimizer, factor: float) -> list[Callable[[], None]]:
    """Scale the rates of an optimizer within its steps; returns what takes that back."""
    own: list[float | Tensor] = []

    def before(*_: Any) -> None:
        for group in optimizer.param_groups:
            rate = group["lr"]
            own.append(rate.clone() if isinstance(rate, Tensor) else rate)
            # A captured step reads the tensor that it was captured with.
            group["lr"] = rate.mul_(factor) if isinstance(rate, Tensor) else rate * factor

    def after(*_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, own, strict=False):
            if isinstance(rate, Tensor):
                with torch.no_grad():
                    group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        own.clear()

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    # A step that raised has not come to its end.
    return [*(handle.remove for handle in handles), after]

"""The training loss beside what is measured, in few points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

_MOST_POINTS = 400


class Story:
    """The mean loss of some optimizer steps each, as many as leave a few hundred points of a run.

    The loss stays on its device until it is asked for, so that no batch waits for it.

    Args:
        known: (global step, loss) pairs from before a resume.
    """

    def __init__(self, known: Sequence[tuple[int, float]] = ()) -> None:
        self._points: list[tuple[int, float | Tensor]] = list(known)
        self._sum: Tensor | None = None
        self._count = 0
        self._every = 1

    def note(self, trainer: pl.Trainer, outputs: Any) -> None:
        """Take the loss of a batch from what ``training_step`` returned, if it returned one."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        loss = loss.detach().reshape(()) * trainer.accumulate_grad_batches  # by which Lightning has divided it
        self._sum = loss.clone() if self._sum is None else self._sum + loss
        self._count += 1
        if trainer.global_step >= (self._points[-1][0] if self._points else 0) + self._every:
            self._points.append((trainer.global_step, self._sum / self._count))
            self._sum, self._count = None, 0
        if len(self._points) > _MOST_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            self._points = [(step, (before + loss) / 2) for (_, before), (step, loss) in pairs]
            self._every *= 2

    def losses(self) -> list[tuple[int, float]]:
        """(global step, mean loss up to it) pairs."""
        self._points = [
            (step, float(torch.as_tensor(loss).float()) if isinstance(loss, Tensor) else loss)
            for step, loss in self._points
        ]
        return [(step, float(loss)) for step, loss in self._points]

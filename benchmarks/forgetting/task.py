"""What the comparison needs to know of a task; a new one is such a class and a line in the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import lightning.pytorch as pl

from kappa_lightning import Probe

LOSS = "val/loss"
"""What a task's module logs in validation: the mean loss on held-out data of the new task, lower being better."""


class Task(Protocol):
    """A pretrained model, something new to learn, and a measure of what it could do before."""

    @property
    def pretrained(self) -> tuple[str, ...]:
        """Globs over the names of the parameters that were pretrained; their matrices are the candidates."""

    @property
    def new(self) -> tuple[str, ...]:
        """Globs of the parameters that start from nothing, which every method trains; empty if there are none."""

    def model(self, seed: int, lr: float, folder: Path) -> pl.LightningModule:
        """The model before the first step, which validates to :data:`LOSS`.

        Args:
            seed: of everything random. Equal seeds give equal weights.
            lr: peak learning rate of the pretrained part.
            folder: where the task may keep what several runs share, such as pretrained weights. Other processes may
                write there at the same time.
        """

    def data(self, model: pl.LightningModule, seed: int) -> pl.LightningDataModule:
        """Data of the new task."""

    def probes(self, model: pl.LightningModule, seed: int) -> dict[str, Probe]:
        """What the model could do before."""

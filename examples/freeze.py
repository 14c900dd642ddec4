"""Freeze by condition number, and watch what the model forgets: the three callbacks on a small network.

A network that reads handwritten digits learns to read them inverted. Run it with ``python examples/freeze.py``; put
your own LightningModule and data in place of ``Reader`` and ``digits``.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import AccuracyProbe, ForgettingEval, KappaFreezeCallback, KappaMonitor

QUIET: Any = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Reader(pl.LightningModule):
    """An MLP from 64 pixels to ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU()
        )
        self.head = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, 10)."""
        logits: Tensor = self.head(self.body(images))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy of the new task."""
        self.log("val/accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on everything: the callback takes out what does not train."""
        return torch.optim.AdamW(self.parameters(), lr=6e-3)


def digits(inverted: bool) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Batches to learn from, and others to test on."""
    bunch = load_digits()
    images, labels = torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)
    data = TensorDataset(1 - images if inverted else images, labels)
    learned, tested = torch.utils.data.random_split(data, [1200, 597], torch.Generator().manual_seed(0))
    return DataLoader(learned, 64, shuffle=True), DataLoader(tested, 597)


def main() -> tuple[KappaFreezeCallback, ForgettingEval]:
    """Pretrain, then adapt with the three callbacks."""
    pl.seed_everything(0, verbose=False)
    model = Reader()
    pl.Trainer(max_epochs=8, logger=False, enable_checkpointing=False, **QUIET).fit(model, *digits(inverted=False))

    freeze = KappaFreezeCallback(top_p=0.5, always_train=["head.*"])
    forgetting = ForgettingEval({"plain": AccuracyProbe(digits(inverted=False)[1])}, min_retention=0.1)
    trainer = pl.Trainer(
        max_epochs=8,
        callbacks=[freeze, KappaMonitor(), forgetting],
        logger=TensorBoardLogger("runs", name="freeze"),
        **QUIET,
    )
    trainer.fit(model, *digits(inverted=True))
    print("trained:", ", ".join(freeze.trained_names))
    print(f"new task: {float(trainer.callback_metrics['val/accuracy']):.3f} right")
    for figures in forgetting.history:
        print(f"step {figures['step']}: retention {figures['forgetting/retention']:.3f}")
    return freeze, forgetting


if __name__ == "__main__":
    main()

"""A probe of your own: any torchmetrics metric, one that you write, and a step between batch and metric.

A network that restores signals learns a new kind of signal. Kept are two things it could do before: the error on old
signals, and how often it finds the right peak. Run it with ``python examples/own_probe.py``.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, Metric

from kappa_lightning import ForgettingEval, Probe

QUIET: Any = dict.fromkeys(["enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"], False)


class PeakFound(Metric):
    """The share of signals whose largest value is restored in its place; a metric that torchmetrics does not have."""

    higher_is_better = True  # without it a probe could not tell what losing means
    full_state_update = False
    right: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, restored: Tensor, clean: Tensor) -> None:
        """Count; both have the shape (batch, samples)."""
        self.right += (restored.argmax(-1) == clean.argmax(-1)).sum()
        self.seen += len(clean)

    def compute(self) -> Tensor:
        """The share."""
        return self.right / self.seen


class Restorer(pl.LightningModule):
    """From noisy to clean signals of 32 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Squared error."""
        return functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def signals(frequency: float, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Waves of a frequency under noise, with the clean ones."""
    generator = torch.Generator().manual_seed(seed)
    phases = torch.rand(512, 1, generator=generator)
    clean = torch.sin(2 * torch.pi * (frequency * torch.linspace(0, 1, 32) + phases))
    return DataLoader(TensorDataset(clean + 0.3 * torch.randn(clean.shape, generator=generator), clean), 64)


def restored_and_clean(module: Any, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The step: what ``metric.update`` takes, in its order."""
    noisy, clean = batch
    return module.net(noisy), clean


def main() -> ForgettingEval:
    """Pretrain on slow waves, then learn fast ones."""
    pl.seed_everything(0, verbose=False)
    model = Restorer()
    pl.Trainer(max_epochs=30, accelerator="cpu", **QUIET).fit(model, signals(frequency=1, seed=0))

    old = signals(frequency=1, seed=1)
    forgetting = ForgettingEval(
        {
            "error": Probe(old, MeanSquaredError(), restored_and_clean),
            "peak": Probe(old, PeakFound(), restored_and_clean),
        }
    )
    trainer = pl.Trainer(max_epochs=5, callbacks=[forgetting], accelerator="cpu", **QUIET)
    trainer.fit(model, signals(frequency=3, seed=2))
    print("before:", {name: round(value, 4) for name, value in forgetting.baseline.items()})
    for name in forgetting.probes:
        print(f"{name}: retention {forgetting.history[-1][f'forgetting/{name}/retention']:.3f}")
    return forgetting


if __name__ == "__main__":
    main()

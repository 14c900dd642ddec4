"""Several processes: the same callbacks, and nothing but the Trainer's ``strategy`` changes.

Run it with ``python examples/ddp.py``: Lightning starts the second process itself. The processes share the
decompositions and the probe's batches, and end with the same selection.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import AccuracyProbe, ForgettingEval, KappaFreezeCallback, KappaMonitor


class Classifier(pl.LightningModule):
    """Two classes of points."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 2)

    def forward(self, points: Tensor) -> Tensor:
        """Logits of shape (batch, 2)."""
        logits: Tensor = self.head(self.body(points))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def points(axis: int, count: int) -> DataLoader[tuple[Tensor, ...]]:
    """Points with the sign of one coordinate as their class."""
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(axis))
    return DataLoader(TensorDataset(x, (x[:, axis] > 0).long()), 16)


def main() -> None:
    """Adapt on two processes."""
    pl.seed_everything(0, verbose=False)  # every process must begin with the same weights, and make the same data
    freeze = KappaFreezeCallback(top_p=0.5, always_train=["head.*"])
    # 100 points do not divide by two processes and batches of 16; each still counts once.
    forgetting = ForgettingEval({"old": AccuracyProbe(points(axis=1, count=100))})
    trainer = pl.Trainer(
        strategy="ddp",  # with the default find_unused_parameters=False: frozen gradients leave the all-reduce
        devices=2,
        accelerator="cpu",
        max_epochs=2,
        callbacks=[freeze, KappaMonitor(), forgetting],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), points(axis=0, count=256))
    retention = float(trainer.callback_metrics["forgetting/retention"])
    # One write a process, so that the lines of two do not mix.
    print(f"rank {trainer.global_rank}: trained {', '.join(freeze.trained_names)}; retention {retention:.6f}\n", end="")


if __name__ == "__main__":
    main()

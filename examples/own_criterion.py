"""A criterion of your own decides what trains: one function from a matrix to a score.

The lowest scores train first; ``reversed:`` before a name turns it round. The name then works wherever a criterion is
named: in ``select``, the callbacks, a YAML. Run it with ``python examples/own_criterion.py``.
"""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import KappaFreezeCallback, KappaProfile
from kappa_lightning.selection import Matrix, Scorable, per_matrix, register_criterion


@register_criterion("quiet")
@per_matrix
def quiet(matrix: Matrix) -> float:
    """The root mean square of a matrix's entries: the smallest weights train first."""
    rows, cols = matrix.shape
    return matrix.frobenius_norm / math.sqrt(rows * cols)


@register_criterion("kappa_but_last_layer_first")
def kappa_but_last_layer_first(row: Scorable) -> float:
    """A criterion of the whole row, which knows its name: the last layer trains in any case, the others by κ."""
    return 0.0 if row.name.startswith("net.4.") else row.kappa


class Regression(pl.LightningModule):
    """Three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Squared error."""
        return functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> tuple[KappaProfile, KappaFreezeCallback]:
    """Compare what several criteria would choose, and train by one of them."""
    pl.seed_everything(0, verbose=False)
    model = Regression()
    profile = KappaProfile.from_model(model, progress=False)
    for criterion in ("kappa", "reversed:kappa", "random", "quiet", "reversed:quiet", "kappa_but_last_layer_first"):
        print(f"{criterion:>28}: {', '.join(profile.select(num_tensors=2, criterion=criterion))}")

    freeze = KappaFreezeCallback(num_tensors=1, criterion="quiet", profile=profile)
    x = torch.randn(256, 16)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[freeze],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 32))
    print("trained by 'quiet':", ", ".join(freeze.trained_names))
    return profile, freeze


if __name__ == "__main__":
    main()

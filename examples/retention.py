"""What is kept, watched by steps: a cheap probe often, a dear one seldom, and only what trains goes to disk.

A network that knows four classes learns four others. Run it with ``python examples/retention.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import AccuracyProbe, ForgettingEval, TrainedOnlyCheckpoint, evaluate_probe, load_trained

QUIET: Any = dict.fromkeys(["enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"], False)


class Classifier(pl.LightningModule):
    """A body that stays frozen once it is pretrained, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
        self.head = nn.Linear(64, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of eight classes."""
        logits: Tensor = self.head(self.body(inputs))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def samples(first: int, count: int, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Points around the centers of four classes, in the same order each time."""
    centers = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(first, first + 4, (count,), generator=generator)
    return DataLoader(TensorDataset(centers[labels] + torch.randn(count, 16, generator=generator), labels), 16)


def main() -> tuple[ForgettingEval, ForgettingEval, float]:
    """Pretrain, fine-tune, and put what was trained onto the base again."""
    pl.seed_everything(0, verbose=False)
    model = Classifier()
    pl.Trainer(max_epochs=5, accelerator="cpu", **QUIET).fit(model, samples(0, 512, seed=1))
    model.body.requires_grad_(False)
    base = copy.deepcopy(model)

    # Of eight classes the probe asks for four, so chance is told. recoverable: what comes back after 8 steps on a copy?
    cheap = AccuracyProbe(samples(0, 64, seed=2), chance=0.25)
    dear = AccuracyProbe(samples(0, 1024, seed=3), chance=0.25)
    often = ForgettingEval({"cheap": cheap}, every_n_train_steps=8)
    seldom = ForgettingEval({"dear": dear}, recoverable=8)
    kept = TrainedOnlyCheckpoint("trained")

    before = evaluate_probe(model, dear)
    trainer = pl.Trainer(max_epochs=2, callbacks=[often, seldom, kept], accelerator="cpu", **QUIET)
    trainer.fit(model, samples(4, 256, seed=4))
    after = evaluate_probe(model, dear)
    print(f"outside of fit: {before:.3f} before, {after:.3f} after")

    for record in often.history:
        print(f"step {record['step']}: retention {record['forgetting/cheap/retention']:.3f}")
    last = {tag.removeprefix("forgetting/dear/"): value for tag, value in seldom.history[-1].items()}
    print(f"retention {last['retention']:.3f} [{last['retention_low']:.3f}, {last['retention_high']:.3f}]")
    print(f"above chance {last['above_chance']:.3f}, recoverable {last['recoverable']:.3f}")

    # The way back: the file holds the head alone, and knows which base it belongs to.
    assert kept.last_path is not None
    names = load_trained(base, kept.last_path)
    again = evaluate_probe(base, dear)
    print(f"{', '.join(names)} onto the base: {again:.3f}")
    return often, seldom, again - after


if __name__ == "__main__":
    main()

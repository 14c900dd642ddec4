"""A small convolutional network that reads handwritten digits learns to read them inverted.

Nothing is downloaded, and a run takes seconds. The same ten outputs serve both, so that what is learned can overwrite
what was known: the accuracy on digits as they are. Of the matrices, five each are square, 4:1, 1:4 and 9:1 kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.forgetting.state import save_state
from benchmarks.forgetting.task import LOSS
from kappa_lightning import AccuracyProbe, Probe
from recipes.shared.schedule import warmup_cosine

WIDTH = 32
BLOCKS = 5
PRETRAINING_STEPS = 600


class Block(nn.Module):
    """A convolution with a projection, and an MLP over channels; (batch, 4, 4, WIDTH) → the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Add the two to the input in turn."""
        seen = self.conv(self.norms[0](x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.project(functional.relu(seen))
        added: Tensor = x + self.down(functional.relu(self.up(self.norms[1](x))))
        return added


class DigitReader(pl.LightningModule):
    """From images (batch, 1, 8, 8) to ten logits, trained by cross-entropy.

    Args:
        lr: peak learning rate of all parameters.
    """

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.stem = nn.Conv2d(1, WIDTH, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, 10)."""
        x = self.stem(images).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean((1, 2)))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch of (images, labels)."""
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        logits = self(batch[0])
        self.log(LOSS, functional.cross_entropy(logits, batch[1]))
        self.log("val/accuracy", (logits.argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, warmed up over a tenth of the steps and decayed to zero by a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0, fused=True)
        schedule = warmup_cosine(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Digits(pl.LightningDataModule):
    """Handwritten digits of scikit-learn, 898 to learn from and 450 others, as they are or inverted.

    Args:
        seed: of the split and the order.
        inverted: whether they are dark on light.
    """

    def __init__(self, seed: int, inverted: bool) -> None:
        super().__init__()
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        if inverted:
            images = 1 - images
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        learned, held_out = order[:898], order[898:1348]
        self.learned = TensorDataset(images[learned], labels[learned])
        self.held_out = TensorDataset(images[held_out], labels[held_out])

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of 32."""
        return DataLoader(self.learned, 32, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out digits in one batch."""
        return DataLoader(self.held_out, len(self.held_out))


class InvertedDigits:
    """The task; see the module."""

    pretrained = ("*",)
    new = ()

    def model(self, seed: int, lr: float, folder: Path) -> DigitReader:
        """The network that reads digits as they are, trained the first time that it is asked for."""
        model = DigitReader(lr)
        file = folder / f"digits-pretrained-{seed}.pt"
        if not file.is_file():
            save_state(_pretrained(seed), file)
        model.load_state_dict(torch.load(file, weights_only=True))
        return model

    def data(self, model: pl.LightningModule, seed: int) -> Digits:
        """Inverted digits."""
        return Digits(seed, inverted=True)

    def probes(self, model: pl.LightningModule, seed: int) -> dict[str, Probe]:
        """Accuracy on digits as they are that were not learned from."""
        return {"plain": AccuracyProbe(Digits(seed, inverted=False).val_dataloader())}


def _pretrained(seed: int) -> dict[str, Tensor]:
    pl.seed_everything(seed, verbose=False)
    model = DigitReader(lr=3e-3)
    trainer = pl.Trainer(
        max_steps=PRETRAINING_STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, Digits(seed, inverted=False))
    return model.state_dict()

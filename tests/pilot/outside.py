"""Modules as users write them, which know nothing of this package; and their data and probes."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import AccuracyProbe

STEPS = 12


def numbers(seed: int = 0) -> TensorDataset:
    """96 points in eight dimensions, in three classes by the signs of two."""
    x = torch.randn(96, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def number_loaders() -> tuple[DataLoader, DataLoader]:
    return DataLoader(numbers(), 16, shuffle=True), DataLoader(numbers(), 48)


class Plain(pl.LightningModule):
    """Automatic optimization, one optimizer and a schedule."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Linear(8, 16)
            self.middle = nn.Linear(16, 16)
            self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.body(x).relu()).relu())

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)}


class Manual(Plain):
    """Manual optimization with an optimizer for the body and one for the head, whose schedules it steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(loss)
        body.step()
        head.step()
        for schedule in self.lr_schedulers():
            schedule.step()

    def configure_optimizers(self):
        body = torch.optim.Adam([*self.body.parameters(), *self.middle.parameters()], lr=0.02)
        head = torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)
        return [body, head], [torch.optim.lr_scheduler.StepLR(o, 5, gamma=0.5) for o in (body, head)]


class Images(pl.LightningModule):
    """A convolutional network with BatchNorm on color images of 16×16."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4),
                nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                nn.Flatten(), nn.Linear(128, 4),
            )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


class NumberData(pl.LightningDataModule):
    """The same from a data module."""

    def train_dataloader(self):
        return number_loaders()[0]

    def val_dataloader(self):
        return number_loaders()[1]


class NumberProbe(AccuracyProbe):
    """What :class:`Plain` answers before any training, from plain values."""

    def __init__(self, samples: int = 96) -> None:
        x = numbers(1).tensors[0][:samples]
        with torch.no_grad():
            answers = Plain()(x).argmax(-1)
        super().__init__(DataLoader(TensorDataset(x, answers), 16))


class ImageData(pl.LightningDataModule):
    """Images whose class is the brightest quarter."""

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(64, 3, 16, 16, generator=generator)
        labels = torch.randint(4, (64,), generator=generator)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 2)
            image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1.0
        self.data = TensorDataset(images, labels)

    def train_dataloader(self):
        return DataLoader(self.data, 16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, 64)


def number_probe(module: pl.LightningModule) -> dict[str, AccuracyProbe]:
    """What the module answered before any training."""
    x = numbers(1).tensors[0]
    with torch.no_grad():
        answers = module.eval()(x).argmax(-1)
    module.train()
    return {"old": AccuracyProbe(DataLoader(TensorDataset(x, answers), 16))}


def image_probe(module: pl.LightningModule) -> dict[str, AccuracyProbe]:
    x = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        answers = module.eval()(x).argmax(-1)
    module.train()
    return {"old": AccuracyProbe(DataLoader(TensorDataset(x, answers), 8))}

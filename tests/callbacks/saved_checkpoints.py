"""What version 0.1.0 wrote into a checkpoint, and the training that it is from."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from kappa_lightning import ForgettingEval, KappaFreezeCallback, KappaMonitor, Probe

CHECKPOINT = Path(__file__).parent / "data" / "checkpoint-0.1.0.pt"


class Net(pl.LightningModule):
    """Three layers whose order by κ is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
        with torch.no_grad():
            for layer, smallest in zip(self.layers, (0.5, 0.01, 0.2), strict=True):
                layer.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0, smallest])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def batches() -> DataLoader[tuple[torch.Tensor, ...]]:
    x = torch.arange(32.0).view(8, 4) % 5 - 2
    return DataLoader(TensorDataset(x, x.flip(1)), batch_size=4)


def callbacks() -> list[Callback]:
    probe = Probe(batches(), MeanSquaredError(), lambda module, batch: (module(batch[0]), batch[0]))
    return [KappaFreezeCallback(num_tensors=1), KappaMonitor(), ForgettingEval({"identity": probe})]


class SavesLast(Callback):
    """Saves after the epoch, without the paths that a ModelCheckpoint writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def trainer(folder: Path, epochs: int, *more: Callback) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*callbacks(), *more], enable_checkpointing=False,
    )  # fmt: skip


if __name__ == "__main__":  # with version 0.1.0 on the path
    import sys

    folder = Path(sys.argv[1])
    trainer(folder, 1, SavesLast(folder / CHECKPOINT.name)).fit(Net(), batches())

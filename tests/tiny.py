"""Tiny modules, fixed data, and independent references that the callback tests share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from kappa_lightning import AccuracyProbe, Probe

BATCHES = 3
"""Batches of an epoch of :func:`loader`."""

Configure = Callable[[Any], Any]


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)


def adamw_with_schedule(module: nn.Module) -> dict[str, Any]:
    optimizer = adamw(module)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)}


class Recording(pl.LightningModule):
    """Remembers its optimizers as they were made, and the loss of each batch."""

    def __init__(self, configure: Configure = adamw) -> None:
        super().__init__()
        self.configure = configure
        self.losses: list[float] = []
        self.made: list[torch.optim.Optimizer] = []
        self.made_groups: list[list[list[int]]] = []

    def configure_optimizers(self) -> Any:
        made = self.configure(self)
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        self.made = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        self.made_groups = group_ids(self.made)
        return made

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError


class TinyNet(Recording):
    """Embedding → Conv1d → BatchNorm → Linear → dropout → Linear, on 7 tokens of 11, into 4 classes."""

    MATRICES = ("embed.weight", "conv.weight", "hidden.weight", "head.weight")
    CANDIDATES = MATRICES[1:]
    """What a freeze callback chooses from by default: all but the embedding."""

    def __init__(self, configure: Configure = adamw, dropout: float = 0.0) -> None:
        super().__init__(configure)
        torch.manual_seed(7)
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(5)
        self.hidden = nn.Linear(5, 8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.norm(self.conv(self.embed(tokens).mT)).relu().mean(-1)
        return self.head(self.dropout(self.hidden(features).tanh()))

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Bank(Recording):
    """Square layers side by side, each with a chosen width and condition number; every one gets a gradient.

    ``Bank(a=(4, 2.0))`` has ``a.weight`` of shape (4, 4) with κ = 2, and ``a.bias``.
    """

    def __init__(self, configure: Configure = adamw, **layers: tuple[int, float]) -> None:
        super().__init__(configure)
        for name, (width, kappa) in layers.items():
            layer = nn.Linear(width, width)
            rotation, _ = np.linalg.qr(np.random.default_rng(width).standard_normal((width, width)))
            weight = rotation @ np.diag(np.geomspace(kappa, 1.0, width)) @ rotation.T
            layer.weight.data = torch.tensor(weight, dtype=torch.float32)
            setattr(self, name, layer)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        (x,) = batch
        return sum((layer(x[:, : layer.in_features]) - 1).square().mean() for layer in self.layers())

    def layers(self) -> list[nn.Linear]:
        return [module for module in self.children() if isinstance(module, nn.Linear)]


def loader(batch_size: int = 8) -> DataLoader:
    """24 samples for :class:`TinyNet`, always in the same order."""
    random_numbers = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (24, 7), generator=random_numbers)
    labels = torch.randint(4, (24,), generator=random_numbers)
    return DataLoader(TensorDataset(tokens, labels), batch_size=batch_size)


class OldTask(AccuracyProbe):
    """What an untrained :class:`TinyNet` says of its data, in two batches, for a YAML to name."""

    def __init__(self) -> None:
        net = TinyNet().eval()
        super().__init__([(tokens, net(tokens).argmax(-1)) for tokens, _ in loader(12)])


def bank_loader() -> DataLoader:
    """24 samples for :class:`Bank`, always in the same order."""
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x), batch_size=8)


def data_for(module: pl.LightningModule) -> DataLoader:
    return bank_loader() if isinstance(module, Bank) else loader()


def make_trainer(root: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    """A Trainer on the CPU with everything off that is not asked for."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


def fit(root: Path, module: pl.LightningModule, *callbacks: Callback, ckpt_path: Any = None, **options: Any):
    """Fit a tiny module on its data, and return the Trainer."""
    trainer = make_trainer(root, *callbacks, **options)
    trainer.fit(module, data_for(module), ckpt_path=ckpt_path)
    return trainer


def numpy_kappa(weight: Tensor) -> float:
    """κ by NumPy's SVD in float64; a Conv kernel as (out, in·k)."""
    array = weight.detach().double().numpy()
    sigma = np.linalg.svd(array.reshape(array.shape[0], -1), compute_uv=False)
    return float(sigma[0] / sigma[-1])


def numpy_ranking(module: nn.Module, names: Sequence[str]) -> list[str]:
    """The names from the lowest κ to the highest."""
    parameters = dict(module.named_parameters())
    return sorted(names, key=lambda name: (numpy_kappa(parameters[name]), name))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict(keep_vars=True).items()}


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"differ: {different}"


def trainable(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def group_ids(optimizers: Sequence[torch.optim.Optimizer]) -> list[list[list[int]]]:
    return [[[id(p) for p in group["params"]] for group in optimizer.param_groups] for optimizer in optimizers]


def grouped_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def random_state() -> tuple[Any, ...]:
    """The state of every random number generator on the CPU, comparable with ``==``."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002 - the generator that Lightning seeds
    return tuple(torch.get_rng_state().tolist()), tuple(keys.tolist()), tuple(rest), random.getstate()


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of a log directory."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of a TensorBoard scalar."""
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


class Spy(Callback):
    """Calls functions at hooks: ``Spy(on_train_start=function)``, each with (trainer, module)."""

    def __init__(self, **functions: Callable[[pl.Trainer, pl.LightningModule], Any]) -> None:
        for hook, function in functions.items():
            setattr(self, hook, lambda trainer, module, *_, function=function, **__: function(trainer, module))


def scripted_probe(values: Sequence[float], higher_is_better: bool = True) -> Probe:
    """A probe whose metric takes the given values, one for each evaluation, whatever the model does."""
    remaining = iter(values)
    metric = Up() if higher_is_better else Down()
    return Probe([0], metric, lambda module, batch: torch.tensor(next(remaining)), name="score")


class Up(MeanMetric):
    """A mean of which more is better."""

    higher_is_better = True


class Down(MeanMetric):
    """A mean of which less is better."""

    higher_is_better = False

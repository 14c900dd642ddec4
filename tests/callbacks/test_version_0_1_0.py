"""A checkpoint that version 0.1.0 wrote resumes, each callback with what it had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny import make_trainer, trainable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import AccuracyProbe, ForgettingEval, KappaFreezeCallback, KappaMonitor

FILE = Path(__file__).with_name("version_0_1_0.ckpt")
"""One epoch of two steps of :class:`Net` with the three callbacks, all with their defaults but ``num_tensors=1``."""


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.first(inputs).tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1] * 4)


def states() -> dict[str, Any]:
    found: dict[str, Any] = torch.load(FILE, weights_only=True)["callbacks"]
    return found


def resumed(folder: Path, *callbacks: Any, epochs: int = 2) -> Net:
    module = Net()
    trainer = make_trainer(folder, *callbacks, max_epochs=epochs)
    trainer.fit(module, DataLoader(TensorDataset(*data()), 4), ckpt_path=FILE)
    assert trainer.global_step == 2 * epochs
    return module


def test_file_is_of_that_version() -> None:
    assert set(states()) == {"KappaFreezeCallback", "KappaMonitor", "ForgettingEval"}
    assert set(states()["ForgettingEval"]) == {"baseline", "history", "probes"}


@pytest.mark.parametrize("alone", [True, False])
def test_freeze_goes_on_with_its_choice(tmp_path: Path, alone: bool) -> None:
    freeze = KappaFreezeCallback(num_tensors=1)
    others = [] if alone else [KappaMonitor(), ForgettingEval({"old": AccuracyProbe([data()])})]
    module = resumed(tmp_path, freeze, *others)
    saved = states()["KappaFreezeCallback"]
    assert freeze.trained_names == saved["trained_names"] == trainable(module)
    assert freeze.profile is not None
    assert [(row.name, row.kappa) for row in freeze.profile] == [
        (row["name"], row["kappa"]) for row in saved["profile"]["rows"]
    ]


@pytest.mark.parametrize("options", [{}, {"every_n_train_steps": 1}])
def test_forgetting_eval_goes_on_from_its_baseline(tmp_path: Path, options: dict[str, Any]) -> None:
    forgetting = ForgettingEval({"old": AccuracyProbe([data()])}, **options)
    resumed(tmp_path, KappaFreezeCallback(num_tensors=1), forgetting)
    saved = states()["ForgettingEval"]
    assert forgetting.baseline == saved["baseline"]
    assert forgetting.history[: len(saved["history"])] == saved["history"]
    assert forgetting.history[-1]["step"] == 4
    now = forgetting.history[-1]
    assert now["forgetting/old/retention"] == now["forgetting/old/accuracy"] / saved["baseline"]["old"]


@pytest.mark.parametrize("options", [{}, {"every_n_train_steps": 1, "tensors": "all"}])
def test_monitor_goes_on_from_its_baseline(tmp_path: Path, options: dict[str, Any]) -> None:
    monitor = KappaMonitor(**options)
    resumed(tmp_path, KappaFreezeCallback(num_tensors=1), monitor)
    saved = states()["KappaMonitor"]
    assert monitor.baseline.items() >= saved["baseline"].items()
    assert monitor.history[: len(saved["history"])] == saved["history"]
    assert monitor.history[-1]["step"] == 4


def test_what_is_resumed_is_saved_in_the_form_of_now(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [KappaFreezeCallback(num_tensors=1), KappaMonitor(), ForgettingEval({"old": AccuracyProbe([data()])})]

    first, second = callbacks(), callbacks()
    module, trainer = Net(), make_trainer(tmp_path, *first, max_epochs=2)
    trainer.fit(module, DataLoader(TensorDataset(*data()), 4), ckpt_path=FILE)
    trainer.save_checkpoint(tmp_path / "now.ckpt")
    again = make_trainer(tmp_path, *second, max_epochs=3)
    again.fit(Net(), DataLoader(TensorDataset(*data()), 4), ckpt_path=tmp_path / "now.ckpt")
    assert second[0].trained_names == first[0].trained_names
    assert [c.baseline for c in second[1:]] == [c.baseline for c in first[1:]]

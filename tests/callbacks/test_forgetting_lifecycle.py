"""When ForgettingEval measures, and what its figures are in a second fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from tiny import Spy, TinyNet, fit, loader, make_trainer, scripted_probe

from kappa_lightning import ForgettingEval, KappaMonitor


def _column(callback: ForgettingEval, tag: str) -> list[float]:
    return [record[tag] for record in callback.history]


# Epochs without a global step


class Manual(TinyNet):
    """Steps its bare optimizer, which Lightning's global step does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.item())


@pytest.mark.parametrize("validate", [True, False])
def test_epochs_are_told_apart_where_the_global_step_stands_still(tmp_path: Path, validate: bool) -> None:
    forgetting, monitor = ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4])}), KappaMonitor()
    trainer = make_trainer(tmp_path, forgetting, monitor, max_epochs=2)
    trainer.fit(Manual(), loader(), loader() if validate else None)
    assert trainer.global_step == 0
    assert _column(forgetting, "forgetting/retention") == pytest.approx([1.0, 0.75, 0.5])
    assert [record["epoch"] for record in forgetting.history] == [0, 1, 2]
    assert [record["epoch"] for record in monitor.history] == [0, 1, 2]
    assert monitor.history[0]["kappa"] != monitor.history[1]["kappa"] != monitor.history[2]["kappa"]


def test_breach_stops_where_the_global_step_stands_still(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8, 0.8, 0.1])}, min_retention=0.5)
    trainer = fit(tmp_path, Manual(), callback, max_epochs=9)
    assert (trainer.global_step, trainer.current_epoch) == (0, 2)


# Validation by steps


def _fit_by_steps(root: Path, callback: ForgettingEval, *further: Callback) -> pl.Trainer:
    options = {"max_epochs": -1, "max_steps": 6, "check_val_every_n_epoch": None, "val_check_interval": 2}
    trainer = make_trainer(root, callback, *further, **options)
    trainer.fit(TinyNet(), loader(), loader())
    return trainer


def test_validation_by_steps_evaluates_each_time(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8] * 9)})
    validated: list[tuple[int, int]] = []

    def see(trainer: pl.Trainer, _: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            validated.append((trainer.global_step, callback.history[-1]["step"]))

    _fit_by_steps(tmp_path, callback, Spy(on_validation_end=see))
    assert validated == [(2, 2), (4, 4), (6, 6)]
    steps = [record["step"] for record in callback.history]
    assert len(steps) == len({(record["epoch"], record["step"]) for record in callback.history})
    assert steps == sorted(steps)


def test_breach_at_a_validation_by_steps_stops_within_the_epoch(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8] + [0.1] * 9)}, min_retention=0.5)
    assert _fit_by_steps(tmp_path, callback).global_step == 2


# Several fits


def test_second_trainer_keeps_the_baseline_and_starts_a_new_history(tmp_path: Path) -> None:
    module, callback = TinyNet(), ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4, 0.2])})
    fit(tmp_path, module, callback)
    fit(tmp_path, module, callback)
    assert callback.baseline == pytest.approx({"words": 0.8})
    assert _column(callback, "forgetting/retention") == pytest.approx([0.5, 0.25])
    assert [(record["epoch"], record["step"]) for record in callback.history] == [(0, 0), (1, 3)]


def test_second_module_on_a_trainer_is_refused_with_the_fit_before_as_the_reason(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4, 0.2])})
    trainer = fit(tmp_path, TinyNet(), callback)
    trainer.fit_loop.max_epochs = 2
    with pytest.raises(ValueError, match=r"^the fit before this one has no baseline .*'words'") as caught:
        trainer.fit(TinyNet(), loader())
    assert "None" not in str(caught.value)

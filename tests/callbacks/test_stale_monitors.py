"""Callbacks that look at a figure more often than it is measured are warned of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from tiny import TinyNet, loader, make_trainer, scripted_probe

from kappa_lightning import ForgettingEval

RETENTION = "forgetting/retention"


def _messages(act: Callable[[], Any]) -> list[str]:
    """What is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in caught]


def _warned(root: Path, watcher: Callback, every_n_epochs: int = 1, **options: Any) -> list[str]:
    """The warnings of stale figures in a fit with validation."""
    probe = scripted_probe([0.8] * 10)
    trainer = make_trainer(root, ForgettingEval({"a": probe}, every_n_epochs), watcher, max_epochs=2, **options)
    return [text for text in _messages(lambda: trainer.fit(TinyNet(), loader(), loader())) if RETENTION in text]


@pytest.mark.parametrize("looks", [1, 3])
def test_checkpoint_that_looks_more_often_than_is_measured_is_warned_of(tmp_path: Path, looks: int) -> None:
    (message,) = _warned(tmp_path, ModelCheckpoint(tmp_path, monitor=RETENTION, every_n_epochs=looks), 2)
    assert message.startswith(f"ModelCheckpoint monitors {RETENTION}, which is measured every 2 epochs")
    assert "ModelCheckpoint(every_n_epochs=2)" in message


def test_early_stopping_that_looks_more_often_than_is_measured_is_warned_of(tmp_path: Path) -> None:
    (message,) = _warned(tmp_path, EarlyStopping(RETENTION, mode="max"), 2)
    assert message.startswith("EarlyStopping monitors")


@pytest.mark.parametrize(("measured", "looks"), [(1, 1), (1, 2), (2, 2), (2, 4)])
def test_checkpoint_that_looks_as_seldom_as_is_measured_is_not_warned_of(
    tmp_path: Path, measured: int, looks: int
) -> None:
    watcher = ModelCheckpoint(tmp_path, monitor=RETENTION, every_n_epochs=looks)
    assert _warned(tmp_path, watcher, measured) == []


def test_checkpoint_of_another_figure_is_not_warned_of(tmp_path: Path) -> None:
    assert _warned(tmp_path, ModelCheckpoint(tmp_path, monitor="val_loss"), 2, val_check_interval=0.5) == []


@pytest.mark.parametrize("measured", [1, 2])
def test_checks_inside_an_epoch_are_warned_of(tmp_path: Path, measured: int) -> None:
    watcher = ModelCheckpoint(tmp_path, monitor=RETENTION, every_n_epochs=measured)
    (message,) = _warned(tmp_path, watcher, measured, val_check_interval=0.5)
    assert "val_check_interval=0.5" in message
    assert "save_on_train_epoch_end=True" in message


@pytest.mark.parametrize("kind", ["ModelCheckpoint", "EarlyStopping"])
def test_callback_that_follows_the_advice_is_not_warned_of(tmp_path: Path, kind: str) -> None:
    watcher: Callback = (
        ModelCheckpoint(tmp_path, monitor=RETENTION, save_on_train_epoch_end=True)
        if kind == "ModelCheckpoint"
        else EarlyStopping(RETENTION, mode="max", check_on_train_epoch_end=True)
    )
    assert _warned(tmp_path, watcher, val_check_interval=0.5) == []


@pytest.mark.parametrize("measured", [1, 2])
def test_checkpoint_that_looks_every_few_steps_is_warned_of(tmp_path: Path, measured: int) -> None:
    watcher = ModelCheckpoint(tmp_path, monitor=RETENTION, every_n_train_steps=2)
    assert len(_warned(tmp_path, watcher, measured)) == 1

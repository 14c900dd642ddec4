"""A learning-rate finder, which ends by loading a checkpoint of its own, takes nothing from a resume or a fresh fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from tiny import TinyNet, assert_same_tensors, fit, loader, scripted_probe, snapshot

from kappa_lightning import (
    AccuracyProbe,
    ForgettingEval,
    KappaFreezeCallback,
    KappaMonitor,
    PretrainedAnchor,
    TrainedOnlyCheckpoint,
    WalkBack,
)


def _tunable() -> TinyNet:
    module = TinyNet(lambda module: torch.optim.AdamW(module.parameters(), lr=module.lr))
    module.lr = 0.01
    return module


def _finder() -> LearningRateFinder:
    return LearningRateFinder(num_training_steps=3, early_stop_threshold=None, update_attr=False)


def _forgetting() -> ForgettingEval:
    return ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4, 0.2])})


def _anchor() -> PretrainedAnchor:
    return PretrainedAnchor("batch")


def _walk_back() -> WalkBack:
    probe = AccuracyProbe(loader(), chance=None)
    return WalkBack(min_retention=0.5, probes={"old": probe}, monitor=probe, points=[0.5], save=False)


def _resumed(root: Path, callback: Callback, order: int = 1) -> TinyNet:
    module = _tunable()
    callbacks = [_finder(), callback][::order]
    fit(root, module, *callbacks, ckpt_path=root / "one.ckpt", max_epochs=2, enable_checkpointing=True)
    return module


@pytest.fixture(params=[1, -1], ids=["finder first", "finder last"])
def order(request: pytest.FixtureRequest) -> int:
    return request.param


def test_resume_keeps_the_baseline_and_the_history_of_forgetting(tmp_path: Path, order: int) -> None:
    first, second = _forgetting(), _forgetting()
    fit(tmp_path, _tunable(), first).save_checkpoint(tmp_path / "one.ckpt")
    _resumed(tmp_path, second, order)
    assert second.baseline == first.baseline == {"words": pytest.approx(0.8)}
    assert second.history[:2] == first.history


def test_resume_keeps_the_kappas_at_the_start_and_the_history(tmp_path: Path, order: int) -> None:
    first, second = KappaMonitor(), KappaMonitor()
    fit(tmp_path, _tunable(), first).save_checkpoint(tmp_path / "one.ckpt")
    _resumed(tmp_path, second, order)
    assert second.baseline == first.baseline != first.history[-1]["kappa"]
    assert second.history[:2] == first.history


@pytest.mark.parametrize("make", [_anchor, _walk_back])
def test_resume_keeps_the_pretrained_weights(tmp_path: Path, order: int, make: Callable[[], Any]) -> None:
    pretrained, second = snapshot(_tunable()), make()
    fit(tmp_path, _tunable(), make()).save_checkpoint(tmp_path / "one.ckpt")
    _resumed(tmp_path, second, order)
    kept = second.state_dict()["pretrained"]["tensors"]
    assert kept.keys() >= set(TinyNet.MATRICES)
    assert_same_tensors(kept, {name: pretrained[name] for name in kept})


@pytest.mark.parametrize("make", [_forgetting, _anchor, _walk_back, KappaFreezeCallback])
def test_trained_weights_are_not_taken_for_the_pretrained_ones(
    tmp_path: Path, order: int, make: Callable[[], Callback]
) -> None:
    fit(tmp_path, _tunable()).save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"\.ckpt (has no|was saved without)"):
        _resumed(tmp_path, make(), order)


@pytest.mark.parametrize("make", [_anchor, _walk_back])
def test_fresh_fit_takes_the_pretrained_weights(tmp_path: Path, order: int, make: Callable[[], Any]) -> None:
    module, callback = _tunable(), make()
    before = snapshot(module)
    fit(tmp_path, module, *[_finder(), callback][::order], enable_checkpointing=True)
    kept = callback.state_dict()["pretrained"]["tensors"]
    assert_same_tensors(kept, {name: before[name] for name in kept})
    assert kept


def test_fresh_fit_measures_before_the_first_step(tmp_path: Path, order: int) -> None:
    monitor, forgetting, plain = KappaMonitor(), _forgetting(), KappaMonitor()
    fit(tmp_path, _tunable(), *[_finder(), monitor, forgetting][::order], enable_checkpointing=True)
    fit(tmp_path, _tunable(), plain)
    assert monitor.baseline == plain.baseline
    assert [record["step"] for record in forgetting.history] == [0, 3]


@pytest.mark.parametrize("make", [_anchor, _walk_back])
def test_second_fit_keeps_the_pretrained_weights(tmp_path: Path, order: int, make: Callable[[], Any]) -> None:
    module, callback = _tunable(), make()
    before = snapshot(module)
    trainer = fit(tmp_path, module, *[_finder(), callback][::order], enable_checkpointing=True)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    kept = callback.state_dict()["pretrained"]["tensors"]
    assert_same_tensors(kept, {name: before[name] for name in kept})


def test_second_fit_keeps_the_choice_the_baseline_and_the_history(tmp_path: Path, order: int) -> None:
    freeze, monitor, forgetting = KappaFreezeCallback(num_tensors=2), KappaMonitor(), _forgetting()
    callbacks: list[Callback] = [_finder(), freeze, monitor, forgetting][::order]
    module = _tunable()
    trainer = fit(tmp_path, module, *callbacks, enable_checkpointing=True)
    chosen, kappas, baseline = freeze.selected_names, dict(monitor.baseline), dict(forgetting.baseline)
    histories = list(monitor.history), list(forgetting.history)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert (freeze.selected_names, monitor.baseline, forgetting.baseline) == (chosen, kappas, baseline)
    assert (monitor.history[:2], forgetting.history[:2]) == histories


def test_resume_keeps_the_base_of_the_trained_tensors(tmp_path: Path, order: int) -> None:
    first, second = TrainedOnlyCheckpoint(tmp_path / "first"), TrainedOnlyCheckpoint(tmp_path / "second")
    fit(tmp_path, _tunable(), first).save_checkpoint(tmp_path / "one.ckpt")
    _resumed(tmp_path, second, order)
    assert second.state_dict()["base"] == first.state_dict()["base"] != {}

"""A checkpoint that is loaded and saved again without a step holds of each callback what it held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyNet, fit, loader, make_trainer, scripted_probe
from torch import Tensor

from kappa_lightning import (
    ForgettingEval,
    KappaFreezeCallback,
    KappaMonitor,
    PretrainedAnchor,
    Probe,
    TrainedOnlyCheckpoint,
    WalkBack,
)


def _probe() -> Any:
    scripted = scripted_probe([0.9] * 80)
    return Probe([0, 1], scripted.metric, scripted.step, name="score")


MAKE: dict[str, Callable[[Path], Any]] = {
    "KappaFreezeCallback": lambda path: KappaFreezeCallback(num_tensors=1),
    "KappaMonitor": lambda path: KappaMonitor(),
    "ForgettingEval": lambda path: ForgettingEval({"a": _probe()}),
    "TrainedOnlyCheckpoint": lambda path: TrainedOnlyCheckpoint(path / "trained"),
    "PretrainedAnchor": lambda path: PretrainedAnchor(
        [next(iter(loader(4)))], strength=1.0, new_task_divergence=False, source="forward"
    ),
    "WalkBack": lambda path: WalkBack(0.5, _probe(), probes={"a": _probe()}, points=2, save=False),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("way", ["validated", "fit that has nothing left to do", "twice"])
@pytest.mark.parametrize("name", MAKE)
def test_state_is_what_was_there(tmp_path: Path, name: str, way: str) -> None:
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    fit(tmp_path, TinyNet(), MAKE[name](tmp_path)).save_checkpoint(first)
    trainer, module = make_trainer(tmp_path, MAKE[name](tmp_path), max_epochs=1), TinyNet()
    for _ in range(2 if way == "twice" else 1):
        if way == "fit that has nothing left to do":
            trainer.fit(module, loader(), ckpt_path=first)
        else:
            trainer.validate(module, loader(), ckpt_path=first, verbose=False)
    trainer.save_checkpoint(second)
    before, after = (torch.load(path, weights_only=True)["callbacks"] for path in (first, second))
    (key,) = (key for key in before if key.partition("{")[0] == name)
    assert same(before[key], after[key])


@pytest.mark.parametrize("name", MAKE)
def test_second_fit_with_nothing_left_to_do_keeps_the_state_of_the_first(tmp_path: Path, name: str) -> None:
    callback, module = MAKE[name](tmp_path), TinyNet()
    trainer = fit(tmp_path, module, callback)
    before = callback.state_dict()
    trainer.fit(module, loader())
    assert same(callback.state_dict(), before)
    assert before

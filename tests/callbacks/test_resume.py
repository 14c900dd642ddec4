"""A resumed run equals the uninterrupted one to the last bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny import (
    Spy,
    TinyNet,
    adamw_with_schedule,
    assert_same_tensors,
    fit,
    loader,
    make_trainer,
    numpy_ranking,
    snapshot,
    trainable,
)
from torch import Tensor

from kappa_lightning import AccuracyProbe, ForgettingEval, KappaFreezeCallback, KappaMonitor


class Run:
    """A tiny module trained under all three callbacks, and everything that came of it."""

    def __init__(self, root: Path, *further: Callback, validate: bool = False, order: int = 1, **options: Any) -> None:
        ckpt_path = options.pop("ckpt_path", None)
        self.module = TinyNet(adamw_with_schedule)
        self.freeze = KappaFreezeCallback(num_tensors=2, always_train=["head.bias"])
        self.monitor = KappaMonitor(tensors="all")
        self.forgetting = ForgettingEval({"old": AccuracyProbe(loader(), chance=None)})
        callbacks = [self.freeze, self.monitor, self.forgetting][::order]
        self.trainer = make_trainer(root, *further, *callbacks, **options)
        self.trainer.fit(self.module, loader(), loader() if validate else None, ckpt_path=ckpt_path)

    def assert_continues_as(self, whole: Run, earlier: list[float]) -> None:
        assert earlier + self.module.losses == whole.module.losses
        assert_same_tensors(snapshot(self.module), snapshot(whole.module))
        _assert_same(self.trainer.optimizers[0].state_dict(), whole.trainer.optimizers[0].state_dict())
        (one,), (other,) = self.trainer.lr_scheduler_configs, whole.trainer.lr_scheduler_configs
        assert one.scheduler.state_dict() == other.scheduler.state_dict()
        assert self.freeze.profile == whole.freeze.profile
        assert self.freeze.selected_names == whole.freeze.selected_names
        assert self.freeze.trained_names == whole.freeze.trained_names
        assert self.freeze.frozen_names == whole.freeze.frozen_names
        assert trainable(self.module) == trainable(whole.module)
        assert self.monitor.baseline == whole.monitor.baseline
        assert self.monitor.history == whole.monitor.history
        assert self.forgetting.baseline == whole.forgetting.baseline
        assert self.forgetting.history == whole.forgetting.history
        assert self.trainer.global_step == whole.trainer.global_step


def _assert_same(one: Any, other: Any) -> None:
    """Equal to the last bit, however deep."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            _assert_same(first, second)
    else:
        assert one == other


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("validate", [True, False])
def test_two_epochs_and_two_more_equal_four(tmp_path: Path, order: int, validate: bool) -> None:
    whole = Run(tmp_path, max_epochs=4, validate=validate, order=order)
    half = Run(tmp_path, max_epochs=2, validate=validate, order=order)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Run(tmp_path, max_epochs=4, validate=validate, order=order, ckpt_path=tmp_path / "half.ckpt")
    assert len(whole.module.losses) == 12
    resumed.assert_continues_as(whole, half.module.losses)


def test_selection_comes_from_the_checkpoint_not_from_the_trained_weights(tmp_path: Path) -> None:
    half = Run(tmp_path, max_epochs=2)
    checkpoint = tmp_path / "half.ckpt"
    half.trainer.save_checkpoint(checkpoint)
    # Make the selected tensors the worst conditioned of all.
    content = torch.load(checkpoint, weights_only=True)
    for name in half.freeze.selected_names:
        weight = content["state_dict"][name]
        weight[1] = weight[0] * (1 + 1e-5)
    torch.save(content, checkpoint)
    resumed = Run(tmp_path, max_epochs=3, ckpt_path=checkpoint)
    expected = numpy_ranking(TinyNet(), TinyNet.CANDIDATES)[:2]
    assert resumed.freeze.selected_names == expected
    assert resumed.freeze.profile == half.freeze.profile
    loaded = TinyNet()
    loaded.load_state_dict(content["state_dict"])
    assert numpy_ranking(loaded, TinyNet.CANDIDATES)[:2] != expected


@pytest.mark.parametrize("at_validation_end", [True, False])
def test_resume_from_each_checkpoint_of_a_run_equals_the_run(tmp_path: Path, at_validation_end: bool) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=not at_validation_end
    )
    whole = Run(tmp_path, checkpoint, max_epochs=4, validate=True)
    for epoch in range(3):
        path = tmp_path / f"epoch={epoch}.ckpt"
        resumed = Run(tmp_path, max_epochs=4, validate=True, ckpt_path=path)
        resumed.assert_continues_as(whole, whole.module.losses[: 3 * (epoch + 1)])


def test_resume_of_a_resumed_run(tmp_path: Path) -> None:
    whole, losses = Run(tmp_path, max_epochs=4), []
    path = None
    for epoch in range(1, 5):
        part = Run(tmp_path, max_epochs=epoch, ckpt_path=path)
        path = tmp_path / f"{epoch}.ckpt"
        part.trainer.save_checkpoint(path)
        if epoch < 4:
            losses += part.module.losses
    part.assert_continues_as(whole, losses)


def test_same_trainer_and_module_resume_from_their_own_checkpoint(tmp_path: Path) -> None:
    whole, half = Run(tmp_path, max_epochs=4), Run(tmp_path, max_epochs=2)
    losses = list(half.module.losses)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    half.module.losses = []
    half.trainer.fit_loop.max_epochs = 4
    half.trainer.fit(half.module, loader(), ckpt_path=tmp_path / "half.ckpt")
    half.assert_continues_as(whole, losses)


def test_checkpoint_loads_with_weights_only(tmp_path: Path) -> None:
    half = Run(tmp_path, max_epochs=1)
    path = tmp_path / "one.ckpt"
    half.trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert len(content["callbacks"]) == 3
    saved = content["callbacks"]["KappaFreezeCallback"]
    assert saved["trained_names"] == half.freeze.trained_names
    module = TinyNet(adamw_with_schedule)
    freeze = KappaFreezeCallback(num_tensors=2, always_train=["head.bias"])
    trainer = make_trainer(tmp_path, freeze, max_epochs=2)
    trainer.fit(module, loader(), ckpt_path=path, weights_only=True)
    assert freeze.trained_names == half.freeze.trained_names


def test_infinite_kappa_survives_the_checkpoint(tmp_path: Path) -> None:
    def make() -> TinyNet:
        module = TinyNet()
        module.head.weight.data.zero_()
        return module

    first, second = KappaFreezeCallback(num_tensors=1), KappaFreezeCallback(num_tensors=1)
    fit(tmp_path, make(), first).save_checkpoint(tmp_path / "one.ckpt")
    fit(tmp_path, make(), second, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert second.profile == first.profile
    assert second.profile["head.weight"].kappa == float("inf")


def test_other_arguments_on_resume_warn_and_are_ignored(tmp_path: Path) -> None:
    first = KappaFreezeCallback(num_tensors=2)
    fit(tmp_path, TinyNet(), first).save_checkpoint(tmp_path / "one.ckpt")
    second = KappaFreezeCallback(top_p=1.0, train_vectors=True, exclude=["embed.*"], within="role", seed=2)
    with pytest.warns(UserWarning, match="resumes with the selection of the checkpoint") as caught:
        fit(tmp_path, TinyNet(), second, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    (message,) = [str(w.message) for w in caught if "resumes with the selection" in str(w.message)]
    assert "top_p=1.0 (checkpoint: None)" in message
    assert "num_tensors=None (checkpoint: 2)" in message
    assert "train_vectors=True (checkpoint: False)" in message
    assert "exclude=['embed.*'] (checkpoint: ['@embeddings'])" in message
    assert "within='role' (checkpoint: 'all')" in message
    assert "seed=2 (checkpoint: 0)" in message
    assert "include" not in message
    assert second.trained_names == first.trained_names


def test_equal_arguments_on_resume_do_not_warn(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_params": 0.5, "include": ["*.weight"], "always_train": ("head.bias",)}
    fit(tmp_path, TinyNet(), KappaFreezeCallback(**arguments)).save_checkpoint(tmp_path / "one.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = KappaFreezeCallback(**arguments)
        fit(tmp_path, TinyNet(), callback, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert not [w for w in caught if "KappaFreezeCallback" in str(w.message)]


def test_optimizer_over_trainable_parameters_only_resumes_too(tmp_path: Path) -> None:
    def configure(module: TinyNet) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.05)

    whole, half, resumed = (TinyNet(configure) for _ in range(3))
    fit(tmp_path, whole, KappaFreezeCallback(num_tensors=2), max_epochs=2)
    fit(tmp_path, half, KappaFreezeCallback(num_tensors=2)).save_checkpoint(tmp_path / "one.ckpt")
    fit(tmp_path, resumed, KappaFreezeCallback(num_tensors=2), ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert half.losses + resumed.losses == whole.losses
    assert_same_tensors(snapshot(resumed), snapshot(whole))


def test_callbacks_that_monitor_a_figure_see_the_last_one_right_after_a_resume(tmp_path: Path) -> None:
    half = Run(tmp_path, max_epochs=2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    seen: list[dict[str, float]] = []

    def look(trainer: Any, module: Any) -> None:
        seen.append({tag: float(value) for tag, value in trainer.callback_metrics.items()})

    resumed = Run(tmp_path, Spy(on_train_epoch_start=look), max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert seen[0]["forgetting/retention"] == pytest.approx(half.forgetting.history[-1]["forgetting/retention"])
    for name, kappa in half.monitor.history[-1]["kappa"].items():
        drift = np.log10(kappa / half.monitor.baseline[name])
        assert seen[0][f"kappa/{name}"] == pytest.approx(kappa, rel=1e-6)
        assert seen[0][f"kappa_drift/{name}"] == pytest.approx(drift, rel=1e-5, abs=1e-7)
    assert len(resumed.forgetting.history) == 4

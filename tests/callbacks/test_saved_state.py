"""What a checkpoint holds of a freeze is what was there, in every way in which Lightning saves and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from tiny import (
    Spy,
    TinyNet,
    adamw_with_schedule,
    assert_same_tensors,
    fit,
    group_ids,
    loader,
    make_trainer,
    numpy_ranking,
    scripted_probe,
    snapshot,
    trainable,
)

from kappa_lightning import ForgettingEval, KappaFreezeCallback, KappaMonitor


def begin(root: Path, *callbacks: Callback, **options: Any) -> tuple[TinyNet, pl.Trainer]:
    module = TinyNet(adamw_with_schedule)
    return module, fit(root, module, *callbacks, **options)


@pytest.fixture
def whole(tmp_path: Path) -> TinyNet:
    return begin(tmp_path, KappaFreezeCallback(num_tensors=2), max_epochs=2)[0]


def test_resume_from_the_last_checkpoint_with_validation_and_test_between(tmp_path: Path, whole: TinyNet) -> None:
    class Evaluated(TinyNet):
        test_step = TinyNet.validation_step

    freeze, saves = KappaFreezeCallback(num_tensors=2), ModelCheckpoint(tmp_path / "last", save_last=True)
    module = Evaluated(adamw_with_schedule)
    trainer = fit(tmp_path, module, freeze, saves)
    state = freeze.state_dict()
    trainer.validate(module, loader(), verbose=False)
    trainer.test(module, loader(), ckpt_path=tmp_path / "last" / "last.ckpt", verbose=False)
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    assert torch.load(tmp_path / "later.ckpt", weights_only=True)["callbacks"]["KappaFreezeCallback"] == state
    again = TinyNet(adamw_with_schedule)
    saves = ModelCheckpoint(tmp_path / "last", save_last=True)
    fit(tmp_path, again, KappaFreezeCallback(num_tensors=2), saves, ckpt_path="last", max_epochs=2)
    assert module.losses + again.losses == whole.losses
    assert_same_tensors(snapshot(again), snapshot(whole))


def test_checkpoint_that_was_only_validated_is_saved_with_its_selection(tmp_path: Path) -> None:
    _, trainer = begin(tmp_path, KappaFreezeCallback(num_tensors=2))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]
    trainer = make_trainer(tmp_path, KappaFreezeCallback(num_tensors=2))
    trainer.validate(TinyNet(adamw_with_schedule), loader(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    trainer.save_checkpoint(tmp_path / "validated.ckpt")
    assert torch.load(tmp_path / "validated.ckpt", weights_only=True)["callbacks"] == saved


def tunable() -> TinyNet:
    module = TinyNet(lambda m: torch.optim.AdamW(m.parameters(), lr=m.lr))
    module.lr = 0.01
    return module


@pytest.mark.parametrize("order", [1, -1])
def test_learning_rate_finder_before_or_after_leaves_the_selection_of_a_resume(tmp_path: Path, order: int) -> None:
    first = KappaFreezeCallback(num_tensors=2)
    trainer = fit(tmp_path, tunable(), first)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    for name in first.selected_names:  # now the worst conditioned
        content["state_dict"][name][1] = content["state_dict"][name][0] * (1 + 1e-5)
    torch.save(content, tmp_path / "one.ckpt")
    freeze, module = KappaFreezeCallback(num_tensors=2), tunable()
    finder = LearningRateFinder(num_training_steps=3, early_stop_threshold=None, update_attr=False)
    callbacks: list[Callback] = [finder, freeze][::order]
    fit(
        tmp_path,
        module,
        *callbacks,
        ckpt_path=tmp_path / "one.ckpt",
        max_epochs=2,
        enable_checkpointing=True,
    )
    assert freeze.selected_names == first.selected_names
    assert freeze.profile == first.profile
    assert set(trainable(module)) == set(first.selected_names)


def test_tuner_before_the_fit_leaves_no_choice_behind(tmp_path: Path) -> None:
    freeze, module = KappaFreezeCallback(num_tensors=2), tunable()
    best, before = numpy_ranking(module, TinyNet.CANDIDATES)[:2], snapshot(module)
    trainer = make_trainer(tmp_path, freeze, enable_checkpointing=True)
    Tuner(trainer).lr_find(module, loader(), num_training=4, early_stop_threshold=None, update_attr=False)
    assert_same_tensors(snapshot(module), before)
    trainer.fit(module, loader())
    assert freeze.selected_names == best
    assert set(trainable(module)) == set(best)


def test_after_unfreezing_a_checkpoint_says_that_everything_trains(tmp_path: Path) -> None:
    def run(unfreezes_at: int | None, epochs: int, **options: Any) -> tuple[TinyNet, KappaFreezeCallback, pl.Trainer]:
        freeze = KappaFreezeCallback(num_tensors=1, exclude=())

        def unfreeze(trainer: Any, module: Any) -> None:
            if trainer.current_epoch == unfreezes_at:
                freeze.unfreeze()

        spy = Spy(on_train_epoch_start=unfreeze)
        module, trainer = begin(tmp_path, freeze, spy, max_epochs=epochs, **options)
        return module, freeze, trainer

    whole, freeze, _ = run(1, 3)
    assert freeze.trained_names == [name for name, _ in whole.named_parameters()]
    half, _, trainer = run(1, 2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, again, _ = run(None, 3, ckpt_path=tmp_path / "two.ckpt")
    assert half.losses + resumed.losses == whole.losses
    assert again.trained_names == freeze.trained_names
    assert group_ids(resumed.made) == resumed.made_groups
    assert_same_tensors(snapshot(resumed), snapshot(whole))


def test_fit_that_failed_before_its_first_step_saves_no_selection(tmp_path: Path) -> None:
    def fails(trainer: Any, module: Any) -> None:
        raise RuntimeError("power cut")

    freeze, module = KappaFreezeCallback(num_tensors=2), TinyNet(adamw_with_schedule)
    trainer = make_trainer(tmp_path, freeze, Spy(on_train_start=fails))
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(module, loader())
    assert freeze.state_dict() == {}


class ByHand(TinyNet):
    """Steps its bare optimizer, which Lightning's global step does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_second_fit_goes_on_where_the_global_step_stands_still(tmp_path: Path) -> None:
    module, freeze = ByHand(), KappaFreezeCallback(num_tensors=1)
    trainer = fit(tmp_path, module, freeze)
    profile = freeze.profile
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert trainer.global_step == 0
    assert freeze.profile is profile


def test_checkpoint_without_a_selection_is_refused_where_the_global_step_stands_still(tmp_path: Path) -> None:
    fit(tmp_path, ByHand()).save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="was saved without KappaFreezeCallback and holds no selection"):
        fit(tmp_path, ByHand(), KappaFreezeCallback(), ckpt_path=tmp_path / "one.ckpt", max_epochs=2)


def test_checkpoint_of_weights_only_is_refused_and_leaves_nothing_changed(tmp_path: Path) -> None:
    _, trainer = begin(tmp_path, KappaFreezeCallback(num_tensors=2))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    module = TinyNet(adamw_with_schedule)
    with pytest.raises((ValueError, KeyError)):
        fit(tmp_path, module, KappaFreezeCallback(num_tensors=2), ckpt_path=tmp_path / "weights.ckpt", max_epochs=2)
    assert trainable(module) == [name for name, _ in module.named_parameters()]


def test_checkpoint_of_version_0_1_resumes_with_its_smaller_groups(tmp_path: Path) -> None:
    """That version took what was frozen before out of the optimizers, too."""

    def frozen_before() -> TinyNet:
        module = TinyNet(adamw_with_schedule)
        module.embed.requires_grad_(False)
        return module

    first = KappaFreezeCallback(num_tensors=2)
    half = frozen_before()
    trainer = fit(tmp_path, half, first)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    content = torch.load(tmp_path / "new.ckpt", weights_only=True)
    state, (optimizer,) = content["callbacks"]["KappaFreezeCallback"], content["optimizer_states"]
    for name in ("dropped_names", "thawed_names", "rates", "parts"):
        state.pop(name, None)
    (group,) = optimizer["param_groups"]
    assert group["params"] == [0, 1, 2]
    group["params"] = [0, 1]
    optimizer["state"] = {number - 1: state for number, state in optimizer["state"].items()}
    torch.save(content, tmp_path / "old.ckpt")
    runs = []
    for path in ("new.ckpt", "old.ckpt"):
        module = frozen_before()
        fit(tmp_path, module, KappaFreezeCallback(num_tensors=2), ckpt_path=tmp_path / path, max_epochs=2)
        runs.append(module)
    assert runs[0].losses == runs[1].losses
    assert_same_tensors(snapshot(runs[0]), snapshot(runs[1]))


# Checkpoints that other loops load


class Evaluated(TinyNet):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))


@pytest.mark.parametrize("method", ["validate", "test"])
def test_evaluating_an_earlier_checkpoint_leaves_the_figures_of_the_fit_alone(tmp_path: Path, method: str) -> None:
    forgetting, monitor = ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4])}), KappaMonitor()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = Evaluated()
    trainer = fit(tmp_path, module, forgetting, monitor, keep, max_epochs=2)
    expected = forgetting.state_dict(), monitor.state_dict()
    getattr(trainer, method)(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert (forgetting.state_dict(), monitor.state_dict()) == expected
    assert [record["epoch"] for record in forgetting.history] == [0, 1, 2]
    assert [record["epoch"] for record in monitor.history] == [0, 1, 2]


@pytest.mark.parametrize("method", ["validate", "fit"])
def test_checkpoint_that_nothing_trained_from_is_saved_with_its_figures(tmp_path: Path, method: str) -> None:
    def callbacks() -> list[Any]:
        return [ForgettingEval({"words": scripted_probe([0.8, 0.6])}), KappaMonitor()]

    fit(tmp_path, TinyNet(), *callbacks()).save_checkpoint(tmp_path / "a.ckpt")
    again = make_trainer(tmp_path, *callbacks())  # the run is at its end, so that a fit does nothing
    getattr(again, method)(TinyNet(), loader(), ckpt_path=tmp_path / "a.ckpt")
    again.save_checkpoint(tmp_path / "b.ckpt")
    first, second = (torch.load(tmp_path / name, weights_only=True)["callbacks"] for name in ("a.ckpt", "b.ckpt"))
    assert first
    assert first == second


def test_selection_of_a_checkpoint_that_was_validated_is_not_taken_for_that_of_the_next(tmp_path: Path) -> None:
    fit(tmp_path, TinyNet(), KappaFreezeCallback(num_tensors=2)).save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, TinyNet()).save_checkpoint(tmp_path / "b.ckpt")
    trainer, module = make_trainer(tmp_path, KappaFreezeCallback(num_tensors=2), max_epochs=2), TinyNet()
    trainer.validate(module, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    with pytest.raises(ValueError, match=r"b\.ckpt was saved without KappaFreezeCallback and holds no selection"):
        trainer.fit(module, loader(), ckpt_path=tmp_path / "b.ckpt")

"""Two freeze callbacks in one Trainer, each in charge of a part of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Bank, adamw_with_schedule, assert_same_tensors, fit, group_ids, grouped_names, snapshot, trainable

from kappa_lightning import KappaFreezeCallback, KappaMonitor

LAYERS = {"left_a": (4, 2.0), "left_b": (4, 9.0), "right_a": (4, 30.0), "right_b": (4, 20.0), "other": (4, 1.5)}


def towers(**options: Any) -> tuple[Bank, KappaFreezeCallback, KappaFreezeCallback]:
    torch.manual_seed(2)
    left = KappaFreezeCallback(num_tensors=1, include=["left*"], **options)
    right = KappaFreezeCallback(num_tensors=1, include=["right*"], criterion="reversed:kappa")
    return Bank(adamw_with_schedule, **LAYERS), left, right


@pytest.mark.parametrize("order", [1, -1])
def test_each_chooses_within_its_part_and_what_is_in_none_is_frozen(tmp_path: Path, order: int) -> None:
    module, left, right = towers(train_vectors=True)
    monitor = KappaMonitor()
    trainer = fit(tmp_path, module, *[left, right, monitor][::order])
    trained = ["left_a.weight", "left_a.bias", "left_b.bias", "right_a.weight"]
    assert trainable(module) == trained
    assert grouped_names(module, trainer.optimizers[0]) == [trained]
    assert (left.selected_names, right.selected_names) == (["left_a.weight"], ["right_a.weight"])
    assert (left.trained_names, right.trained_names) == (trained[:3], trained[3:])
    assert not set(left.frozen_names) & set(right.trained_names)
    assert set(monitor.baseline) == {"left_a.weight", "right_a.weight"}


@pytest.mark.parametrize("first", [0, 1])
def test_each_gives_back_what_it_froze_whatever_the_order(tmp_path: Path, first: int) -> None:
    module, *callbacks = towers()
    fit(tmp_path, module, *callbacks)
    callbacks[first].unfreeze()
    assert set(trainable(module)) > {"left_a.weight", "right_a.weight"}
    callbacks[1 - first].unfreeze()
    assert trainable(module) == [name for name, _ in module.named_parameters()]
    assert group_ids(module.made) == module.made_groups


def test_both_resume(tmp_path: Path) -> None:
    (whole, *callbacks), (half, *first), (resumed, *second) = towers(), towers(), towers()
    fit(tmp_path, whole, *callbacks, max_epochs=2)
    fit(tmp_path, half, *first).save_checkpoint(tmp_path / "one.ckpt")
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert len(content["callbacks"]) == 2
    fit(tmp_path, resumed, *second, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert half.losses + resumed.losses == whole.losses
    assert_same_tensors(snapshot(resumed), snapshot(whole))
    assert [callback.trained_names for callback in second] == [callback.trained_names for callback in callbacks]


def test_new_trainer_lets_both_choose_anew(tmp_path: Path) -> None:
    module, left, right = towers()
    fit(tmp_path, module, left, right)
    chosen = trainable(module)
    fit(tmp_path, module, right, left)
    assert trainable(module) == chosen
    assert [len(callback.profile) for callback in (left, right)] == [2, 2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"include": ["left*"]}, {"include": ["*a.weight", "right*"]}),
        ({}, {"include": ["left*"]}),
        ({"include": ["left*"], "always_train": ["other.*"]}, {"exclude": ["left*"]}),
    ],
)
def test_parts_that_overlap_are_refused_before_training(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    module = Bank(**LAYERS)
    callbacks = [KappaFreezeCallback(num_tensors=1, **options) for options in (one, other)]
    with pytest.raises(ValueError, match=r"two freeze callbacks, Kappa.* and Kappa.*both decide on (left_a|other)\."):
        fit(tmp_path, module, *callbacks)
    assert trainable(module) == [name for name, _ in module.named_parameters()]
    assert group_ids(module.made) == module.made_groups


def test_failure_of_the_second_gives_back_what_the_first_froze(tmp_path: Path) -> None:
    module, left, right = towers()
    module.right_a.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"right_a\.weight"):
        fit(tmp_path, module, left, right)
    assert trainable(module) == [name for name, _ in module.named_parameters()]
    assert group_ids(module.made) == module.made_groups


def test_checkpoint_with_the_one_key_of_version_0_1_resumes_with_patterns(tmp_path: Path) -> None:
    def run(**options: Any) -> tuple[Bank, KappaFreezeCallback]:
        torch.manual_seed(2)
        module, callback = Bank(adamw_with_schedule, **LAYERS), KappaFreezeCallback(num_tensors=1, include=["left*"])
        fit(tmp_path, module, callback, **options).save_checkpoint(tmp_path / "last.ckpt")
        return module, callback

    _, first = run()
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    ((key, state),) = content["callbacks"].items()
    assert "left" in key
    kept = {name: state[name] for name in ("arguments", "optimizer_numbering", "profile", "trained_names")}
    content["callbacks"] = {"KappaFreezeCallback": {**kept, "selected_names": state["selected_names"]}}
    torch.save(content, tmp_path / "old.ckpt")
    _, second = run(ckpt_path=tmp_path / "old.ckpt", max_epochs=2)
    assert second.trained_names == first.trained_names
    assert second.profile == first.profile


def test_two_that_exclude_apart_work_and_resume(tmp_path: Path) -> None:
    def run(**options: Any) -> list[list[str]]:
        torch.manual_seed(2)
        module = Bank(adamw_with_schedule, **LAYERS)
        callbacks = [
            KappaFreezeCallback(num_tensors=1, exclude=["right*", "other*"]),
            KappaFreezeCallback(num_tensors=1, exclude=["left*"]),
        ]
        fit(tmp_path, module, *callbacks, **options).save_checkpoint(tmp_path / "last.ckpt")
        return [callback.trained_names for callback in callbacks]

    first = run()
    assert first == [["left_a.weight"], ["other.weight"]]
    assert run(ckpt_path=tmp_path / "last.ckpt", max_epochs=2) == first


def test_checkpoint_whose_key_names_no_exclude_resumes(tmp_path: Path) -> None:
    def run(**options: Any) -> list[str]:
        torch.manual_seed(2)
        callback = KappaFreezeCallback(num_tensors=1, exclude=["left*"])
        module = Bank(adamw_with_schedule, **LAYERS)
        fit(tmp_path, module, callback, **options).save_checkpoint(tmp_path / "last.ckpt")
        return callback.trained_names

    first = run()
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    ((_, state),) = content["callbacks"].items()
    content["callbacks"] = {"KappaFreezeCallback": state}
    torch.save(content, tmp_path / "old.ckpt")
    assert run(ckpt_path=tmp_path / "old.ckpt", max_epochs=2) == first

"""Two callbacks that would share one state are refused before training, in words that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyNet, fit, loader, make_trainer, scripted_probe, trainable

from kappa_lightning import (
    ForgettingEval,
    KappaFreezeCallback,
    KappaMonitor,
    PretrainedAnchor,
    TrainedOnlyCheckpoint,
    WalkBack,
)

EQUALS: dict[str, tuple[Any, str]] = {
    "freeze": (
        lambda: KappaFreezeCallback(num_tensors=1),
        r"two freeze callbacks, Kappa.* both decide on .* give them patterns",
    ),
    "monitor": (lambda: KappaMonitor(every_n_train_steps=2), r"has KappaMonitor\(every_n_train_steps=2, .*\) twice"),
    "forgetting": (
        lambda: ForgettingEval({"a": scripted_probe([1.0])}),
        r"two ForgettingEvals .* probe named 'a'.* another name",
    ),
    "trained only": (TrainedOnlyCheckpoint, r"has TrainedOnly.* twice, .*: leave one out, or give it another dirpath"),
    "anchor": (lambda: PretrainedAnchor([torch.ones(2, 2)]), r"has PretrainedAnchor\(.*strength=1\.0.*\) twice"),
    "walk back": (lambda: WalkBack(0.9), r"has WalkBack\(min_retention=0\.9.*\) twice"),
}


@pytest.mark.parametrize("kind", EQUALS)
def test_equals_are_refused_before_training_in_words_that_help(tmp_path: Path, kind: str) -> None:
    make, said = EQUALS[kind]
    module = TinyNet()
    before = trainable(module)
    trainer = make_trainer(tmp_path, make(), make(), max_epochs=1)
    with pytest.raises(ValueError, match=said):
        trainer.fit(module, loader(), loader())
    assert trainer.global_step == 0
    assert trainable(module) == before


def test_key_is_that_of_the_arguments_before_and_after_a_fit(tmp_path: Path) -> None:
    first, second = KappaMonitor(), KappaMonitor()
    key = first.state_key
    assert key == first.own_key
    assert second.state_key == f"{key} (2)"
    fit(tmp_path, TinyNet(), second)
    assert (first.state_key, second.state_key, KappaMonitor().state_key) == (key, key, f"{key} (2)")
    del first
    assert KappaMonitor().state_key == key


def test_second_cell_of_a_notebook_resumes_although_the_first_is_still_there(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [KappaFreezeCallback(num_tensors=1), KappaMonitor(), ForgettingEval({"a": scripted_probe([1.0, 0.5])})]

    waiting = make_trainer(tmp_path, *callbacks())
    first = callbacks()
    fit(tmp_path, TinyNet(), *first).save_checkpoint(tmp_path / "one.ckpt")
    keys = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"].keys()
    assert not any("(2)" in key for key in keys)
    second = callbacks()
    fit(tmp_path, TinyNet(), *second, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert second[0].trained_names == first[0].trained_names
    assert [c.baseline for c in second[1:]] == [c.baseline for c in first[1:]]
    assert waiting is not None


def test_files_of_what_trains_go_to_two_folders_and_resume(tmp_path: Path) -> None:
    def callbacks(other: str) -> list[TrainedOnlyCheckpoint]:
        seldom = TrainedOnlyCheckpoint(tmp_path / "epochs")
        return [seldom, TrainedOnlyCheckpoint(tmp_path / other, every_n_train_steps=2)]

    fit(tmp_path, TinyNet(), *callbacks("steps")).save_checkpoint(tmp_path / "one.ckpt")
    assert sorted(path.parent.name for path in tmp_path.glob("*/*.safetensors")) == ["epochs", "steps"]
    # A folder of another name: the base is the same.
    again = callbacks("moved")
    fit(tmp_path, TinyNet(), *again, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert again[0].state_dict()["base"] == again[1].state_dict()["base"]
    assert len(list(tmp_path.glob("moved/*"))) == 2

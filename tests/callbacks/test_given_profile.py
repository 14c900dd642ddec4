"""A profile that the freeze is given, by value, of a checkpoint or as the name of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from tiny import Bank, Recording, TinyNet, data_for, fit, loader, make_trainer, numpy_ranking, snapshot, trainable
from torch import Tensor, nn

from kappa_lightning import KappaFreezeCallback, KappaProfile

# It is no selection yet


def _tunable() -> TinyNet:
    module = TinyNet(lambda module: torch.optim.AdamW(module.parameters(), lr=module.lr))
    module.lr = 0.01
    return module


def test_freeze_with_a_given_profile_has_no_state_before_fit() -> None:
    assert KappaFreezeCallback(profile=KappaProfile.from_model(TinyNet(), progress=False)).state_dict() == {}


def test_selection_of_a_given_profile_trains_after_a_learning_rate_finder(tmp_path: Path) -> None:
    module = _tunable()
    best = numpy_ranking(module, TinyNet.CANDIDATES)[:2]
    callback = KappaFreezeCallback(num_tensors=2, profile=KappaProfile.from_model(module, progress=False))
    before = snapshot(module)
    finder = LearningRateFinder(num_training_steps=5, early_stop_threshold=None)
    fit(tmp_path, module, callback, finder, enable_checkpointing=True)
    assert callback.selected_names == best
    assert set(trainable(module)) == set(best)
    after = snapshot(module)
    assert {name for name in before if not torch.equal(before[name], after[name]) and "norm" not in name} == set(best)


def test_checkpoint_saved_after_validate_with_a_given_profile_starts_a_fit(tmp_path: Path) -> None:
    module = TinyNet()
    profile = KappaProfile.from_model(module, progress=False)
    trainer = make_trainer(tmp_path, KappaFreezeCallback(num_tensors=2, profile=profile))
    trainer.validate(module, loader(), verbose=False)
    trainer.save_checkpoint(tmp_path / "validated.ckpt")
    again, callback = TinyNet(), KappaFreezeCallback(num_tensors=2, profile=profile)
    fit(tmp_path, again, callback, ckpt_path=tmp_path / "validated.ckpt")
    assert callback.selected_names == numpy_ranking(TinyNet(), TinyNet.CANDIDATES)[:2]
    assert set(trainable(again)) == set(callback.selected_names)


# Profiles of the model inside


class Holder(Recording):
    """Holds a model as ``net``, beside a head of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.head = nn.Linear(16, 2)

    def loss(self, batch: Any) -> Tensor:
        return self.head(self.net(batch[0])).square().mean()


def _inner() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16))


def _fit_holder(root: Path, net: nn.Module, callback: Callback) -> Holder:
    module = Holder(net)
    make_trainer(root, callback).fit(module, data_for(Bank(a=(16, 1.0))))
    return module


@pytest.mark.parametrize("head", ["exclude", "always_train"])
def test_profile_of_a_checkpoint_serves_a_module_that_holds_the_model(
    tmp_path: Path, head: str, decomposed: list[Any]
) -> None:
    net = _inner()
    torch.save(net.state_dict(), tmp_path / "inner.pt")
    profile = KappaProfile.from_checkpoint(tmp_path / "inner.pt", progress=False)
    decomposed.clear()
    best = numpy_ranking(net, ["0.weight", "2.weight"])[0]
    callback = KappaFreezeCallback(num_tensors=1, profile=profile, **{head: ["head.*"]})
    module = _fit_holder(tmp_path, net, callback)
    assert callback.selected_names == [f"net.{best}"]
    assert [row.name for row in callback.profile] == ["net.0.weight", "net.2.weight"]
    assert set(trainable(module)) == {f"net.{best}", *(["head.weight", "head.bias"] if head == "always_train" else [])}
    assert decomposed == []


def test_profile_of_a_checkpoint_with_other_weights_than_the_model_inside_is_refused(tmp_path: Path) -> None:
    torch.save(_inner().state_dict(), tmp_path / "other.pt")
    profile = KappaProfile.from_checkpoint(tmp_path / "other.pt", progress=False)
    callback = KappaFreezeCallback(num_tensors=1, profile=profile, exclude=["head.*"])
    with pytest.raises(ValueError, match=r"the content of net\.0\.weight differs"):
        _fit_holder(tmp_path, _inner(), callback)


# Trial runs


def test_fast_dev_run_writes_no_profile(tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    callback = KappaFreezeCallback(num_tensors=1, profile=folder / "profile.json")
    fit(tmp_path, TinyNet(), callback, fast_dev_run=True)
    assert len(callback.profile) == len(TinyNet.CANDIDATES)
    assert list(folder.iterdir()) == []

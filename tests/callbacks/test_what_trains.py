"""What was chosen trains, and nothing else does: optimizers, thaws, other callbacks, lazy layers, a second cell."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny import (
    Bank,
    Recording,
    Spy,
    TinyNet,
    adamw,
    assert_same_tensors,
    bank_loader,
    fit,
    group_ids,
    grouped_names,
    loader,
    make_trainer,
    numpy_ranking,
    snapshot,
    trainable,
)
from torch import Tensor, nn

from kappa_lightning import KappaFreezeCallback
from kappa_lightning.strategies import StrategyAdapter


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


# Optimizers


def head_only(module: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.head.parameters(), lr=0.1)


@pytest.mark.parametrize("arguments", [{"num_tensors": 1}, {"include": ["head.*"], "always_train": ["a.bias"]}])
def test_optimizer_that_never_had_what_is_to_train_is_an_error(tmp_path: Path, arguments: dict[str, Any]) -> None:
    module = Bank(head_only, a=(4, 2.0), b=(4, 3.0), head=(4, 9.0))
    with pytest.raises(ValueError, match=r"^a\.\w+ is to train, and no optimizer has it \(1 of .*configure_optim"):
        fit(tmp_path, module, KappaFreezeCallback(**arguments))
    assert trainable(module) == [name for name, _ in module.named_parameters()]
    assert group_ids(module.made) == module.made_groups


def test_vector_that_no_optimizer_has_is_not_said_to_train(tmp_path: Path) -> None:
    def no_biases(module: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([module.a.weight, module.a.bias, module.b.weight], lr=0.1)

    module, callback = Bank(no_biases, a=(4, 2.0), b=(4, 3.0)), KappaFreezeCallback(num_tensors=1, train_vectors=True)
    before = snapshot(module)
    fit(tmp_path, module, callback)
    assert callback.trained_names == ["a.weight", "a.bias"] == trainable(module)
    assert moved(module, before) == {"a.weight", "a.bias"}


def test_lbfgs_whose_first_parameter_is_frozen_trains_as_one_of_the_rest_and_resumes(tmp_path: Path) -> None:
    def net(by_hand: bool) -> Bank:
        torch.manual_seed(1)
        module = Bank(
            lambda m: torch.optim.LBFGS([m.b.weight] if by_hand else m.parameters(), lr=0.1, max_iter=2),
            a=(4, 9.0),
            b=(4, 2.0),
        )
        if by_hand:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name == "b.weight")
        return module

    def halves(by_hand: bool) -> tuple[Bank, Bank, KappaFreezeCallback]:
        callbacks = [KappaFreezeCallback(num_tensors=1) for _ in range(2)]
        half, resumed = net(by_hand), net(by_hand)
        fit(tmp_path, half, *callbacks[: not by_hand]).save_checkpoint(tmp_path / "one.ckpt")
        fit(tmp_path, resumed, *callbacks[1 + by_hand :], ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
        return half, resumed, callbacks[0]

    (half, resumed, callback), expected = halves(False), halves(True)
    assert_same_tensors(snapshot(half), snapshot(expected[0]))
    assert_same_tensors(snapshot(resumed), snapshot(expected[1]))
    callback.unfreeze()
    assert group_ids(half.made) == half.made_groups
    before = snapshot(half)

    def closure() -> Tensor:
        loss = half.loss(next(iter(bank_loader())))
        loss.backward()
        return loss

    half.made[0].step(closure)
    assert moved(half, before) == set(before)


class TwoOptimizers(Bank):
    def __init__(self, **layers: tuple[int, float]) -> None:
        super().__init__(lambda m: [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in m.layers()], **layers)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


def test_optimizer_without_a_tensor_left_is_refused_under_a_grad_scaler(tmp_path: Path) -> None:
    def run(**options: Any) -> TwoOptimizers:
        module = TwoOptimizers(a=(4, 2.0), b=(4, 9.0))
        fit(tmp_path, module, KappaFreezeCallback(num_tensors=1), **options)
        return module

    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"optimizer 1 \(SGD\) is left without .*GradScaler.*always_train"):
        run(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert trainable(run()) == ["a.weight"]


# The loss


class Branches(Bank):
    """Its loss is that of one layer."""

    used = "b"

    def layers(self) -> list[nn.Linear]:
        return [getattr(self, self.used)]


def test_loss_without_a_gradient_after_the_freeze_is_an_error_in_our_words(tmp_path: Path) -> None:
    module = Branches(adamw, a=(4, 2.0), b=(4, 9.0))
    with pytest.raises(ValueError, match=r"the loss has no gradient: none of the 1 tensors .*a\.weight"):
        fit(tmp_path, module, KappaFreezeCallback(num_tensors=1))
    assert trainable(module) == [name for name, _ in module.named_parameters()]
    assert group_ids(module.made) == module.made_groups


def test_loss_without_a_gradient_once_all_is_frozen_by_somebody_else_says_so(tmp_path: Path) -> None:
    class Freezing(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.requires_grad_(False)

    with pytest.raises(ValueError, match=r"every tensor that .* let train \(a\.weight first\) has been frozen since"):
        fit(tmp_path, Bank(adamw, a=(4, 2.0), b=(4, 9.0)), KappaFreezeCallback(num_tensors=1), Freezing())


@pytest.mark.parametrize("used", [["b.weight"], []])
def test_selected_tensor_that_gets_no_gradient_is_warned_of_by_name(tmp_path: Path, used: list[str]) -> None:
    module = Branches(adamw, a=(4, 2.0), b=(4, 9.0)) if used else Bank(a=(4, 2.0), b=(4, 9.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, module, KappaFreezeCallback(num_tensors=2), max_epochs=2)
    found = [str(warning.message) for warning in caught if "no gradient" in str(warning.message)]
    assert len(found) == len(used)
    assert all(text.startswith("1 of the 2 selected tensors got no gradient in an epoch, a.weight") for text in found)


# What comes back


@pytest.mark.parametrize("names", [["c.weight", "c.bias"], ["c.bias"]])
def test_what_was_frozen_before_stays_in_its_group_and_trains_once_it_is_thawed(
    tmp_path: Path, names: list[str]
) -> None:
    def thaw(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            seen.append(trainable(module))
            for name in names:
                module.get_parameter(name).requires_grad_(True)

    seen: list[list[str]] = []
    module, callback = Bank(a=(4, 2.0), b=(4, 9.0), c=(4, 3.0)), KappaFreezeCallback(num_tensors=1)
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    before = snapshot(module)
    trainer = fit(tmp_path, module, callback, Spy(on_train_epoch_start=thaw), max_epochs=2)
    assert seen == [["a.weight"]]
    assert grouped_names(module, trainer.optimizers[0]) == [["a.weight", *names]]
    assert moved(module, before) == {"a.weight", *names}
    assert callback.trained_names == ["a.weight", *names]
    assert callback.state_dict()["trained_names"] == ["a.weight"]


def test_thaw_of_what_the_callback_took_out_of_the_optimizer_is_warned_of(tmp_path: Path) -> None:
    module = Bank(a=(4, 2.0), b=(4, 9.0))
    thaw = Spy(on_train_epoch_start=lambda _, m: m.b.requires_grad_(True))
    with pytest.warns(UserWarning, match=r"b\.weight requires a gradient again \(2 tensors\), .*unfreeze\(\)"):
        fit(tmp_path, module, KappaFreezeCallback(num_tensors=1), thaw)


class Backbone(Recording):
    def __init__(self) -> None:
        super().__init__(lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05))
        torch.manual_seed(3)
        self.backbone = nn.Sequential(nn.Linear(16, 8), nn.Tanh())
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def loss(self, batch: Any) -> Tensor:
        return self.head(self.hidden(self.backbone(batch[0])).tanh()).square().mean()


@pytest.mark.parametrize("order", [1, -1])
def test_backbone_that_another_callback_thaws_trains_is_told_of_and_resumes(tmp_path: Path, order: int) -> None:
    def run(epochs: int, **options: Any) -> tuple[Backbone, KappaFreezeCallback, Any]:
        module, freeze = Backbone(), KappaFreezeCallback(num_tensors=1)
        callbacks: list[Callback] = [freeze, BackboneFinetuning(1, backbone_initial_lr=0.01)][::order]
        trainer = make_trainer(tmp_path, *callbacks, max_epochs=epochs)
        trainer.fit(module, bank_loader(), **options)
        return module, freeze, trainer

    whole, freeze, _ = run(4)
    assert freeze.trained_names == ["backbone.0.weight", "backbone.0.bias", *freeze.selected_names]
    assert set(trainable(whole)) == set(freeze.trained_names)
    for epochs in (1, 2, 3):
        half, _, trainer = run(epochs)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        resumed, again, _ = run(4, ckpt_path=tmp_path / "half.ckpt")
        assert half.losses + resumed.losses == whole.losses
        assert again.trained_names == freeze.trained_names
        assert_same_tensors(snapshot(resumed), snapshot(whole))


def test_same_cell_twice_chooses_among_the_same_tensors(
    tmp_path: Path, lightning_log: pytest.LogCaptureFixture
) -> None:
    module = Bank(**{f"layer{i:02}": (3, 2.0 + i) for i in range(11)}, frozen=(3, 1.5))
    module.frozen.requires_grad_(False)
    for _ in range(2):
        callback = KappaFreezeCallback(top_p=0.5)
        fit(tmp_path, module, callback, limit_train_batches=1)
        assert len(callback.profile) == 11
        assert len(trainable(module)) == 5 == len(callback.trained_names)
        del callback
    assert "an earlier freeze callback had frozen 17 parameter(s)" in lightning_log.text


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layers: pickle.loads(pickle.dumps(layers))])  # noqa: S301
def test_copy_of_a_network_that_was_frozen_chooses_among_the_same_tensors(tmp_path: Path, duplicate: Any) -> None:
    module = Bank(**{f"layer{i:02}": (3, 2.0 + i) for i in range(6)})
    fit(tmp_path, module, KappaFreezeCallback(top_p=0.5), limit_train_batches=1)
    again = Bank(**{f"layer{i:02}": (3, 2.0 + i) for i in range(6)})
    for name in dict(again.named_children()):
        setattr(again, name, duplicate(getattr(module, name)))
    assert not all(parameter.requires_grad for parameter in again.parameters())
    callback = KappaFreezeCallback(top_p=0.5)
    fit(tmp_path, again, callback, limit_train_batches=1)
    assert len(callback.profile) == 6
    assert len(callback.selected_names) == 3


# All or nothing


def test_failure_in_the_middle_of_the_freeze_leaves_nothing_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, trainer: Any) -> None:
        raise RuntimeError("no wrapper today")

    module, callback = TinyNet(), KappaFreezeCallback(num_tensors=1)
    module.loss(next(iter(loader()))).backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    monkeypatch.setattr(StrategyAdapter, "requires_grad_changed", fails)
    with pytest.raises(RuntimeError, match="no wrapper today"):
        fit(tmp_path, module, callback)
    assert trainable(module) == [name for name, _ in module.named_parameters()]
    assert group_ids(module.made) == module.made_groups
    assert_same_tensors({name: p.grad for name, p in module.named_parameters()}, gradients)
    assert (callback.profile, callback.trained_names, callback.state_dict()) == (None, [], {})


class Lazy(Bank):
    def __init__(self, **layers: tuple[int, float]) -> None:
        super().__init__(adamw, **layers)
        self.late = nn.LazyLinear(2)

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + self.late(batch[0]).square().mean()

    def layers(self) -> list[nn.Linear]:
        return [self.a, self.b]


def test_lazy_candidate_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    module = Lazy(a=(4, 2.0), b=(4, 9.0))
    with pytest.raises(ValueError, match=r"late\.weight belongs to a lazy layer.*always_train or exclude"):
        fit(tmp_path, module, KappaFreezeCallback(num_tensors=1))
    assert trainable(module) == ["a.weight", "a.bias", "b.weight", "b.bias", "late.weight", "late.bias"]
    assert group_ids(module.made) == module.made_groups


@pytest.mark.parametrize("argument", ["exclude", "always_train"])
def test_lazy_layer_that_is_no_candidate_is_frozen_or_trained_as_asked(tmp_path: Path, argument: str) -> None:
    module, callback = Lazy(a=(4, 2.0), b=(4, 9.0)), KappaFreezeCallback(num_tensors=1, **{argument: ["late.*"]})
    fit(tmp_path, module, callback)
    late = ["late.weight", "late.bias"] if argument == "always_train" else []
    assert trainable(module) == ["a.weight", *late] == callback.trained_names
    assert module.late.weight.shape == (2, 16)
    assert (module.late.weight.grad is not None) == bool(late)


# Other packages


@pytest.mark.slow
def test_twin_package_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    code = (
        "import pytorch_lightning as pl\nfrom pytorch_lightning.demos.boring_classes import BoringModel\n"
        "from kappa_lightning import KappaFreezeCallback\n"
        "pl.Trainer(callbacks=[KappaFreezeCallback()], accelerator='cpu', logger=False, enable_checkpointing=False,\n"
        "           fast_dev_run=True).fit(BoringModel())"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "this Trainer is that of pytorch_lightning" in outcome.stderr
    assert "import lightning.pytorch as pl" in outcome.stderr


def test_ranking_of_a_second_choice_is_that_of_numpy(tmp_path: Path) -> None:
    module = TinyNet()
    fit(tmp_path, module, KappaFreezeCallback(num_tensors=1))
    expected = numpy_ranking(module, TinyNet.CANDIDATES)[:2]
    callback = KappaFreezeCallback(num_tensors=2)
    fit(tmp_path, module, callback, limit_train_batches=1)
    assert callback.selected_names == expected


# All-zero candidates


def _messages(act: Callable[[], Any]) -> list[str]:
    """What is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in caught]


def _with_a_zero_matrix() -> Bank:
    module = Bank(a=(4, 2.0), b=(4, 9.0), lora_B=(4, 1.0))
    nn.init.zeros_(module.lora_B.weight)
    return module


def test_zero_candidate_that_stays_frozen_is_warned_of_by_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 candidate.* all zero.*lora_B\.weight.*always_train"):
        fit(tmp_path, _with_a_zero_matrix(), KappaFreezeCallback(num_tensors=1))


@pytest.mark.parametrize("options", [{"num_tensors": 1, "always_train": ["lora_B.weight"]}, {"num_tensors": 3}])
def test_zero_matrix_that_trains_moves_and_is_not_warned_of(tmp_path: Path, options: dict[str, Any]) -> None:
    module = _with_a_zero_matrix()
    messages = _messages(lambda: fit(tmp_path, module, KappaFreezeCallback(**options)))
    assert not [text for text in messages if "all zero" in text]
    assert module.lora_B.weight.count_nonzero() > 0


# Groups of others


def test_unfreeze_leaves_a_group_that_another_callback_added(tmp_path: Path) -> None:
    module, callback, extra = TinyNet(), KappaFreezeCallback(num_tensors=1), nn.Parameter(torch.zeros(1))
    add = Spy(on_train_start=lambda trainer, _: trainer.optimizers[0].add_param_group({"params": [extra]}))
    trainer = fit(tmp_path, module, callback, add)
    callback.unfreeze()
    assert trainable(module) == [name for name, _ in module.named_parameters()]
    (groups,) = group_ids(trainer.optimizers)
    assert groups == [*module.made_groups[0], [id(extra)]]

"""A freeze callback whose choice has rates: every tensor trains with its factor of the group's learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from tiny import Bank, Spy, assert_same_tensors, bank_loader, fit, make_trainer, snapshot, trainable
from torch import nn

from kappa_lightning import KappaProfile
from kappa_lightning.callbacks.freezing import FreezeCallback
from kappa_lightning.callbacks.plan import Choice, Plan
from kappa_lightning.strategies import scale_rates

RATES = {"a.weight": 0.5, "b.weight": 3.0, "c.weight": 0.25}
LAYERS = {"a": (4, 2.0), "b": (4, 9.0), "c": (4, 3.0), "d": (4, 5.0)}


class Rated(FreezeCallback[KappaProfile]):
    """Trains a, b and c at rates of their own, and all vectors at that of the group."""

    label = "name"  # type: ignore[assignment]

    def __init__(self, rates: dict[str, float] | None = None) -> None:
        super().__init__(include=["*"], exclude=["d.*"], always_train=(), train_vectors=True)
        self.chosen = RATES if rates is None else rates

    def choose(self, trainer: Any, module: nn.Module, candidates: Any, alongside: Any, processes: Any) -> Choice[Any]:
        assert [weight.name for weight in candidates] == list(RATES)
        return Choice(list(RATES), KappaProfile.from_weights(candidates), rates=self.chosen)

    def profile_from_dict(self, state: dict[str, Any]) -> KappaProfile:
        return KappaProfile.from_dict(state)

    def arguments(self) -> dict[str, Any]:
        return {"rates": self.chosen}

    def ranking(self, plan: Plan[KappaProfile]) -> tuple[str, str]:
        return "rates", str(plan.rates)


def scheduled(optimizer: torch.optim.Optimizer, kind: str) -> dict[str, Any]:
    schedules = torch.optim.lr_scheduler
    made = {
        "cosine": lambda: schedules.CosineAnnealingLR(optimizer, T_max=6),
        "lambda": lambda: schedules.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        "cycle": lambda: schedules.OneCycleLR(optimizer, max_lr=0.05, total_steps=7, cycle_momentum=False),
    }[kind]()
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1, fused=True),
}


def net(configure: Any) -> Bank:
    torch.manual_seed(4)
    return Bank(configure, **LAYERS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["cosine", "lambda", "cycle"])
@pytest.mark.parametrize("resumes", [False, True])
def test_rates_train_as_groups_with_these_rates_do_under_a_schedule_and_a_resume(
    tmp_path: Path, optimizer: str, schedule: str, resumes: bool
) -> None:
    module = net(lambda m: scheduled(OPTIMIZERS[optimizer](m.parameters()), schedule))
    trainer = fit(tmp_path, module, Rated(), max_epochs=1 if resumes else 2, gradient_clip_val=1.0)
    if resumes:
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        torch.load(tmp_path / "one.ckpt", weights_only=True)
        module = net(lambda m: scheduled(OPTIMIZERS[optimizer](m.parameters()), schedule))
        rated = Rated(dict.fromkeys(RATES, 1.0))
        fit(tmp_path, module, rated, ckpt_path=tmp_path / "one.ckpt", max_epochs=2, gradient_clip_val=1.0)
        assert rated.rates == RATES

    reference = net(None)
    for parameter in reference.d.parameters():
        parameter.requires_grad_(False)
    reference.d.bias.requires_grad_(True)
    trained = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    # One scheduler on an optimizer that never steps says what the rate of the group is at each step.
    clock = scheduled(OPTIMIZERS[optimizer]([nn.Parameter(torch.zeros(1))]), schedule)
    by_hand = OPTIMIZERS[optimizer]([{"params": [p]} for p in trained.values()])
    for _ in range(2):
        for batch in bank_loader():
            for group, name in zip(by_hand.param_groups, trained, strict=True):
                group["lr"] = clock["optimizer"].param_groups[0]["lr"] * RATES.get(name, 1.0)
            by_hand.zero_grad()
            reference.loss(batch).backward()
            nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            by_hand.step()
            clock["optimizer"].step()
            clock["lr_scheduler"]["scheduler"].step()
    assert trainable(module) == list(trained)
    torch.testing.assert_close(snapshot(module), snapshot(reference), rtol=1e-5, atol=1e-7)


def test_rate_that_is_set_by_hand_in_the_training_step_counts_and_the_groups_stay(tmp_path: Path) -> None:
    class ByHand(Bank):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            (group,) = self.trainer.optimizers[0].param_groups
            seen.append(len(group["params"]))
            group["lr"] = 0.1 if batch_idx == 0 else 0.0
            return super().training_step(batch, batch_idx)

    seen: list[int] = []
    torch.manual_seed(4)
    module = ByHand(lambda m: torch.optim.SGD(m.parameters(), lr=5.0), **LAYERS)
    before = snapshot(module)
    trainer = fit(tmp_path, module, Rated())
    assert seen == [7, 7, 7]
    reference = net(None)
    reference.loss(next(iter(bank_loader()))).backward()
    for name, rate in RATES.items():
        expected = before[name] - 0.1 * rate * reference.get_parameter(name).grad
        torch.testing.assert_close(module.get_parameter(name).detach(), expected)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [7]


def test_unfreezing_takes_the_rates_back(tmp_path: Path) -> None:
    callback = Rated()
    module = net(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    trainer = make_trainer(tmp_path, callback, Spy(on_train_start=lambda *_: callback.unfreeze()), max_epochs=1)
    trainer.fit(module, bank_loader())
    plain = net(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    fit(tmp_path, plain)
    assert_same_tensors(snapshot(module), snapshot(plain))


def test_learning_rate_finder_beside_rates(tmp_path: Path) -> None:
    module = net(lambda m: torch.optim.SGD(m.parameters(), lr=m.lr))
    module.lr = 0.1
    finder = LearningRateFinder(num_training_steps=3, early_stop_threshold=None, update_attr=False)
    trainer = make_trainer(tmp_path, Rated(), finder, max_epochs=1, enable_checkpointing=True)
    trainer.fit(module, bank_loader())
    assert trainable(module) == ["a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias", "d.bias"]


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_impossible_factor_is_refused(factor: float) -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="cannot be scaled by"):
        scale_rates([torch.optim.SGD([parameter], lr=0.1)], {parameter: factor})


def test_lbfgs_has_no_rate_for_each_tensor(tmp_path: Path) -> None:
    module = net(lambda m: torch.optim.LBFGS(m.parameters()))
    with pytest.raises(ValueError, match="LBFGS takes one step for all tensors"):
        fit(tmp_path, module, Rated())
    assert trainable(module) == [name for name, _ in module.named_parameters()]


def test_step_that_raises_leaves_the_groups_whole_for_the_next() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(len(self.param_groups))
            raise RuntimeError("out of memory")

    seen: list[int] = []
    one, two = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = Fails([one, two], lr=0.1)
    undo = scale_rates([optimizer], {one: 0.5})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    assert seen == [2, 2]
    undo()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]

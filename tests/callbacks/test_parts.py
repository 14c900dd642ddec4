"""Single experts, halves and heads train, chosen by κ; everything else of their tensors stays to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader

from kappa_lightning import KappaFreezeCallback, KappaMonitor, KappaProfile


class Experts(nn.Module):
    """Fused experts that a compiler takes whole."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 5))
        self.down_proj = nn.Parameter(torch.randn(4, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("bi,eoi->beo", x, self.gate_up_proj).chunk(2, -1)
        return x + torch.einsum("beo,eio->bi", nn.functional.silu(gate) * up, self.down_proj)


class Mixture(pl.LightningModule):
    """A tiny Mixtral that learns random tokens."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=5,
            num_experts_per_tok=5,  # so that every expert has a gradient
            max_position_embeddings=32,
        )
        self.model = transformers.MixtralForCausalLM(config)
        self.kind = optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(self.named_parameters(), lr=1e-2, weight_decay=0.5)


class Validated(Mixture):
    """With a validation loop, in which averaged weights are swapped in."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.model(input_ids=batch, labels=batch).loss)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.arange(16).reshape(2, 8))


def fit(module: pl.LightningModule, *callbacks: pl.Callback, ckpt_path: Any = None, **arguments: Any) -> pl.Trainer:
    torch.manual_seed(1)
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **arguments}
    trainer = pl.Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(torch.randint(32, (12, 8)), 2), ckpt_path=ckpt_path)
    return trainer


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """What moved, expert by expert."""
    moved = set()
    for name, value in before.items():
        if value.ndim == 3:
            moved |= {f"{name}[{i}]" for i in range(len(value)) if not torch.equal(value[i], after[name][i])}
        elif not torch.equal(value, after[name]):
            moved.add(name)
    return moved


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("arguments", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 3}])
def test_exactly_the_chosen_experts_move(optimizer, arguments):
    module = Mixture(optimizer)
    before = copy.deepcopy(module.state_dict())
    callback = KappaFreezeCallback(top_p=0.1, include=["@experts"], experts="each")
    trainer = fit(module, callback, **arguments)
    assert len(callback.selected_names) == 2  # of 2 layers × 2 tensors × 5 experts
    assert changed(before, module.state_dict()) == set(callback.selected_names) == set(callback.trained_names)
    lowest = KappaProfile.from_model(Mixture(), include=["@experts"], experts="each", progress=False)
    assert callback.selected_names == lowest.select(top_p=0.1)
    (trained,) = trainer.optimizers
    assert [len(group["params"]) for group in trained.param_groups] == [2]
    assert {tuple(state.shape) for p in trained.state for state in trained.state[p].values() if state.ndim} <= {
        (24, 16),
        (16, 12),
    }
    # The module is as it was built, with its own class and names.
    assert module.state_dict().keys() == before.keys()
    assert [name for name, p in module.named_parameters() if p.requires_grad] == []
    copy.deepcopy(module)


def test_gate_and_up_apart_are_candidates_of_their_own():
    module = Mixture()
    before = copy.deepcopy(module.state_dict())
    callback = KappaFreezeCallback(num_tensors=3, include=["*gate_up_proj"], experts="each", gate_up="apart")
    fit(module, callback)
    after = module.state_dict()
    for layer in range(2):
        name = f"model.model.layers.{layer}.mlp.experts.gate_up_proj"
        for expert in range(5):
            for half, rows in (("gate", slice(0, 12)), ("up", slice(12, 24))):
                moved = not torch.equal(before[name][expert, rows], after[name][expert, rows])
                assert moved == (f"{name}[{expert}:{half}]" in callback.selected_names)


def test_heads_are_candidates_of_their_own():
    module = Mixture()
    before = copy.deepcopy(module.state_dict())
    callback = KappaFreezeCallback(num_tensors=2, include=["*q_proj.weight"], heads="each")
    fit(module, callback)
    after = module.state_dict()
    for layer in range(2):
        name = f"model.model.layers.{layer}.self_attn.q_proj.weight"
        for head in range(2):
            rows = slice(8 * head, 8 * head + 8)
            moved = not torch.equal(before[name][rows], after[name][rows])
            assert moved == (f"{name}[head {head}]" in callback.selected_names)
    assert sum("[head" in name for name in callback.trained_names) == 2


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    def run(name: str, epochs: int, ckpt_path: Any = None) -> tuple[Mixture, KappaFreezeCallback]:
        module = Mixture()
        callback = KappaFreezeCallback(num_tensors=3, experts="each", include=["@experts"])
        saver = ModelCheckpoint(tmp_path / name, save_last=True)
        fit(module, callback, saver, max_epochs=epochs, enable_checkpointing=True, ckpt_path=ckpt_path)
        return module, callback

    whole, chosen = run("whole", 4)
    run("half", 2)
    resumed, again = run("rest", 4, tmp_path / "half" / "last.ckpt")
    assert again.selected_names == chosen.selected_names
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    saved = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == Mixture().state_dict().keys()


def test_second_fit_trains_the_same_experts_and_unfreeze_gives_everything_back():
    module = Mixture()
    callback = KappaFreezeCallback(num_tensors=1, experts="each", include=["@experts"])
    trainer = fit(module, callback)
    selected = list(callback.selected_names)
    before = copy.deepcopy(module.state_dict())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, DataLoader(torch.randint(32, (4, 8)), 2))
    assert callback.selected_names == selected
    assert changed(before, module.state_dict()) == set(selected)
    callback.unfreeze()
    assert all(parameter.requires_grad for parameter in module.parameters())
    (optimizer,) = trainer.optimizers
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in module.parameters()}


def test_failed_fit_leaves_the_module_and_the_optimizer_as_they_were():
    class Failing(Mixture):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise KeyError("mine")

    module = Failing()
    kinds = [type(layer) for layer in module.modules()]
    callback = KappaFreezeCallback(num_tensors=1, experts="each", include=["@experts"])
    with pytest.raises(KeyError, match="mine"):
        fit(module, callback)
    assert [type(layer) for layer in module.modules()] == kinds
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_monitor_sees_the_tensor_move_whose_expert_trains():
    module = Mixture()
    monitor = KappaMonitor(tensors=["@experts"])
    callback = KappaFreezeCallback(num_tensors=1, experts="each", include=["*down_proj"])
    fit(module, callback, monitor)
    name = callback.selected_names[0].partition("[")[0]
    first, last = monitor.history[0]["kappa"], monitor.history[-1]["kappa"]
    assert first[name] != last[name]
    assert {other for other in first if first[other] != last[other]} == {name}


AVERAGING: dict[str, Callable[[], pl.Callback]] = {
    "ema": lambda: EMAWeightAveraging(decay=0.7),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1, avg_fn=get_ema_avg_fn(0.7)),
}


@pytest.mark.parametrize(("kind", "is_first"), [("ema", True), ("ema", False), ("mean", False), ("swa", True)])
def test_averages_are_of_the_chosen_experts_and_leave_every_other_bit(tmp_path, kind, is_first):
    def run(name: str, **chosen: Any) -> tuple[Mixture, KappaFreezeCallback, dict[str, Tensor]]:
        module = Validated()
        freeze, averaging = KappaFreezeCallback(include=["@experts"], **chosen), AVERAGING[kind]()
        saver = ModelCheckpoint(tmp_path / name, save_last=True, save_on_train_epoch_end=True)
        callbacks = [averaging, freeze, saver] if is_first else [freeze, averaging, saver]
        fit(module, *callbacks, enable_checkpointing=True)
        assert vars(averaging).keys().isdisjoint(dir(pl.Callback))
        return module, freeze, torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"]

    before = Mixture().state_dict()
    module, freeze, saved = run("parts", num_tensors=4, experts="each")
    averaged = module.state_dict()
    assert changed(before, averaged) == set(freeze.selected_names)
    assert saved.keys() == before.keys()
    assert changed(before, saved) == set(freeze.selected_names)
    # Training of all experts, part by part, ends with the averages of training the whole tensors.
    every, _, _ = run("all", top_p=1.0, experts="each")
    whole, _, _ = run("whole", top_p=1.0)
    assert not changed(whole.state_dict(), every.state_dict())


def test_average_of_a_resumed_run_is_that_of_the_uninterrupted_one(tmp_path):
    def run(name: str, epochs: int, ckpt_path: Any = None) -> Mixture:
        module = Mixture()
        callback = KappaFreezeCallback(num_tensors=3, experts="each", include=["@experts"])
        saver = ModelCheckpoint(tmp_path / name, save_last=True)
        averaging = EMAWeightAveraging(decay=0.7)
        fit(module, callback, averaging, saver, max_epochs=epochs, enable_checkpointing=True, ckpt_path=ckpt_path)
        return module

    whole = run("whole", 2)
    run("half", 1)
    resumed = run("rest", 2, tmp_path / "half" / "last.ckpt")
    assert not changed(whole.state_dict(), resumed.state_dict())


def test_heads_that_nothing_tells_are_refused():
    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.q_proj(batch.float()[:, :4]).sum()

    with pytest.raises(ValueError, match="finds no attention"):
        fit(Plain(), KappaFreezeCallback(heads="each"))


class Compiled(Mixture):
    """Its network is compiled, and has run before the experts are chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(Experts(), backend="aot_eager")
        del self.model
        self.net(torch.ones(1, 5)).sum().backward()
        self.zero_grad()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch.float()[:, :5] / 32).square().mean()
        return loss


class Eager(Compiled):
    """The same network without the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.net = self.net._orig_mod


def test_experts_of_a_compiled_network_train_as_without_the_compiler():
    trained = {}
    for kind in (Compiled, Eager):
        module = kind()
        before = copy.deepcopy(module.state_dict())
        callback = KappaFreezeCallback(num_tensors=2, experts="each")
        fit(module, callback)
        after = module.state_dict()
        assert {name.replace("_orig_mod.", "") for name in changed(before, after)} == set(callback.selected_names)
        trained[kind] = list(after.values())
    for compiled, eager in zip(trained[Compiled], trained[Eager], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_trains_the_same_experts_to_the_same_weights():
    trained = []
    for checkpoints in (True, False):
        module = Mixture()
        if checkpoints:
            module.model.gradient_checkpointing_enable({"use_reentrant": False})
        module.model.train()
        before = copy.deepcopy(module.state_dict())
        callback = KappaFreezeCallback(num_tensors=3, experts="each", include=["@experts"])
        fit(module, callback)
        assert changed(before, module.state_dict()) == set(callback.selected_names)
        trained.append(module.state_dict())
    assert not changed(*trained)

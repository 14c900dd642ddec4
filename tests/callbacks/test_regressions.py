"""Behaviours that were once broken: uncommon orders of calls, uncommon modules, and figures at the edge."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny import (
    Bank,
    Recording,
    Spy,
    TinyNet,
    Up,
    data_for,
    fit,
    group_ids,
    loader,
    make_trainer,
    numpy_ranking,
    scripted_probe,
    snapshot,
    trainable,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import kappa_lightning.profile.profile
from kappa_lightning import AccuracyProbe, ForgettingEval, KappaFreezeCallback, KappaMonitor, KappaProfile, Probe
from kappa_lightning.probes import SimilarityProbe
from kappa_lightning.probes.metrics import TokenPerplexity
from kappa_lightning.profile.compute import compute_rows


def _column(callback: ForgettingEval, tag: str) -> list[float]:
    return [record[tag] for record in callback.history]


def _messages(act: Callable[[], Any]) -> list[str]:
    """What is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in caught]


class Evaluated(TinyNet):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))


class Manual(TinyNet):
    """Steps its bare optimizer, which Lightning's global step does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.item())


# Nothing to compute


def test_no_weights_on_a_gpu_give_no_rows() -> None:
    assert list(compute_rows([], device="cuda")) == []


def test_monitor_with_every_figure_known_computes_nothing_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def on_a_gpu(weights: Any, *given: Any, **options: Any) -> Any:
        asked.append(len(weights))
        return compute_rows(weights, *given, **{**options, "device": "cpu" if weights else "cuda"})

    monkeypatch.setattr(kappa_lightning.profile.profile, "compute_rows", on_a_gpu)
    module, freeze = Bank(a=(4, 2.0), b=(4, 9.0)), KappaFreezeCallback(num_tensors=1)
    monitor = KappaMonitor(tensors=["b.weight"])
    fit(tmp_path, module, freeze, monitor, max_epochs=2)
    assert asked[0] == 2
    assert asked[1:]
    assert set(asked[1:]) == {0}
    assert [record["kappa"] for record in monitor.history] == [{"b.weight": freeze.profile["b.weight"].kappa}] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_freeze_and_monitor_with_nothing_pending_run_on_the_gpu(tmp_path: Path) -> None:
    monitor = KappaMonitor(tensors=["b.weight"])
    module = Bank(a=(4, 2.0), b=(4, 9.0))
    fit(tmp_path, module, KappaFreezeCallback(num_tensors=1), monitor, max_epochs=2, accelerator="gpu")
    assert [record["epoch"] for record in monitor.history] == [0, 1, 2]


# Callbacks that look at a figure more often than it is measured

RETENTION = "forgetting/retention"


def _warned(root: Path, watcher: Callback, every_n_epochs: int = 1, **options: Any) -> list[str]:
    """The warnings of stale figures in a fit with validation."""
    probe = scripted_probe([0.8] * 10)
    trainer = make_trainer(root, ForgettingEval({"a": probe}, every_n_epochs), watcher, max_epochs=2, **options)
    return [text for text in _messages(lambda: trainer.fit(TinyNet(), loader(), loader())) if RETENTION in text]


@pytest.mark.parametrize("looks", [1, 3])
def test_checkpoint_that_looks_more_often_than_is_measured_is_warned_of(tmp_path: Path, looks: int) -> None:
    (message,) = _warned(tmp_path, ModelCheckpoint(tmp_path, monitor=RETENTION, every_n_epochs=looks), 2)
    assert message.startswith(f"ModelCheckpoint monitors {RETENTION}, which is measured every 2 epochs")
    assert "ModelCheckpoint(every_n_epochs=2)" in message


def test_early_stopping_that_looks_more_often_than_is_measured_is_warned_of(tmp_path: Path) -> None:
    (message,) = _warned(tmp_path, EarlyStopping(RETENTION, mode="max"), 2)
    assert message.startswith("EarlyStopping monitors")


@pytest.mark.parametrize(("measured", "looks"), [(1, 1), (1, 2), (2, 2), (2, 4)])
def test_checkpoint_that_looks_as_seldom_as_is_measured_is_not_warned_of(
    tmp_path: Path, measured: int, looks: int
) -> None:
    watcher = ModelCheckpoint(tmp_path, monitor=RETENTION, every_n_epochs=looks)
    assert _warned(tmp_path, watcher, measured) == []


def test_checkpoint_of_another_figure_is_not_warned_of(tmp_path: Path) -> None:
    assert _warned(tmp_path, ModelCheckpoint(tmp_path, monitor="val_loss"), 2, val_check_interval=0.5) == []


@pytest.mark.parametrize("measured", [1, 2])
def test_checks_inside_an_epoch_are_warned_of(tmp_path: Path, measured: int) -> None:
    watcher = ModelCheckpoint(tmp_path, monitor=RETENTION, every_n_epochs=measured)
    (message,) = _warned(tmp_path, watcher, measured, val_check_interval=0.5)
    assert "val_check_interval=0.5" in message
    assert "save_on_train_epoch_end=True" in message


@pytest.mark.parametrize("kind", ["ModelCheckpoint", "EarlyStopping"])
def test_callback_that_follows_the_advice_is_not_warned_of(tmp_path: Path, kind: str) -> None:
    watcher: Callback = (
        ModelCheckpoint(tmp_path, monitor=RETENTION, save_on_train_epoch_end=True)
        if kind == "ModelCheckpoint"
        else EarlyStopping(RETENTION, mode="max", check_on_train_epoch_end=True)
    )
    assert _warned(tmp_path, watcher, val_check_interval=0.5) == []


@pytest.mark.parametrize("measured", [1, 2])
def test_checkpoint_that_looks_every_few_steps_is_warned_of(tmp_path: Path, measured: int) -> None:
    watcher = ModelCheckpoint(tmp_path, monitor=RETENTION, every_n_train_steps=2)
    assert len(_warned(tmp_path, watcher, measured)) == 1


# A given profile is no selection yet


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


# Checkpoints that other loops load


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


def test_selection_of_a_checkpoint_that_was_validated_is_not_taken_for_that_of_the_next(tmp_path: Path) -> None:
    fit(tmp_path, TinyNet(), KappaFreezeCallback(num_tensors=2)).save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, TinyNet()).save_checkpoint(tmp_path / "b.ckpt")
    trainer, module = make_trainer(tmp_path, KappaFreezeCallback(num_tensors=2), max_epochs=2), TinyNet()
    trainer.validate(module, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    with pytest.raises(ValueError, match=r"b\.ckpt was saved without KappaFreezeCallback and holds no selection"):
        trainer.fit(module, loader(), ckpt_path=tmp_path / "b.ckpt")


# All-zero candidates


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


# Epochs without a global step


@pytest.mark.parametrize("validate", [True, False])
def test_epochs_are_told_apart_where_the_global_step_stands_still(tmp_path: Path, validate: bool) -> None:
    forgetting, monitor = ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4])}), KappaMonitor()
    trainer = make_trainer(tmp_path, forgetting, monitor, max_epochs=2)
    trainer.fit(Manual(), loader(), loader() if validate else None)
    assert trainer.global_step == 0
    assert _column(forgetting, "forgetting/retention") == pytest.approx([1.0, 0.75, 0.5])
    assert [record["epoch"] for record in forgetting.history] == [0, 1, 2]
    assert [record["epoch"] for record in monitor.history] == [0, 1, 2]
    assert monitor.history[0]["kappa"] != monitor.history[1]["kappa"] != monitor.history[2]["kappa"]


def test_breach_stops_where_the_global_step_stands_still(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8, 0.8, 0.1])}, min_retention=0.5)
    trainer = fit(tmp_path, Manual(), callback, max_epochs=9)
    assert (trainer.global_step, trainer.current_epoch) == (0, 2)


# Several fits


def test_second_trainer_keeps_the_baseline_and_starts_a_new_history(tmp_path: Path) -> None:
    module, callback = TinyNet(), ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4, 0.2])})
    fit(tmp_path, module, callback)
    fit(tmp_path, module, callback)
    assert callback.baseline == pytest.approx({"words": 0.8})
    assert _column(callback, "forgetting/retention") == pytest.approx([0.5, 0.25])
    assert [(record["epoch"], record["step"]) for record in callback.history] == [(0, 0), (1, 3)]


def test_second_module_on_a_trainer_is_refused_with_the_fit_before_as_the_reason(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4, 0.2])})
    trainer = fit(tmp_path, TinyNet(), callback)
    trainer.fit_loop.max_epochs = 2
    with pytest.raises(ValueError, match=r"^the fit before this one has no baseline .*'words'") as caught:
        trainer.fit(TinyNet(), loader())
    assert "None" not in str(caught.value)


def test_unfreeze_leaves_a_group_that_another_callback_added(tmp_path: Path) -> None:
    module, callback, extra = TinyNet(), KappaFreezeCallback(num_tensors=1), nn.Parameter(torch.zeros(1))
    add = Spy(on_train_start=lambda trainer, _: trainer.optimizers[0].add_param_group({"params": [extra]}))
    trainer = fit(tmp_path, module, callback, add)
    callback.unfreeze()
    assert trainable(module) == [name for name, _ in module.named_parameters()]
    (groups,) = group_ids(trainer.optimizers)
    assert groups == [*module.made_groups[0], [id(extra)]]


# Human scores


def test_human_scores_keep_their_precision_in_a_module_of_lower_precision(tmp_path: Path) -> None:
    first, second = torch.eye(3), torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0, 0]])  # cosines 1, 0.7 and 0
    scores = torch.tensor([3.81, 3.805, 0.0])
    assert scores.bfloat16()[0] == scores.bfloat16()[1]
    seen = set()

    def embed(module: nn.Module, x: Tensor) -> Tensor:
        seen.add(x.dtype)
        return x

    callback = ForgettingEval({"pairs": SimilarityProbe([(first, second, scores)], embed)})
    fit(tmp_path, TinyNet(), callback, precision="bf16-true")
    assert seen == {torch.bfloat16}
    assert callback.baseline["pairs"] == pytest.approx(1.0, abs=1e-4)  # with a tie, 0.87


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


# Infinite figures


def test_infinite_perplexity_is_a_retention_of_zero(tmp_path: Path) -> None:
    probe = scripted_probe([20.0, math.inf, 16.0], higher_is_better=False)
    callback = ForgettingEval({"text": probe}, min_retention=0.5, on_breach="warn")
    with pytest.warns(UserWarning, match=r"after epoch 1: text 0\.0000"):
        fit(tmp_path, TinyNet(), callback, max_epochs=2)
    assert _column(callback, "forgetting/text/score") == [20.0, math.inf, 16.0]
    assert _column(callback, "forgetting/text/retention") == [1.0, 0.0, 1.25]


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
@pytest.mark.parametrize(
    ("values", "higher_is_better"), [([20.0, math.nan], False), ([math.inf], False), ([0.5, math.inf], True)]
)
def test_figure_without_a_ratio_is_an_error(tmp_path: Path, values: list[float], higher_is_better: bool) -> None:
    callback = ForgettingEval({"text": scripted_probe(values, higher_is_better)}, min_retention=0.5, on_breach="warn")
    with pytest.raises(ValueError, match=rf"'text' returned score={values[-1]} at step {3 * (len(values) - 1)}"):
        fit(tmp_path, TinyNet(), callback)


# Validation by steps


def _fit_by_steps(root: Path, callback: ForgettingEval, *further: Callback) -> pl.Trainer:
    options = {"max_epochs": -1, "max_steps": 6, "check_val_every_n_epoch": None, "val_check_interval": 2}
    trainer = make_trainer(root, callback, *further, **options)
    trainer.fit(TinyNet(), loader(), loader())
    return trainer


def test_validation_by_steps_evaluates_each_time(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8] * 9)})
    validated: list[tuple[int, int]] = []

    def see(trainer: pl.Trainer, _: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            validated.append((trainer.global_step, callback.history[-1]["step"]))

    _fit_by_steps(tmp_path, callback, Spy(on_validation_end=see))
    assert validated == [(2, 2), (4, 4), (6, 6)]
    steps = [record["step"] for record in callback.history]
    assert len(steps) == len({(record["epoch"], record["step"]) for record in callback.history})
    assert steps == sorted(steps)


def test_breach_at_a_validation_by_steps_stops_within_the_epoch(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8] + [0.1] * 9)}, min_retention=0.5)
    assert _fit_by_steps(tmp_path, callback).global_step == 2


# Trial runs


def test_fast_dev_run_writes_no_profile(tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    callback = KappaFreezeCallback(num_tensors=1, profile=folder / "profile.json")
    fit(tmp_path, TinyNet(), callback, fast_dev_run=True)
    assert len(callback.profile) == len(TinyNet.CANDIDATES)
    assert list(folder.iterdir()) == []


# Probes


@pytest.mark.parametrize("name", ["retention", "forgetting"])
def test_probe_named_as_another_figure_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"name='{name}' is the tag of another figure"):
        Probe([0], Up(), lambda module, batch: batch, name=name)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (torch.eye(3), r"torch\.float32 of shape \(3, 3\)"),
        (torch.eye(3, dtype=torch.int64), r"torch\.int64 of shape \(3, 3\)"),
        (torch.tensor([[0], [1], [1]]), r"torch\.int64 of shape \(3, 1\)"),
        (torch.tensor([0.0, 1.0, 1.0]), r"torch\.float32 of shape \(3,\)"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(labels: Tensor, match: str) -> None:
    batch = (torch.eye(3), labels)
    with pytest.raises(ValueError, match=rf"class numbers of shape \(3,\) for logits of shape \(3, 3\).*{match}"):
        AccuracyProbe([batch]).update(nn.Identity(), batch)


@pytest.mark.parametrize("shape", [(1, 1024), (1, 1025), (3, 1100), (5, 417)], ids=str)
def test_perplexity_over_many_tokens_is_that_in_float64(shape: tuple[int, int]) -> None:
    random_numbers = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(*shape, 17, generator=random_numbers)
    labels = torch.randint(17, shape, generator=random_numbers)
    labels[torch.rand(shape, generator=random_numbers) < 0.2] = -100
    metric = TokenPerplexity()
    metric.update(logits, labels)
    counts = labels != -100
    nats = -logits.double().log_softmax(-1)[counts].gather(-1, labels[counts].unsqueeze(-1))
    assert metric.compute().item() == pytest.approx(nats.mean().exp().item(), rel=1e-6)
    assert metric.tokens.item() == counts.sum().item()


def test_perplexity_never_copies_more_than_a_part_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = nn.functional.cross_entropy

    def cross_entropy(logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
        sizes.append(len(logits))
        return original(logits, *arguments, **options)

    monkeypatch.setattr(nn.functional, "cross_entropy", cross_entropy)
    TokenPerplexity().update(torch.zeros(2, 1500, 3), torch.zeros(2, 1500, dtype=torch.int64))
    assert sum(sizes) == 3000
    assert max(sizes) <= 1024


# Weights that are made from several parameters


class Product(nn.Module):
    """A weight as the product of a wider matrix than it is and another one."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, cols = weight.shape
        return torch.cat((weight, weight.new_zeros(rows, 1)), 1), torch.eye(cols + 1, cols)


def _normalized_by_hook(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(layer)


MADE: dict[str, tuple[Callable[[nn.Module], Any], set[str]]] = {
    "weight_norm": (parametrizations.weight_norm, {f"parametrizations.weight.original{i}" for i in (0, 1)}),
    "weight_norm by hook": (_normalized_by_hook, {"weight_g", "weight_v"}),
    "product": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Product()),
        {f"parametrizations.weight.original{i}" for i in (0, 1)},
    ),
}


def _made_bank(kind: str, layer: str) -> tuple[Bank, set[str]]:
    torch.manual_seed(3)
    module = Bank(a=(4, 2.0), b=(4, 9.0))
    make, originals = MADE[kind]
    make(getattr(module, layer))
    return module, {f"{layer}.{name}" for name in originals}


@pytest.mark.parametrize("kind", MADE)
def test_selected_weight_trains_with_everything_it_is_made_from(tmp_path: Path, kind: str) -> None:
    module, originals = _made_bank(kind, "a")
    before = snapshot(module)
    callback = KappaFreezeCallback(num_tensors=1)
    fit(tmp_path, module, callback)
    assert set(trainable(module)) == set(callback.trained_names) == originals
    after = snapshot(module)
    assert originals <= {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("train_vectors", [False, True])
def test_weight_that_is_not_selected_is_frozen_with_everything_it_is_made_from(
    tmp_path: Path, kind: str, train_vectors: bool
) -> None:
    module, originals = _made_bank(kind, "b")
    before = snapshot(module)
    callback = KappaFreezeCallback(num_tensors=1, train_vectors=train_vectors)
    fit(tmp_path, module, callback)
    assert set(trainable(module)) == {"a.weight", *(["a.bias", "b.bias"] if train_vectors else [])}
    assert originals <= set(callback.frozen_names)
    after = snapshot(module)
    assert all(torch.equal(before[name], after[name]) for name in originals)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("layer", ["a", "b"])
def test_resume_of_a_weight_that_is_made_from_parameters_of_other_shapes(tmp_path: Path, kind: str, layer: str) -> None:
    whole, _ = _made_bank(kind, layer)
    fit(tmp_path, whole, KappaFreezeCallback(num_tensors=1), max_epochs=2)
    first, _ = _made_bank(kind, layer)
    fit(tmp_path, first, KappaFreezeCallback(num_tensors=1)).save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = _made_bank(kind, layer)
    fit(tmp_path, resumed, KappaFreezeCallback(num_tensors=1), ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert trainable(resumed) == trainable(whole)
    assert first.losses + resumed.losses == whole.losses


# Tables


def test_csv_rows_of_the_callbacks_carry_the_epoch(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    forgetting, monitor = ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4])}), KappaMonitor()
    fit(tmp_path, TinyNet(), forgetting, monitor, logger=logger, max_epochs=2)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for tag in ("forgetting/retention", "kappa/median"):
        found = [(row["epoch"], row["step"]) for row in rows if row[tag]]
        assert found == [("0", "0"), ("0", "3"), ("1", "6")]

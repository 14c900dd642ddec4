"""What ForgettingEval measures, what it logs, who sees it, and that the model is left as it was found."""

from __future__ import annotations

import csv
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tiny import (
    Spy,
    TinyNet,
    Up,
    adamw_with_schedule,
    assert_same_tensors,
    events,
    fit,
    loader,
    make_trainer,
    random_state,
    scalars,
    scripted_probe,
    snapshot,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kappa_lightning import AccuracyProbe, ForgettingEval, KappaFreezeCallback, Probe


def _column(callback: ForgettingEval, tag: str) -> list[float]:
    return [record[tag] for record in callback.history]


def _tensorboard(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, "", version="")


# Figures


def test_retention_by_hand_where_higher_is_better(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.88])})
    fit(tmp_path, TinyNet(), callback, max_epochs=2)
    assert callback.baseline == pytest.approx({"words": 0.8})
    assert _column(callback, "forgetting/words/score") == pytest.approx([0.8, 0.6, 0.88])
    assert _column(callback, "forgetting/words/retention") == pytest.approx([1.0, 0.75, 1.1])
    assert _column(callback, "forgetting/words/forgetting") == pytest.approx([0.0, 0.25, -0.1])


def test_retention_by_hand_where_lower_is_better(tmp_path: Path) -> None:
    callback = ForgettingEval({"text": scripted_probe([20.0, 25.0, 16.0], higher_is_better=False)})
    fit(tmp_path, TinyNet(), callback, max_epochs=2)
    assert _column(callback, "forgetting/text/retention") == pytest.approx([1.0, 0.8, 1.25])
    assert _column(callback, "forgetting/text/forgetting") == pytest.approx([0.0, 0.2, -0.25])


def test_overall_retention_is_the_mean_over_the_probes(tmp_path: Path) -> None:
    probes = {
        "words": scripted_probe([0.8, 0.6]),
        "text": scripted_probe([20.0, 25.0], higher_is_better=False),
        "scenes": scripted_probe([0.5, 0.2]),
    }
    callback = ForgettingEval(probes)
    fit(tmp_path, TinyNet(), callback)
    assert _column(callback, "forgetting/retention") == pytest.approx([1.0, (0.75 + 0.8 + 0.4) / 3])


def test_accuracy_of_the_real_model_before_and_after(tmp_path: Path) -> None:
    module, old = TinyNet(), loader()
    tokens, labels = old.dataset.tensors
    expected: list[float] = []

    def by_hand(trainer: Any, module: TinyNet) -> None:
        reference = TinyNet()
        reference.load_state_dict(module.state_dict())
        reference.eval()
        with torch.no_grad():
            predicted = reference(tokens).numpy().argmax(-1)
        expected.append(float(np.mean(predicted == labels.numpy())))

    callback = ForgettingEval({"old task": AccuracyProbe(old, chance=None)})
    fit(tmp_path, module, Spy(on_train_start=by_hand, on_train_epoch_end=by_hand), callback, max_epochs=3)
    assert _column(callback, "forgetting/old task/accuracy") == pytest.approx(expected, rel=1e-6)
    assert callback.baseline["old task"] == pytest.approx(expected[0], rel=1e-6)
    assert len(set(expected)) > 1


def test_baseline_is_measured_before_the_first_step(tmp_path: Path) -> None:
    module = TinyNet()
    initial = module.head.weight.sum().item()
    probe = Probe([0], Up(), lambda module, batch: module.head.weight.sum() + 100, name="sum")
    callback = ForgettingEval({"head": probe})
    fit(tmp_path, module, callback)
    assert callback.baseline["head"] == pytest.approx(initial + 100, rel=1e-6)
    assert callback.history[0]["step"] == 0
    assert callback.history[-1]["forgetting/head/sum"] == pytest.approx(module.head.weight.sum().item() + 100, rel=1e-6)
    assert callback.history[-1]["forgetting/head/sum"] != callback.baseline["head"]


@pytest.mark.parametrize("validate", [True, False])
def test_history_has_epoch_step_and_every_figure(tmp_path: Path, validate: bool) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8] * 9)}, every_n_epochs=2)
    make_trainer(tmp_path, callback, max_epochs=5).fit(TinyNet(), loader(), loader() if validate else None)
    assert [(record["epoch"], record["step"]) for record in callback.history] == [(0, 0), (2, 6), (4, 12)]
    assert all(record.keys() == {"epoch", "step", *_TAGS} for record in callback.history)


_TAGS = {
    "forgetting/words/score",
    "forgetting/words/retention",
    "forgetting/words/forgetting",
    "forgetting/retention",
}


def test_tensorboard_has_the_documented_tags_at_the_global_step(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4])})
    fit(tmp_path, TinyNet(), callback, logger=_tensorboard(tmp_path), max_epochs=2, accumulate_grad_batches=3)
    assert {tag for tag in events(tmp_path).Tags()["scalars"] if tag.startswith("forgetting")} == _TAGS
    expected = [(0, pytest.approx(1.0)), (1, pytest.approx(0.75)), (2, pytest.approx(0.5))]
    assert scalars(tmp_path, "forgetting/words/retention") == expected
    assert scalars(tmp_path, "forgetting/retention") == expected


def test_csv_has_the_documented_tags_at_the_global_step(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4])})
    fit(tmp_path, TinyNet(), callback, logger=CSVLogger(tmp_path, "", version=""), max_epochs=2)
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["forgetting/retention"]]
    assert {key for key in rows[0] if key.startswith("forgetting")} == _TAGS
    assert [(int(row["step"]), float(row["forgetting/retention"])) for row in rows] == [
        (0, 1.0),
        (3, pytest.approx(0.75)),
        (6, pytest.approx(0.5)),
    ]


def test_one_evaluation_an_epoch_with_several_validations_in_it(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8] * 9)})
    trainer = make_trainer(tmp_path, callback, max_epochs=2, val_check_interval=1)
    trainer.fit(TinyNet(), loader(), loader())
    assert [record["step"] for record in callback.history] == [0, 3, 6]


# Who sees it

LOOPS = {
    "no validation": {},
    "validation": {"validate": True},
    "validation every second epoch": {"validate": True, "check_val_every_n_epoch": 2},
    "several validations": {"validate": True, "val_check_interval": 1},
}


def _run(tmp_path: Path, loop: str, *callbacks: Callback, **options: Any) -> Any:
    arguments = dict(LOOPS[loop])
    validate = arguments.pop("validate", False)
    trainer = make_trainer(tmp_path, *callbacks, **arguments, **options)
    trainer.fit(TinyNet(), loader(), loader() if validate else None)
    return trainer


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_model_checkpoint_keeps_the_epoch_of_best_retention(tmp_path: Path, loop: str, order: tuple[int, int]) -> None:
    # Best after epoch 2 of 4, which a figure that is one epoch old would miss.
    scores = [0.8, 0.4, 0.72, 0.5, 0.3]
    callbacks = [
        ForgettingEval({"words": scripted_probe(scores)}),
        ModelCheckpoint(tmp_path, monitor="forgetting/retention", mode="max", filename="{step}"),
    ]
    _run(tmp_path, loop, *(callbacks[i] for i in order), max_epochs=4)
    checkpoint = callbacks[1]
    assert float(checkpoint.best_model_score) == pytest.approx(0.9)
    assert torch.load(checkpoint.best_model_path, weights_only=True)["global_step"] == 6


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_early_stopping_stops_after_the_epoch_that_fell_below_its_threshold(
    tmp_path: Path, loop: str, order: tuple[int, ...]
) -> None:
    callbacks = [
        ForgettingEval({"words": scripted_probe([1.0, 0.9, 0.3, 0.3, 0.3, 0.3, 0.3])}),
        EarlyStopping("forgetting/retention", mode="max", divergence_threshold=0.5, patience=100),
        KappaFreezeCallback(top_p=1.0, train_vectors=True),
    ]
    trainer = _run(tmp_path, loop, *(callbacks[i] for i in order), max_epochs=6)
    assert trainer.current_epoch == 2
    assert callbacks[1].stopping_reason_message.startswith("Divergence threshold")


def test_callback_metrics_hold_every_figure(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8, 0.6])})
    trainer = fit(tmp_path, TinyNet(), callback)
    figures = {tag: callback.history[-1][tag] for tag in _TAGS}
    assert {tag: float(trainer.callback_metrics[tag]) for tag in _TAGS} == pytest.approx(figures)
    assert {tag: float(trainer.logged_metrics[tag]) for tag in _TAGS} == pytest.approx(figures)


# The model is left as it was found


def _dirty(module: nn.Module, batch: Any) -> Tensor:
    """A step that draws from every generator, trains BatchNorm, and leaves modes behind."""
    module.train()
    random.random()
    np.random.rand()  # noqa: NPY002 - the generator that Lightning seeds
    module(batch[0])
    module.hidden.eval()
    return torch.rand(()) + 1


def _half_asleep() -> TinyNet:
    """A module of which the user keeps one part in eval mode."""
    module = TinyNet(adamw_with_schedule, dropout=0.5)
    module.norm.eval()
    return module


@pytest.mark.parametrize("validate", [True, False])
def test_modes_random_numbers_gradients_and_statistics_are_as_before(tmp_path: Path, validate: bool) -> None:
    seen: dict[str, list[Any]] = {"before": [], "after": []}

    def look(module: nn.Module) -> tuple[Any, ...]:
        grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        return {name: child.training for name, child in module.named_modules()}, random_state(), snapshot(module), grads

    def before(trainer: Any, module: nn.Module) -> None:
        # Some parameters with a gradient and some without, as between accumulated batches.
        module.zero_grad()
        module.hidden.weight.grad = torch.full_like(module.hidden.weight, 3.0)
        seen["before"].append(look(module))

    def after(trainer: Any, module: nn.Module) -> None:
        seen["after"].append(look(module))

    hooks = ["on_train_start", "on_train_epoch_end", "on_validation_epoch_end"]
    spies = [Spy(**dict.fromkeys(hooks, function)) for function in (before, after)]
    callback = ForgettingEval({"old": Probe(loader(), Up(), _dirty)})
    trainer = make_trainer(tmp_path, spies[0], callback, spies[1], max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(_half_asleep(), loader(), loader() if validate else None)
    assert len(callback.history) == 3
    assert len(seen["before"]) == len(seen["after"]) == (5 if validate else 3)
    for found, left in zip(seen["before"], seen["after"], strict=True):
        assert found[0] == left[0]
        assert found[1] == left[1]
        assert_same_tensors(found[2], left[2])
        for one, other in zip(found[3], left[3], strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_training_with_forgetting_eval_is_bit_identical_to_training_without(
    tmp_path: Path, validate: bool, shuffle: bool
) -> None:
    probes = {
        "old": Probe(DataLoader(loader().dataset, batch_size=5, shuffle=True), Up(), _dirty),
        "accuracy": AccuracyProbe(loader(), chance=None),
    }
    modules = [_half_asleep(), _half_asleep()]
    for module, callbacks in zip(modules, ([], [ForgettingEval(probes)]), strict=True):
        torch.manual_seed(11)
        train = DataLoader(loader().dataset, batch_size=8, shuffle=shuffle)
        trainer = make_trainer(tmp_path, *callbacks, max_epochs=3)
        trainer.fit(module, train, loader() if validate else None)
    assert modules[0].losses == modules[1].losses
    assert_same_tensors(snapshot(modules[0]), snapshot(modules[1]))


def test_model_is_as_before_even_if_the_step_fails(tmp_path: Path) -> None:
    def step(module: nn.Module, batch: Any) -> Tensor:
        _dirty(module, batch)
        raise RuntimeError("power cut")

    module = _half_asleep()
    before = snapshot(module)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, module, ForgettingEval({"old": Probe(loader(), Up(), step)}))
    assert_same_tensors(before, snapshot(module))
    assert module.hidden.training
    assert not module.norm.training


def test_step_runs_in_eval_mode_without_gradients(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool, bool, bool]] = []

    def step(module: nn.Module, batch: Any) -> Tensor:
        logits = module(batch[0])
        training = any(child.training for child in module.modules())
        seen.append((training, torch.is_grad_enabled(), logits.requires_grad, logits.is_inference()))
        return torch.ones(())

    callback = ForgettingEval({"old": Probe(loader(), Up(), step)})
    make_trainer(tmp_path, callback).fit(TinyNet(dropout=0.5), loader(), loader())
    assert len(seen) == 2 * len(loader())
    assert set(seen) == {(False, False, False, False)}


@pytest.mark.parametrize(
    ("precision", "weights", "inputs", "outputs"),
    [
        ("32-true", torch.float32, torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("64-true", torch.float64, torch.float64, torch.float64),
    ],
)
def test_step_runs_under_the_trainers_precision(
    tmp_path: Path, precision: str, weights: torch.dtype, inputs: torch.dtype, outputs: torch.dtype
) -> None:
    seen: list[tuple[torch.dtype, ...]] = []

    def step(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        features = module.hidden(batch["features"])
        seen.append((module.hidden.weight.dtype, batch["features"].dtype, features.dtype, batch["tokens"].dtype))
        return torch.ones(())

    batch = {"features": torch.randn(4, 5), "tokens": torch.arange(4)}
    callback = ForgettingEval({"old": Probe([batch], Up(), step)})
    make_trainer(tmp_path, callback, precision=precision).fit(TinyNet(), loader(), loader())
    assert seen == [(weights, inputs, outputs, torch.int64)] * 2


# Breach


def test_breach_stops_after_the_epoch(tmp_path: Path, lightning_log: pytest.LogCaptureFixture) -> None:
    callback = ForgettingEval({"words": scripted_probe([1.0, 0.95, 0.85, 0.8, 0.7])}, min_retention=0.9)
    trainer = fit(tmp_path, TinyNet(), callback, max_epochs=4)
    assert trainer.current_epoch == 2
    assert trainer.global_step == 6
    assert "words 0.8500" in lightning_log.text


def test_breach_warns_and_goes_on(tmp_path: Path) -> None:
    probes = {"words": scripted_probe([1.0, 0.95, 0.85]), "scenes": scripted_probe([1.0, 1.0, 1.0])}
    callback = ForgettingEval(probes, min_retention=0.9, on_breach="warn")
    with pytest.warns(UserWarning, match=r"0\.9 after epoch 2: words 0\.8500$"):
        fit(tmp_path, TinyNet(), callback, max_epochs=2)
    assert callback.history[-1]["epoch"] == 2


def test_breach_raises(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([1.0, 0.95, 0.85])}, min_retention=0.9, on_breach="raise")
    with pytest.raises(RuntimeError, match=r"epoch 2: words 0\.8500"):
        fit(tmp_path, TinyNet(), callback, max_epochs=4)
    assert len(callback.history) == 3


def test_each_probe_is_guarded_not_their_mean(tmp_path: Path) -> None:
    probes = {"words": scripted_probe([1.0, 0.5]), "scenes": scripted_probe([1.0, 2.0])}
    callback = ForgettingEval(probes, min_retention=0.9, on_breach="raise")
    with pytest.raises(RuntimeError, match="words"):
        fit(tmp_path, TinyNet(), callback)


def test_retention_at_the_limit_is_no_breach(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([1.0, 0.5])}, min_retention=0.5, on_breach="raise")
    fit(tmp_path, TinyNet(), callback)


def test_metric_that_becomes_nan_during_training_names_the_probe_and_the_step(tmp_path: Path) -> None:
    probe = Probe([0], Up(nan_strategy="disable"), lambda *_: torch.tensor(next(values)))
    values = iter([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"'words'.*nan at step 3"):
        fit(tmp_path, TinyNet(), ForgettingEval({"words": probe}))


# Short runs


@pytest.mark.parametrize(("fast", "batches"), [(True, 1), (2, 2)])
def test_fast_dev_run_reads_as_many_batches_as_the_other_loops(tmp_path: Path, fast: Any, batches: int) -> None:
    read: list[int] = []

    def step(module: nn.Module, batch: Any) -> Tensor:
        read.append(int(batch))
        return torch.zeros(())

    callback = ForgettingEval({"words": Probe(range(5), Up(), step)}, min_retention=0.9, on_breach="raise")
    make_trainer(tmp_path, callback, fast_dev_run=fast).fit(TinyNet(), loader(), loader())
    assert read == [*range(batches)] * 2


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_other_loops_alone_measure_nothing(tmp_path: Path, method: str) -> None:
    class Net(TinyNet):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch)

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    callback = ForgettingEval({"words": scripted_probe([])})
    getattr(make_trainer(tmp_path, callback), method)(Net(), loader())
    assert (callback.baseline, callback.history) == ({}, [])


def test_validate_after_fit_leaves_the_history_alone(tmp_path: Path) -> None:
    module, callback = TinyNet(), ForgettingEval({"words": scripted_probe([0.8, 0.6])})
    trainer = fit(tmp_path, module, callback)
    trainer.validate(module, loader(), verbose=False)
    assert [record["step"] for record in callback.history] == [0, 3]


# Resume


def test_baseline_survives_a_resume_and_is_not_measured_again(tmp_path: Path) -> None:
    first = ForgettingEval({"words": scripted_probe([0.8, 0.6])})
    fit(tmp_path, TinyNet(), first).save_checkpoint(tmp_path / "one.ckpt")
    second = ForgettingEval({"words": scripted_probe([0.4])})
    logger = _tensorboard(tmp_path / "resumed")
    trainer = fit(tmp_path, TinyNet(), second, ckpt_path=tmp_path / "one.ckpt", max_epochs=2, logger=logger)
    assert second.baseline == first.baseline == pytest.approx({"words": 0.8})
    assert _column(second, "forgetting/words/retention") == pytest.approx([1.0, 0.75, 0.5])
    assert [record["step"] for record in second.history] == [0, 3, 6]
    assert [step for step, _ in scalars(tmp_path / "resumed", "forgetting/retention")] == [6]
    assert float(trainer.callback_metrics["forgetting/retention"]) == pytest.approx(0.5)


def test_resume_of_a_checkpoint_without_a_baseline_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, TinyNet()).save_checkpoint(tmp_path / "plain.ckpt")
    callback = ForgettingEval({"words": scripted_probe([0.4])})
    with pytest.raises(ValueError, match=r"plain\.ckpt has no baseline .*'words'"):
        fit(tmp_path, TinyNet(), callback, ckpt_path=tmp_path / "plain.ckpt", max_epochs=2)


def test_resume_with_a_further_probe_is_refused_by_its_name(tmp_path: Path) -> None:
    first = ForgettingEval({"words": scripted_probe([0.8, 0.6])})
    fit(tmp_path, TinyNet(), first).save_checkpoint(tmp_path / "one.ckpt")
    callback = ForgettingEval({"words": scripted_probe([0.4]), "scenes": scripted_probe([0.4])})
    with pytest.raises(ValueError, match="'scenes'"):
        fit(tmp_path, TinyNet(), callback, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)


def test_resume_without_one_of_the_probes_goes_on_with_the_others(tmp_path: Path) -> None:
    first = ForgettingEval({"words": scripted_probe([0.8, 0.6]), "scenes": scripted_probe([0.5, 0.5])})
    fit(tmp_path, TinyNet(), first).save_checkpoint(tmp_path / "one.ckpt")
    second = ForgettingEval({"words": scripted_probe([0.4])})
    fit(tmp_path, TinyNet(), second, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert second.history[-1]["forgetting/retention"] == pytest.approx(0.5)


def test_second_fit_of_the_same_trainer_keeps_the_baseline(tmp_path: Path) -> None:
    module, callback = TinyNet(), ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.4])})
    trainer = fit(tmp_path, module, callback)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert callback.baseline == pytest.approx({"words": 0.8})
    assert _column(callback, "forgetting/retention") == pytest.approx([1.0, 0.75, 0.5])


def test_new_trainer_measures_a_new_baseline(tmp_path: Path) -> None:
    callback = ForgettingEval({"words": scripted_probe([0.8, 0.6, 0.5, 0.4])})
    fit(tmp_path, TinyNet(), callback)
    fit(tmp_path, TinyNet(), callback)
    assert callback.baseline == {"words": 0.5}
    assert _column(callback, "forgetting/retention") == pytest.approx([1.0, 0.8])

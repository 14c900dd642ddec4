"""Measuring by optimizer steps, several callbacks of a kind in one Trainer, and states of other arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from tiny import Spy, TinyNet, events, fit, loader, make_trainer, numpy_kappa, scalars, scripted_probe

from kappa_lightning import ForgettingEval, KappaMonitor, TrainedOnlyCheckpoint


def _steps(callback: ForgettingEval | KappaMonitor) -> list[tuple[int, int]]:
    return [(record["epoch"], record["step"]) for record in callback.history]


def _callbacks(n: int) -> tuple[ForgettingEval, KappaMonitor]:
    return (
        ForgettingEval({"words": scripted_probe([0.8] * 20)}, every_n_train_steps=n),
        KappaMonitor(every_n_train_steps=n),
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"val_check_interval": 1}, {"check_val_every_n_epoch": None, "val_check_interval": 2}],
    ids=["epochs", "validation within", "validation by steps"],
)
def test_measured_at_every_nth_step_whatever_the_validation(tmp_path: Path, options: dict[str, Any]) -> None:
    both = _callbacks(2)
    make_trainer(tmp_path, *both, max_epochs=3, **options).fit(TinyNet(), loader(), loader())
    for callback in both:
        assert _steps(callback) == [(0, 0), (0, 2), (1, 4), (1, 6), (2, 8)]


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    both = _callbacks(2)
    fit(tmp_path, TinyNet(), *both, max_epochs=3, accumulate_grad_batches=2)
    for callback in both:
        assert [step for _, step in _steps(callback)] == [0, 2, 4, 6]


def test_epochs_and_steps_together_measure_once_where_both_are_due(tmp_path: Path) -> None:
    forgetting = ForgettingEval({"a": scripted_probe([0.8] * 20)}, every_n_epochs=1, every_n_train_steps=2)
    monitor = KappaMonitor(every_n_epochs=1, every_n_train_steps=2)
    make_trainer(tmp_path, forgetting, monitor, max_epochs=2).fit(TinyNet(), loader(), loader())
    for callback in (forgetting, monitor):
        assert [step for _, step in _steps(callback)] == [0, 2, 3, 4, 6]


def test_model_checkpoint_by_steps_sees_the_figure_of_its_step(tmp_path: Path) -> None:
    forgetting = ForgettingEval({"words": scripted_probe([0.8, 0.4, 0.72, 0.5])}, every_n_train_steps=2)
    checkpoint = ModelCheckpoint(tmp_path, monitor="forgetting/retention", mode="max", every_n_train_steps=2)
    fit(tmp_path, TinyNet(), checkpoint, forgetting, max_epochs=2)
    assert float(checkpoint.best_model_score) == pytest.approx(0.9)
    assert torch.load(checkpoint.best_model_path, weights_only=True)["global_step"] == 4


def test_breach_stops_within_the_epoch(tmp_path: Path) -> None:
    forgetting = ForgettingEval({"a": scripted_probe([1.0, 0.5, 0.4])}, min_retention=0.9, every_n_train_steps=2)
    assert fit(tmp_path, TinyNet(), forgetting, max_epochs=5).global_step == 2
    raising = ForgettingEval({"a": scripted_probe([1.0, 0.5])}, None, 0.9, "raise", every_n_train_steps=2)
    with pytest.raises(RuntimeError, match=r"at step 2: a 0\.5000"):
        fit(tmp_path, TinyNet(), raising)


class _SavesFirst(Callback):
    """Saves at a step before the others have had their turn."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("first", [True, False])
def test_resume_measures_at_the_same_steps(tmp_path: Path, step: int, first: bool) -> None:
    saves = _SavesFirst(tmp_path / "middle.ckpt", step)
    both = _callbacks(2)
    fit(tmp_path, TinyNet(), *((saves, *both) if first else (*both, saves)), max_epochs=3)
    resumed = _callbacks(2)
    fit(tmp_path, TinyNet(), *resumed, ckpt_path=tmp_path / "middle.ckpt", max_epochs=3)
    for callback, before in zip(resumed, both, strict=True):
        assert [s for _, s in _steps(callback)] == [s for _, s in _steps(before)] == [0, 2, 4, 6, 8]


def test_two_of_each_in_one_trainer_resume_each_with_its_own_state(tmp_path: Path) -> None:
    def make(cheap: list[float], dear: list[float]) -> list[Any]:
        return [
            ForgettingEval({"cheap": scripted_probe(cheap)}, every_n_train_steps=1),
            ForgettingEval({"dear": scripted_probe(dear)}),
            KappaMonitor(tensors=["head.weight"], every_n_train_steps=1),
            KappaMonitor(tensors="all"),
        ]

    logger = TensorBoardLogger(tmp_path, "", version="")
    first = make([1.0, 0.9, 0.8, 0.7], [0.5, 0.25])
    fit(tmp_path, TinyNet(), *first, logger=logger).save_checkpoint(tmp_path / "one.ckpt")
    # The last figure of a step counts: the end of an epoch comes after that of its last step.
    expected = {0: 1.0, 1: 0.95, 2: 0.9, 3: (0.7 + 0.5) / 2}
    assert dict(scalars(tmp_path, "forgetting/retention")) == pytest.approx(expected)
    assert [s for s, _ in scalars(tmp_path, "kappa/head.weight")] == [0, 1, 2, 3]
    assert {"kappa/median", "kappa/all/median", "kappa_drift/all/max"} <= set(events(tmp_path).Tags()["scalars"])
    again = make([0.6, 0.6, 0.6], [0.1])
    fit(tmp_path, TinyNet(), *again[::-1], ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    for now, before in zip(again, first, strict=True):
        assert now.baseline == before.baseline
        assert now.history[: len(before.history)] == before.history
        assert len(now.history) > len(before.history)
    assert again[1].history[-1]["forgetting/dear/retention"] == pytest.approx(0.2)


def test_two_with_a_probe_of_the_same_name_are_refused_by_it(tmp_path: Path) -> None:
    probes = [{"a": scripted_probe([1.0])}, {"a": scripted_probe([1.0]), "b": scripted_probe([1.0])}]
    with pytest.raises(ValueError, match=r"two ForgettingEvals .* a probe named 'a'"):
        fit(tmp_path, TinyNet(), *map(ForgettingEval, probes))


def test_state_of_the_first_version_resumes(tmp_path: Path) -> None:
    first = [ForgettingEval({"words": scripted_probe([0.8, 0.6])}), KappaMonitor()]
    path = tmp_path / "old.ckpt"
    fit(tmp_path, TinyNet(), *first).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    for callback in first:
        state = checkpoint["callbacks"].pop(callback.state_key)
        kept = ("baseline", "history", "probes")
        checkpoint["callbacks"][type(callback).__name__] = {k: v for k, v in state.items() if k in kept}
    torch.save(checkpoint, path)
    second = [ForgettingEval({"words": scripted_probe([0.4])}, every_n_train_steps=3), KappaMonitor(1, "all")]
    fit(tmp_path, TinyNet(), *second, ckpt_path=path, max_epochs=2)
    assert second[0].baseline == pytest.approx({"words": 0.8})
    assert [record["step"] for record in second[0].history] == [0, 3, 6]
    assert second[1].baseline.items() >= first[1].baseline.items()


def test_probes_of_two_callbacks_may_become_those_of_one(tmp_path: Path) -> None:
    two = [ForgettingEval({name: scripted_probe([1.0, 0.5])}) for name in "ab"]
    fit(tmp_path, TinyNet(), *two).save_checkpoint(tmp_path / "two.ckpt")
    one = ForgettingEval({name: scripted_probe([0.25]) for name in "ab"})
    fit(tmp_path, TinyNet(), one, ckpt_path=tmp_path / "two.ckpt", max_epochs=2)
    assert one.baseline == {"a": 1.0, "b": 1.0}
    assert one.history[-1]["forgetting/retention"] == 0.25


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_tensor_that_trained_for_a_part_of_the_epoch_is_followed(tmp_path: Path, hook: str) -> None:
    """Thawed for one step of three, so that neither end of the epoch shows it."""

    def thaw(trainer: Any, module: TinyNet) -> None:
        module.embed.requires_grad_(trainer.global_step == 1)

    module, monitor = TinyNet(), KappaMonitor(tensors="all")
    module.embed.requires_grad_(False)
    before = numpy_kappa(module.embed.weight)
    fit(tmp_path, module, Spy(**{hook: thaw}), monitor)
    after = numpy_kappa(module.embed.weight)
    assert after != before
    assert monitor.history[-1]["kappa"]["embed.weight"] == pytest.approx(after, rel=1e-9)


def test_what_moved_before_a_checkpoint_counts_after_the_resume(tmp_path: Path) -> None:
    module = TinyNet()
    freeze = Spy(on_train_batch_end=lambda trainer, module: module.embed.requires_grad_(False))
    saves = _SavesFirst(tmp_path / "middle.ckpt", 1)
    fit(tmp_path, module, KappaMonitor(tensors="all", every_n_train_steps=2), freeze, saves, max_steps=1)
    resumed, monitor = TinyNet(), KappaMonitor(tensors="all", every_n_train_steps=2)
    resumed.embed.requires_grad_(False)
    fit(tmp_path, resumed, monitor, ckpt_path=tmp_path / "middle.ckpt", max_steps=2)
    kappa = monitor.history[-1]["kappa"]["embed.weight"]
    assert kappa == pytest.approx(numpy_kappa(resumed.embed.weight), rel=1e-9)
    assert kappa != monitor.baseline["embed.weight"]


@pytest.mark.parametrize("callback", [ForgettingEval, KappaMonitor])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_steps_that_are_no_count_are_refused(callback: Any, value: Any) -> None:
    arguments = ({"a": scripted_probe([1.0])},) if callback is ForgettingEval else ()
    with pytest.raises(ValueError, match=r"every_n_train_steps=.* must be an int of at least 1"):
        callback(*arguments, every_n_train_steps=value)


def test_checkpoint_by_steps_that_looks_more_often_is_warned_of(tmp_path: Path) -> None:
    watcher = ModelCheckpoint(tmp_path, monitor="forgetting/retention", every_n_train_steps=1)
    with pytest.warns(UserWarning, match=r"which is measured every 2 steps, and it looks every 1"):
        fit(tmp_path, TinyNet(), _callbacks(2)[0], watcher)


def test_texts_tell_the_arguments() -> None:
    forgetting, monitor = _callbacks(5)
    assert repr(forgetting) == (
        "ForgettingEval(probes={'words': Probe(score over 1 batch, higher is better)}, every_n_train_steps=5, "
        "on_breach='stop')"
    )
    assert repr(monitor) == "KappaMonitor(every_n_train_steps=5, tensors='trainable', figures=True)"


def test_two_equal_monitors_are_refused_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, KappaMonitor(every_n_train_steps=2), max_epochs=1)
    # Those that a Trainer is made with Lightning compares itself.
    trainer.callbacks.append(KappaMonitor(every_n_train_steps=2))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"has KappaMonitor\(every_n_train_steps=2, .*\) twice.*leave one out"):
        trainer.fit(TinyNet(), loader())
    assert trainer.global_step == 0


def test_an_explicit_one_means_epochs_and_steps_and_the_default_gives_way(tmp_path: Path) -> None:
    for make in (lambda **o: ForgettingEval({"a": scripted_probe([0.8] * 20)}, **o), KappaMonitor):
        default, both = make(every_n_train_steps=2), make(every_n_epochs=1, every_n_train_steps=2)
        fit(tmp_path, TinyNet(), default, max_epochs=2)
        assert [step for _, step in _steps(default)] == [0, 2, 4, 6]
        fit(tmp_path, TinyNet(), both, max_epochs=2)
        assert [step for _, step in _steps(both)] == [0, 2, 3, 4, 6]
        assert (make().every_n_epochs, default.every_n_epochs, both.every_n_epochs) == (1, None, 1)


def test_config_of_a_lightning_cli_makes_the_same_callbacks_again(tmp_path: Path) -> None:
    """The file that LightningCLI writes beside a run, given to the next."""

    def callbacks(*arguments: str) -> tuple[list[Any], Path]:
        saved = tmp_path / f"{len(arguments)}.yaml"
        cli = LightningCLI(TinyNet, run=False, save_config_callback=None, args=list(arguments))
        cli.parser.save(cli.config, saved, overwrite=True)
        kinds = (KappaMonitor, ForgettingEval, TrainedOnlyCheckpoint)
        made = [c for c in cli.trainer.callbacks if isinstance(c, kinds)]  # type: ignore[attr-defined]
        return made, saved

    probe = {
        "class_path": "kappa_lightning.AccuracyProbe",
        "init_args": {"dataloader": [[[[1.0]], [0]]]},
    }
    config = {
        "trainer": {
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "callbacks": [
                {"class_path": "kappa_lightning.KappaMonitor", "init_args": options}
                for options in ({}, {"every_n_train_steps": 3}, {"every_n_epochs": 1, "every_n_train_steps": 2})
            ] + [
                {"class_path": "kappa_lightning.ForgettingEval",
                 "init_args": {"probes": {"old": probe}, "every_n_train_steps": 5, "min_retention": 0.9}},
                {"class_path": "kappa_lightning.TrainedOnlyCheckpoint", "init_args": {"every_n_train_steps": 4}},
            ],
        }
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    first, saved = callbacks("--config", str(tmp_path / "mine.yaml"))
    again, _ = callbacks("--config", str(saved), "--seed_everything", "1")
    schedules = [(1, None), (None, 3), (1, 2), (None, 5), (None, 4)]
    for made in (first, again):
        assert [(c.schedule.every_n_epochs, c.schedule.every_n_train_steps) for c in made] == schedules
    assert again[3].min_retention == 0.9
    assert [repr(c) for c in again[:4]] == [repr(c) for c in first[:4]]


def test_numbers_of_numpy_are_stored_as_pythons(tmp_path: Path) -> None:
    callback = ForgettingEval(
        {"a": scripted_probe([0.8] * 9)}, np.int64(2), np.float32(0.5), every_n_train_steps=np.int32(3)
    )
    monitor = KappaMonitor(every_n_train_steps=np.int64(3))
    fit(tmp_path, TinyNet(), callback, monitor).save_checkpoint(tmp_path / "one.ckpt")
    torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert repr(callback).endswith("every_n_epochs=2, every_n_train_steps=3, min_retention=0.5, on_breach='stop')")

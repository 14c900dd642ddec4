"""The three callbacks together, each alone, in any order, with any logger and progress bar."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tiny import (
    TinyNet,
    assert_same_tensors,
    events,
    fit,
    loader,
    make_trainer,
    numpy_ranking,
    snapshot,
    trainable,
)
from torch.utils.data import DataLoader

from kappa_lightning import AccuracyProbe, ForgettingEval, KappaFreezeCallback, KappaMonitor

KINDS = ("freeze", "monitor", "forgetting")


def _make(kinds: Sequence[str]) -> dict[str, Any]:
    makers: dict[str, Callable[[], Callback]] = {
        "freeze": lambda: KappaFreezeCallback(num_tensors=2),
        "monitor": lambda: KappaMonitor(),
        "forgetting": lambda: ForgettingEval({"old": AccuracyProbe(loader(), chance=None)}),
    }
    return {kind: makers[kind]() for kind in kinds}


LOGGERS: dict[str, Callable[[Path], Any]] = {
    "none": lambda root: False,
    "csv": lambda root: CSVLogger(root, "csv", version=""),
    "tensorboard": lambda root: TensorBoardLogger(root, "tensorboard", version=""),
    "two": lambda root: [CSVLogger(root, "csv", version=""), TensorBoardLogger(root, "tensorboard", version="")],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run in the order freeze, monitor, forgetting, without a logger."""
    module, callbacks = TinyNet(dropout=0.3), _make(KINDS)
    torch.manual_seed(1)
    fit(tmp_path_factory.mktemp("reference"), module, *callbacks.values(), max_epochs=2)
    return {"module": module, **callbacks}


@pytest.mark.parametrize("order", list(itertools.permutations(KINDS)), ids=",".join)
@pytest.mark.parametrize("logger", ["none", "csv"])
def test_order_and_logger_change_nothing(
    tmp_path: Path, order: tuple[str, ...], logger: str, reference: dict[str, Any]
) -> None:
    module, callbacks = TinyNet(dropout=0.3), _make(order)
    torch.manual_seed(1)
    fit(tmp_path, module, *callbacks.values(), max_epochs=2, logger=LOGGERS[logger](tmp_path))
    _assert_as_in(reference, module, callbacks)


@pytest.mark.parametrize("logger", ["tensorboard", "two"])
def test_every_logger_gets_every_figure(tmp_path: Path, logger: str, reference: dict[str, Any]) -> None:
    module, callbacks = TinyNet(dropout=0.3), _make(KINDS)
    torch.manual_seed(1)
    fit(tmp_path, module, *callbacks.values(), max_epochs=2, logger=LOGGERS[logger](tmp_path))
    _assert_as_in(reference, module, callbacks)
    tags = {"kappa/median", "kappa_drift/max", "forgetting/retention", "forgetting/old/accuracy"}
    log = events(tmp_path / "tensorboard")
    assert tags <= set(log.Tags()["scalars"])
    assert all([event.step for event in log.Scalars(tag)] == [0, 3, 6] for tag in tags)
    if logger == "two":
        header = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
        assert tags <= set(header)


def _assert_as_in(reference: dict[str, Any], module: TinyNet, callbacks: dict[str, Any]) -> None:
    assert_same_tensors(snapshot(module), snapshot(reference["module"]))
    assert callbacks["freeze"].selected_names == reference["freeze"].selected_names
    assert callbacks["monitor"].history == reference["monitor"].history
    assert callbacks["forgetting"].history == reference["forgetting"].history


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logger", LOGGERS)
def test_each_alone(tmp_path: Path, kind: str, logger: str) -> None:
    module, callbacks = TinyNet(), _make([kind])
    trainer = fit(tmp_path, module, *callbacks.values(), logger=LOGGERS[logger](tmp_path))
    assert trainer.global_step == 3
    if kind == "freeze":
        assert set(trainable(module)) == set(numpy_ranking(TinyNet(), TinyNet.CANDIDATES)[:2])
    else:
        assert [record["step"] for record in callbacks[kind].history] == [0, 3]
        assert trainable(module) == [name for name, _ in module.named_parameters()]


@pytest.mark.parametrize("order", list(itertools.permutations(KINDS)), ids=",".join)
def test_barebones_freezes_and_computes_no_figures_to_log(tmp_path: Path, order: tuple[str, ...]) -> None:
    module, callbacks = TinyNet(), _make(order)
    options = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"])
    trainer = make_trainer(tmp_path, *callbacks.values(), barebones=True, **options)
    trainer.fit(module, loader(), loader())
    assert trainer.global_step == 3
    assert set(trainable(module)) == set(numpy_ranking(TinyNet(), TinyNet.CANDIDATES)[:2])
    assert callbacks["monitor"].history == []


@pytest.mark.parametrize("order", list(itertools.permutations(KINDS)), ids=",".join)
@pytest.mark.parametrize("logger", ["none", "two"])
def test_fast_dev_run_leaves_no_file_and_trains_one_batch(tmp_path: Path, order: tuple[str, ...], logger: str) -> None:
    module, callbacks = TinyNet(), _make(order)
    logger = LOGGERS[logger](tmp_path)
    trainer = make_trainer(tmp_path, *callbacks.values(), fast_dev_run=True, logger=logger)
    trainer.fit(module, loader(), loader())
    assert trainer.global_step == 1
    assert set(trainable(module)) == set(numpy_ranking(TinyNet(), TinyNet.CANDIDATES)[:2])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_loggers_as_lightning_makes_them_by_default(tmp_path: Path) -> None:
    callbacks = _make(KINDS)
    trainer = fit(tmp_path, TinyNet(), *callbacks.values(), logger=True, enable_checkpointing=True)
    tags = events(Path(trainer.log_dir)).Tags()
    assert {"kappa/median", "forgetting/retention"} <= set(tags["scalars"])
    assert set(tags["tensors"]) == {"kappa/ranking/text_summary", "custom_scalars__config__"}


def test_fit_with_a_validation_loop_and_a_checkpoint_on_retention(tmp_path: Path) -> None:
    module, callbacks = TinyNet(), _make(KINDS)
    checkpoint = ModelCheckpoint(tmp_path, monitor="forgetting/retention", mode="max", save_top_k=-1)
    trainer = make_trainer(tmp_path, checkpoint, *callbacks.values(), max_epochs=3)
    trainer.fit(module, loader(), loader())
    retentions = [record["forgetting/retention"] for record in callbacks["forgetting"].history[1:]]
    assert sorted(float(score) for score in checkpoint.best_k_models.values()) == pytest.approx(sorted(retentions))


def test_callbacks_of_the_module_work_as_those_of_the_trainer(tmp_path: Path) -> None:
    made = _make(KINDS)

    class Net(TinyNet):
        def configure_callbacks(self) -> list[Callback]:
            return list(made.values())

    module = Net()
    fit(tmp_path, module)
    assert set(trainable(module)) == set(made["freeze"].selected_names)
    assert [record["step"] for record in made["monitor"].history] == [0, 3]
    assert set(made["monitor"].baseline) == set(made["freeze"].selected_names)


class Tunable(TinyNet):
    """A TinyNet whose learning rate and batch size Lightning's tuners may set."""

    def __init__(self) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=module.lr))
        self.lr, self.batch_size = 0.1, 8

    def train_dataloader(self) -> DataLoader:
        return DataLoader(loader().dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


@pytest.mark.parametrize("kinds", [("freeze",), ("monitor",), ("forgetting",), KINDS], ids=",".join)
@pytest.mark.parametrize(
    "tuner",
    [
        lambda: LearningRateFinder(num_training_steps=4, update_attr=False),
        lambda: BatchSizeFinder(max_trials=1, steps_per_trial=1),
    ],
    ids=["LearningRateFinder", "BatchSizeFinder"],
)
def test_lightnings_tuners_run_beside_the_callbacks(
    tmp_path: Path, kinds: tuple[str, ...], tuner: Callable[[], Callback]
) -> None:
    module, callbacks = Tunable(), _make(kinds)
    trainer = make_trainer(tmp_path, tuner(), *callbacks.values())
    trainer.fit(module)
    if "freeze" in kinds:
        assert callbacks["freeze"].selected_names == numpy_ranking(Tunable(), TinyNet.CANDIDATES)[:2]
        assert set(trainable(module)) == set(callbacks["freeze"].selected_names)
    for kind in set(kinds) & {"monitor", "forgetting"}:
        assert [record["step"] for record in callbacks[kind].history] == [0, trainer.global_step]

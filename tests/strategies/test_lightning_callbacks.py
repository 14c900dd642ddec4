"""Beside Lightning's own callbacks, on one process and under DDP."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from packaging.version import Version
from ranks import on_ranks
from tiny import Bank, Down, Spy, make_trainer, numpy_ranking, scalars, snapshot, trainable
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import ForgettingEval, KappaFreezeCallback, KappaMonitor, Probe

MATRICES = ("a.weight", "b.weight", "c.weight", "d.weight")
EPOCHS = 4


class Net(Bank):
    """Four layers of 16 + 36 + 25 + 9 weights, of which the callback is to train the first two."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(self._configure, a=(4, 3.0), b=(6, 2.0), c=(5, 9.0), d=(3, 5.0))
        self.lr = 0.1

    @staticmethod
    def _configure(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=module.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)


def samples(rank: int = 0, processes: int = 1, batch_size: int = 8) -> DataLoader:
    """Every ``processes``-th sample of 24, in order; Lightning's own sampler would shuffle them."""
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x[rank::processes]), batch_size=batch_size // processes)


def old(step: Callable[[Any, Any], Any] = lambda module, batch: module.loss(batch)) -> Probe:
    return Probe(samples(batch_size=5), Down(), step)


def fit(root: Path, module: Net, callbacks: list[Any], processes: int, validate: bool = True, **options: Any) -> Any:
    defaults = {"max_epochs": EPOCHS, "use_distributed_sampler": False}
    if processes > 1:
        defaults |= {"strategy": "ddp", "devices": processes}
    trainer = make_trainer(root, *callbacks, **(defaults | options))
    data = samples(trainer.global_rank, processes)
    trainer.fit(module, data, samples(trainer.global_rank, processes) if validate else None)
    return trainer


def figures(processes: int, validate: bool, threshold: float, root: Path) -> dict[str, Any]:
    """A run that keeps every checkpoint, stops at a retention, and logs twice."""
    freeze, monitor, forgetting = KappaFreezeCallback(num_tensors=2), KappaMonitor(), ForgettingEval({"old": old()})
    checkpoint = ModelCheckpoint(
        root, filename="{epoch}", monitor="forgetting/retention", mode="max", save_top_k=-1, save_last=True
    )
    stopping = EarlyStopping("forgetting/retention", mode="max", patience=99, stopping_threshold=threshold)
    others = [checkpoint, stopping, LearningRateMonitor("step"), GradientAccumulationScheduler({0: 1, 2: 3})]
    bar = RichProgressBar() if validate else TQDMProgressBar()
    loggers = [CSVLogger(root, "csv", version=""), TensorBoardLogger(root, "board", version="")]
    trainer = fit(
        root,
        Net(),
        [*others, bar, freeze, monitor, forgetting],
        processes,
        validate,
        max_epochs=9,
        logger=loggers,
        enable_progress_bar=True,
    )
    last = torch.load(root / "last.ckpt", weights_only=True)["callbacks"][forgetting.state_key]
    return {
        "epochs": trainer.current_epoch,
        "retention": [record["forgetting/retention"] for record in forgetting.history],
        "drift": [record["step"] for record in monitor.history],
        "kept": {Path(path).name: float(score) for path, score in checkpoint.best_k_models.items()},
        "last": last["history"] == forgetting.history,
        "best": Path(checkpoint.best_model_path).name,
    }


@pytest.mark.parametrize(("processes", "validate"), [(1, True), (2, True), (2, False)])
def test_checkpoints_stopping_and_loggers_go_by_the_figures(tmp_path: Path, processes: int, validate: bool) -> None:
    results = on_ranks(figures, processes, validate, 1.055, tmp_path, ranks=processes)
    retention = results[0]["retention"]
    stopped = next(epoch for epoch, value in enumerate(retention) if value > 1.055)
    assert 1 < stopped < 9
    for result in results:
        assert result["epochs"] == stopped
        assert result["retention"] == retention
        assert result["kept"] == pytest.approx({f"epoch={e}.ckpt": retention[e + 1] for e in range(stopped)}, rel=1e-6)
        assert result["best"] == f"epoch={max(range(stopped), key=lambda e: retention[e + 1])}.ckpt"
        assert result["last"]
    steps = [0, 3, 6, *(6 + n for n in range(1, stopped - 1))]
    assert results[0]["drift"] == steps
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["forgetting/retention"]]
    assert [int(row["step"]) for row in rows] == steps
    assert [float(row["forgetting/retention"]) for row in rows] == pytest.approx(retention)
    board = scalars(tmp_path / "board", "forgetting/retention")
    assert [step for step, _ in board] == steps
    assert [value for _, value in board] == pytest.approx(retention)
    assert len(scalars(tmp_path / "board", "kappa_drift/max")) == len(steps)


def stop_by_drift(processes: int, threshold: float, root: Path) -> tuple[int, list[float]]:
    monitor = KappaMonitor()
    stopping = EarlyStopping("kappa_drift/max", mode="min", patience=99, divergence_threshold=threshold)
    drifts: list[float] = []
    spy = Spy(on_train_epoch_end=lambda trainer, _: drifts.append(trainer.callback_metrics["kappa_drift/max"].item()))
    trainer = fit(
        root, Net(), [stopping, KappaFreezeCallback(num_tensors=2), monitor, spy], processes, False, max_epochs=9
    )
    return trainer.current_epoch, drifts


@pytest.mark.parametrize("processes", [1, 2])
def test_early_stopping_by_drift_stops_all_processes_at_one_epoch(tmp_path: Path, processes: int) -> None:
    (stopped, drifts), *others = on_ranks(stop_by_drift, processes, 0.01, tmp_path, ranks=processes)
    assert stopped == 1 + next(epoch for epoch, value in enumerate(drifts) if value > 0.01) == 2
    assert others == [(stopped, drifts)] * (processes - 1)


class Counts(ModelSummary):
    """Keeps the two numbers that it would show."""

    shown: tuple[int, int] | None = None

    def summarize(self, data: Any, total: int, trainable: int, *_: Any, **__: Any) -> None:
        self.shown = (total, trainable)


class RichCounts(RichModelSummary):
    """Keeps the two numbers that it would show."""

    shown: tuple[int, int] | None = None

    def summarize(self, data: Any, total: int, trainable: int, *_: Any, **__: Any) -> None:
        self.shown = (total, trainable)


def summaries(processes: int, root: Path) -> list[Any]:
    shown = []
    for kind in (Counts, RichCounts):
        for first in (True, False):
            summary, freeze = kind(), KappaFreezeCallback(num_tensors=2)
            callbacks = [summary, KappaMonitor(), freeze] if first else [freeze, KappaMonitor(), summary]
            fit(root, Net(), callbacks, processes, max_epochs=1, enable_model_summary=True)
            shown.append(summary.shown)
    return shown


@pytest.mark.parametrize("processes", [1, 2])
def test_summary_counts_what_trains_wherever_it_stands(tmp_path: Path, processes: int) -> None:
    first, *others = on_ranks(summaries, processes, tmp_path, ranks=processes)
    assert first == [(16 + 36 + 25 + 9 + 18, 16 + 36)] * 4
    assert all(shown == [None] * 4 for shown in others)


# Before torch 2.12 AveragedModel takes no weights of another precision than those that it was made of.
PRECISIONS = ("32-true", "bf16-true", "64-true") if Version(torch.__version__) >= Version("2.12") else ("32-true",)

AVERAGING: dict[str, Callable[[], Callback]] = {
    "SWA": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
    "mean": lambda: WeightAveraging(),
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
}


def average(processes: int, root: Path) -> list[dict[str, Any]]:
    """Every kind of averaging, before and after the other callbacks, with a validation loop and without."""
    return [
        {"kind": kind, "first": first, "validate": validate, "precision": precision}
        | average_once(AVERAGING[kind](), kind, first, validate, precision, processes, root)
        for kind in AVERAGING
        for precision in PRECISIONS
        for first, validate in itertools.product((True, False), repeat=2)
        if precision == "32-true" or (first and validate)
    ]


def average_once(
    averaging: Any, kind: str, first: bool, validate: bool, precision: str, processes: int, root: Path
) -> dict[str, Any]:
    seen: list[Tensor] = []
    current: list[Tensor] = []
    averaged: list[Tensor] = []

    def step(module: Any, batch: Any) -> Any:
        seen.append(module.a.weight.detach().clone())
        return module.loss(batch)

    def look(trainer: Any, module: Any) -> None:
        current.append(module.a.weight.detach().clone())
        model = averaging._average_model
        averaged.append((model if kind == "SWA" else model.module).a.weight.detach().clone())

    module, freeze, forgetting = Net(), KappaFreezeCallback(num_tensors=2), ForgettingEval({"old": old(step)})
    others = [freeze, forgetting, Spy(on_train_epoch_end=look)]
    callbacks = [averaging, *others] if first else [*others, averaging]
    fit(root, module, callbacks, processes, validate, precision=precision)
    batches = len(seen) // (EPOCHS + 1)
    measured = seen[batches::batches]
    before = Net().to(module.a.weight.dtype).state_dict()
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return {
        "trains": sorted(trainable(module)),
        "epochs": len(measured),
        "measured current": all(torch.equal(*pair) for pair in zip(measured, current, strict=True)),
        "measured averaged": all(torch.equal(*pair) for pair in zip(measured, averaged, strict=True)),
        "ends averaged": not torch.equal(module.a.weight, current[-1]),
        "frozen moved": max(_moved(before[name], module.get_parameter(name)) for name in frozen),
    }


def _moved(before: Tensor, now: Tensor) -> float:
    """The largest change relative to the largest entry."""
    return ((now - before).abs().max() / before.abs().max()).item()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_averaging_keeps_frozen_tensors_and_which_weights_are_measured(tmp_path: Path, processes: int) -> None:
    """Lightning swaps the averaged weights in for a validation loop; ForgettingEval, wherever it is listed, sees them.

    At the end of training the module gets the averaged weights after the last evaluation. Of what is frozen no bit
    changes, though the exponential average multiplies by decay and by 1 - decay, which rounds.
    """
    first, *others = on_ranks(average, processes, tmp_path, ranks=processes)
    assert others == [first] * (processes - 1)
    for run in first:
        assert run["trains"] == sorted(numpy_ranking(Net(), MATRICES)[:2]), run
        assert run["epochs"] == EPOCHS
        swapped = run["kind"] != "SWA" and run["validate"]
        assert (run["measured averaged"], run["measured current"]) == (swapped, not swapped), run
        assert run["ends averaged"], run
        assert run["frozen moved"] == 0, run


def find_rates(how: str, processes: int, root: Path) -> dict[str, Any]:
    module, freeze, forgetting = Net(), KappaFreezeCallback(num_tensors=2), ForgettingEval({"old": old()})
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    callbacks = {"before": [finder, freeze, forgetting], "after": [freeze, forgetting, finder]}
    callbacks = callbacks.get(how, [freeze, forgetting])
    if how == "tuner":
        options = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
        trainer = make_trainer(root, *callbacks, max_epochs=EPOCHS, use_distributed_sampler=False, **options)
        data = samples(trainer.global_rank, processes)
        Tuner(trainer).lr_find(module, data, num_training=4, update_attr=False)
        trainer.fit(module, data)
    else:
        fit(root, module, callbacks, processes, validate=False)
    return {
        "selected": freeze.selected_names,
        "trains": sorted(trainable(module)),
        "weights": snapshot(module),
        "steps": [record["step"] for record in forgetting.history],
        "retention": forgetting.history[-1]["forgetting/retention"],
        "files": sorted(path.name for path in root.iterdir()),
    }


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("how", ["before", "after", "tuner"])
def test_learning_rate_finder_leaves_no_trace_in_what_follows(tmp_path: Path, how: str, processes: int) -> None:
    expected = find_rates("none", 1, tmp_path)
    assert expected["selected"] == numpy_ranking(Net(), MATRICES)[:2]
    for result in on_ranks(find_rates, how, processes, tmp_path, ranks=processes):
        assert result["selected"] == expected["selected"]
        assert result["trains"] == expected["trains"]
        assert result["steps"] == expected["steps"] == [0, 3, 6, 9, 12]
        assert result["files"] == []
        for name, tensor in result["weights"].items():
            torch.testing.assert_close(tensor, expected["weights"][name], rtol=1e-5, atol=1e-6)
        assert result["retention"] == pytest.approx(expected["retention"], rel=1e-5)

"""What KappaMonitor logs, when, and that it changes nothing."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tiny import (
    Bank,
    Spy,
    TinyNet,
    adamw_with_schedule,
    assert_same_tensors,
    events,
    fit,
    loader,
    make_trainer,
    numpy_kappa,
    numpy_ranking,
    random_state,
    scalars,
    snapshot,
)
from torch import Tensor, nn

import kappa_lightning.profile.profile
from kappa_lightning import KappaFreezeCallback, KappaMonitor
from kappa_lightning.profile.compute import compute_rows


class NumpyKappas(Spy):
    """κ of every matrix by NumPy, at fit start and at the end of each epoch, with the global step."""

    def __init__(self, names: tuple[str, ...] = TinyNet.MATRICES) -> None:
        self.names = names
        self.records: list[tuple[int, dict[str, float]]] = []
        super().__init__(on_train_start=self._look, on_train_epoch_end=self._look)

    def _look(self, trainer: Any, module: Any) -> None:
        parameters = dict(module.named_parameters())
        self.records.append((trainer.global_step, {name: numpy_kappa(parameters[name]) for name in self.names}))


Decomposed = list[tuple[torch.device, tuple[int, ...]]]


def _sizes(decomposed: Decomposed) -> list[tuple[int, int]]:
    """(rows, cols) of each matrix that was decomposed, in a fixed order."""
    return sorted(shape[1:] for _, shape in decomposed)


def _tags(names: tuple[str, ...]) -> set[str]:
    summary = {"kappa/median", "kappa_drift/max", "kappa_drift/min"}
    return summary | {f"{kind}/{name}" for kind in ("kappa", "kappa_drift") for name in names}


def _tensorboard(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, "", version="")


def test_tensorboard_has_exactly_the_documented_tags(tmp_path: Path) -> None:
    fit(tmp_path, TinyNet(), KappaMonitor(), logger=_tensorboard(tmp_path))
    tags = events(tmp_path).Tags()
    assert {tag for tag in tags["scalars"] if tag.startswith("kappa")} == _tags(TinyNet.MATRICES)
    assert tags["images"] == ["kappa/drift"]


def test_csv_has_exactly_the_documented_tags_at_the_global_step(tmp_path: Path) -> None:
    numpy = NumpyKappas()
    fit(tmp_path, TinyNet(), KappaMonitor(), numpy, logger=CSVLogger(tmp_path, "", version=""), max_epochs=2)
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["kappa/median"]]
    assert {key for key in rows[0] if key.startswith("kappa")} == _tags(TinyNet.MATRICES)
    assert [int(row["step"]) for row in rows] == [0, 3, 6]
    for row, (_, kappas) in zip(rows, numpy.records, strict=True):
        assert float(row["kappa/median"]) == pytest.approx(statistics.median(kappas.values()), rel=1e-9)


def test_values_are_those_of_numpy_at_the_global_step(tmp_path: Path) -> None:
    numpy = NumpyKappas()
    fit(tmp_path, TinyNet(), KappaMonitor(figures=False), numpy, logger=_tensorboard(tmp_path), max_epochs=3)
    steps = [step for step, _ in numpy.records]
    assert steps == [0, 3, 6, 9]
    start = numpy.records[0][1]
    drifts = [{name: np.log10(kappas[name] / start[name]) for name in start} for _, kappas in numpy.records]
    expected = {
        "kappa/median": [np.median(list(kappas.values())) for _, kappas in numpy.records],
        "kappa_drift/max": [max(drift.values()) for drift in drifts],
        "kappa_drift/min": [min(drift.values()) for drift in drifts],
    }
    for name in TinyNet.MATRICES:
        expected[f"kappa/{name}"] = [kappas[name] for _, kappas in numpy.records]
        expected[f"kappa_drift/{name}"] = [drift[name] for drift in drifts]
    log = events(tmp_path)
    for tag, values in expected.items():
        found = [(event.step, event.value) for event in log.Scalars(tag)]
        assert [step for step, _ in found] == steps, tag
        # TensorBoard stores float32.
        assert [value for _, value in found] == pytest.approx(values, rel=1e-6, abs=1e-7), tag
    assert any(abs(value) > 1e-3 for value in expected["kappa_drift/max"])


def test_drift_of_one_is_ten_times_as_ill_conditioned(tmp_path: Path) -> None:
    def worsen(trainer: Any, module: Bank) -> None:
        with torch.no_grad():
            module.a.weight.copy_(torch.diag(torch.tensor([20.0, 1.0])))
            module.b.weight.copy_(torch.diag(torch.tensor([1.0, 1.0])))

    module, monitor = Bank(a=(2, 2.0), b=(2, 100.0)), KappaMonitor()
    fit(tmp_path, module, Spy(on_train_epoch_end=worsen), monitor, logger=_tensorboard(tmp_path))
    assert scalars(tmp_path, "kappa_drift/a.weight")[-1] == (3, pytest.approx(1.0, abs=1e-6))
    assert scalars(tmp_path, "kappa_drift/b.weight")[-1] == (3, pytest.approx(-2.0, abs=1e-6))
    assert scalars(tmp_path, "kappa_drift/max")[-1] == (3, pytest.approx(1.0, abs=1e-6))
    assert scalars(tmp_path, "kappa_drift/min")[-1] == (3, pytest.approx(-2.0, abs=1e-6))


def test_step_is_the_optimizers_under_gradient_accumulation(tmp_path: Path) -> None:
    monitor = KappaMonitor()
    trainer = fit(tmp_path, TinyNet(), monitor, logger=_tensorboard(tmp_path), max_epochs=2, accumulate_grad_batches=3)
    assert trainer.global_step == 2
    assert [record["step"] for record in monitor.history] == [0, 1, 2]
    assert [step for step, _ in scalars(tmp_path, "kappa/median")] == [0, 1, 2]


@pytest.mark.parametrize("freeze_first", [True, False])
def test_freeze_profile_is_reused_and_frozen_tensors_are_never_decomposed_again(
    tmp_path: Path, decomposed: Decomposed, freeze_first: bool
) -> None:
    module, monitor, freeze = TinyNet(), KappaMonitor(tensors="all"), KappaFreezeCallback(num_tensors=1, exclude=())
    best = dict(module.named_parameters())[numpy_ranking(module, TinyNet.MATRICES)[0]]
    view = (best.shape[0], best.numel() // best.shape[0])
    fit(tmp_path, module, *([freeze, monitor] if freeze_first else [monitor, freeze]), max_epochs=3)
    assert _sizes(decomposed) == sorted([(11, 6), (5, 18), (8, 5), (4, 8)] + [view] * 3)
    assert monitor.baseline == {row.name: row.kappa for row in freeze.profile}
    assert all(record["kappa"].keys() == monitor.baseline.keys() for record in monitor.history)


class Experts(TinyNet):
    """A TinyNet whose two fused experts differ in κ, and that learns nothing."""

    def __init__(self) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=0.0))
        self.experts = nn.Parameter(torch.stack([torch.diag(torch.tensor([k, 1.0])) for k in (2.0, 6.0)]))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(batch) + self.experts.square().sum()


@pytest.mark.parametrize(("experts", "kappa"), [("mean", 4.0), ("max", 6.0), ("median", 4.0)])
def test_kappa_of_fused_experts_is_combined_as_in_the_profile_it_is_compared_with(
    tmp_path: Path, experts: str, kappa: float
) -> None:
    freeze, monitor = KappaFreezeCallback(top_p=1.0, experts=experts), KappaMonitor(tensors=["experts"])
    fit(tmp_path, Experts(), freeze, monitor)
    assert [record["kappa"]["experts"] for record in monitor.history] == pytest.approx([kappa, kappa])


def test_frozen_without_the_callback_is_not_decomposed_again_either(tmp_path: Path, decomposed: Decomposed) -> None:
    module = TinyNet()
    module.embed.requires_grad_(False)
    fit(tmp_path, module, KappaMonitor(tensors="all"), max_epochs=2)
    assert _sizes(decomposed).count((11, 6)) == 1
    assert _sizes(decomposed).count((4, 8)) == 3


def test_tensor_outside_the_profile_is_decomposed_at_the_start(tmp_path: Path) -> None:
    module, numpy = TinyNet(), NumpyKappas()
    monitor = KappaMonitor()
    fit(tmp_path, module, KappaFreezeCallback(num_tensors=1, always_train=["head.weight"]), monitor, numpy)
    assert "head.weight" in monitor.baseline
    assert monitor.baseline["head.weight"] == pytest.approx(numpy.records[0][1]["head.weight"], rel=1e-9)


def test_every_n_epochs(tmp_path: Path) -> None:
    monitor, numpy = KappaMonitor(every_n_epochs=2), NumpyKappas()
    fit(tmp_path, TinyNet(), monitor, numpy, max_epochs=5)
    assert [(record["epoch"], record["step"]) for record in monitor.history] == [(0, 0), (2, 6), (4, 12)]
    assert monitor.history[1]["kappa"] == pytest.approx(numpy.records[2][1], rel=1e-9)


@pytest.mark.parametrize(
    ("tensors", "watched"),
    [
        ("trainable", {"conv.weight", "hidden.weight", "head.weight"}),
        ("all", set(TinyNet.MATRICES)),
        (["h*", "embed.weight"], {"embed.weight", "hidden.weight", "head.weight"}),
    ],
)
def test_tensors_chooses_what_is_watched(tmp_path: Path, tensors: Any, watched: set[str]) -> None:
    module, monitor = TinyNet(), KappaMonitor(tensors=tensors)
    module.embed.requires_grad_(False)
    fit(tmp_path, module, monitor)
    assert all(set(record["kappa"]) == watched for record in monitor.history)


def test_training_with_the_monitor_is_bit_identical_to_training_without(tmp_path: Path) -> None:
    modules, states = [TinyNet(adamw_with_schedule, dropout=0.5) for _ in range(2)], []
    for module, callbacks in zip(modules, ([], [KappaMonitor(tensors="all")]), strict=True):
        torch.manual_seed(3)
        fit(tmp_path, module, *callbacks, max_epochs=2, logger=_tensorboard(tmp_path / str(len(callbacks))))
        states.append(random_state())
    assert modules[0].losses == modules[1].losses
    assert_same_tensors(snapshot(modules[0]), snapshot(modules[1]))
    assert states[0] == states[1]


@pytest.mark.parametrize("figures", [True, False])
def test_picture_is_logged_only_if_asked_for(tmp_path: Path, figures: bool) -> None:
    fit(tmp_path, TinyNet(), KappaMonitor(figures=figures), logger=_tensorboard(tmp_path), max_epochs=2)
    log = events(tmp_path)
    assert log.Tags()["images"] == (["kappa/drift"] if figures else [])
    if figures:
        pictures = log.Images("kappa/drift")
        assert [picture.step for picture in pictures] == [0, 3, 6]
        assert all(picture.encoded_image_string.startswith(b"\x89PNG") for picture in pictures)
        assert pictures[-1].width > 300


def test_infinite_kappa_is_logged_and_drawn_around(tmp_path: Path) -> None:
    def change(trainer: Any, module: Bank) -> None:
        with torch.no_grad():
            module.recovers.weight.copy_(torch.eye(3))
            module.collapses.weight.copy_(torch.ones(3, 3))
            module.stays.weight.zero_()

    module = Bank(recovers=(3, 2.0), collapses=(3, 2.0), stays=(3, 2.0), fine=(3, 2.0))
    with torch.no_grad():
        module.recovers.weight.zero_()
        module.stays.weight.zero_()
    monitor = KappaMonitor()
    fit(tmp_path, module, Spy(on_train_epoch_end=change), monitor, logger=_tensorboard(tmp_path))
    assert monitor.baseline["recovers.weight"] == monitor.baseline["stays.weight"] == math.inf
    assert scalars(tmp_path, "kappa/collapses.weight")[-1][1] == math.inf
    assert scalars(tmp_path, "kappa_drift/recovers.weight")[-1][1] == -math.inf
    assert scalars(tmp_path, "kappa_drift/collapses.weight")[-1][1] == math.inf
    assert scalars(tmp_path, "kappa_drift/stays.weight")[-1][1] == 0.0
    assert len(events(tmp_path).Images("kappa/drift")) == 2


def test_every_kappa_infinite_still_trains(tmp_path: Path) -> None:
    def flatten(trainer: Any, module: Bank) -> None:
        module.a.weight.data.zero_()

    module, monitor = Bank(a=(3, 2.0)), KappaMonitor()
    module.a.weight.data.zero_()
    fit(tmp_path, module, monitor, Spy(on_train_epoch_end=flatten), logger=_tensorboard(tmp_path))
    assert monitor.history[0]["kappa"] == {"a.weight": math.inf}


def test_baseline_survives_a_resume(tmp_path: Path, decomposed: Decomposed) -> None:
    whole, first, second = (KappaMonitor() for _ in range(3))
    fit(tmp_path, TinyNet(), whole, max_epochs=2)
    fit(tmp_path, TinyNet(), first).save_checkpoint(tmp_path / "one.ckpt")
    decomposed.clear()
    fit(
        tmp_path,
        TinyNet(),
        second,
        ckpt_path=tmp_path / "one.ckpt",
        max_epochs=2,
        logger=_tensorboard(tmp_path / "resumed"),
    )
    assert len(decomposed) == len(TinyNet.MATRICES)
    assert second.baseline == whole.baseline
    assert second.history == whole.history
    assert [step for step, _ in scalars(tmp_path / "resumed", "kappa/median")] == [6]


def test_resume_without_a_baseline_takes_it_from_the_freeze_profile(tmp_path: Path) -> None:
    first, second = KappaFreezeCallback(num_tensors=2), KappaFreezeCallback(num_tensors=2)
    fit(tmp_path, TinyNet(), first).save_checkpoint(tmp_path / "one.ckpt")
    monitor = KappaMonitor()
    fit(tmp_path, TinyNet(), second, monitor, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert monitor.baseline == {name: first.profile[name].kappa for name in first.trained_names}
    assert monitor.history[0]["kappa"] != monitor.baseline


def test_resume_without_any_baseline_warns_that_drift_is_relative_to_now(tmp_path: Path) -> None:
    fit(tmp_path, TinyNet()).save_checkpoint(tmp_path / "plain.ckpt")
    monitor = KappaMonitor()
    with pytest.warns(UserWarning, match=r"drift.*embed\.weight"):
        fit(tmp_path, TinyNet(), monitor, ckpt_path=tmp_path / "plain.ckpt", max_epochs=2)
    assert [record["step"] for record in monitor.history] == [3, 6]


def test_second_fit_of_the_same_trainer_goes_on_with_the_history(tmp_path: Path) -> None:
    module, monitor = TinyNet(), KappaMonitor()
    trainer = fit(tmp_path, module, monitor)
    baseline = dict(monitor.baseline)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert monitor.baseline == baseline
    assert [record["step"] for record in monitor.history] == [0, 3, 6]


def test_new_trainer_starts_a_new_history(tmp_path: Path) -> None:
    module, monitor, numpy = TinyNet(), KappaMonitor(), NumpyKappas()
    fit(tmp_path, module, monitor)
    fit(tmp_path, module, monitor, numpy)
    assert [record["step"] for record in monitor.history] == [0, 3]
    assert monitor.baseline == pytest.approx(numpy.records[0][1], rel=1e-9)


def test_figures_are_visible_to_callbacks_that_monitor_a_metric(tmp_path: Path) -> None:
    monitor = KappaMonitor()
    trainer = fit(tmp_path, TinyNet(), monitor)
    latest = monitor.history[-1]["kappa"]
    assert float(trainer.callback_metrics["kappa/median"]) == pytest.approx(np.median(list(latest.values())), rel=1e-6)
    assert _tags(TinyNet.MATRICES) <= set(trainer.callback_metrics)


def test_tensor_thawed_in_the_middle_is_followed(tmp_path: Path) -> None:
    def thaw(trainer: Any, module: TinyNet) -> None:
        if trainer.current_epoch == 1:
            module.embed.requires_grad_(True)

    module, monitor, numpy = TinyNet(), KappaMonitor(tensors="all"), NumpyKappas()
    module.embed.requires_grad_(False)
    fit(tmp_path, module, Spy(on_train_epoch_start=thaw), monitor, numpy, max_epochs=3)
    for record, (_, kappas) in zip(monitor.history, numpy.records, strict=True):
        assert record["kappa"] == pytest.approx(kappas, rel=1e-9)
    assert monitor.history[-1]["kappa"]["embed.weight"] != monitor.baseline["embed.weight"]


def test_validate_alone_does_nothing(tmp_path: Path) -> None:
    monitor = KappaMonitor()
    make_trainer(tmp_path, monitor).validate(TinyNet(), loader(), verbose=False)
    assert monitor.history == []


# Nothing to compute


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

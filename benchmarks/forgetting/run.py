"""One run: a task, a method, a learning rate and a seed, and the path of loss and retention that comes of it."""

from __future__ import annotations

import json
import logging
import re
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.forgetting.methods import prepare, walks_back
from benchmarks.forgetting.registry import TASKS
from benchmarks.forgetting.state import save_state
from benchmarks.forgetting.task import LOSS
from kappa_lightning import ForgettingEval, Probe
from kappa_lightning.callbacks.evaluation import evaluate
from kappa_lightning.files import write_text

BLENDS = 10
"""Steps on the line from the pretrained to the trained weights along which ``wise_ft`` walks."""


@dataclass(frozen=True)
class Plan:
    """What determines a run.

    Attributes:
        task: a key of :data:`~benchmarks.forgetting.registry.TASKS`.
        method: see :mod:`benchmarks.forgetting.methods`.
        lr: peak learning rate of the pretrained part.
        seed: of weights, data and order.
        budget: the share of the candidates' parameters that trains.
        strength: of the pull of ``l2_sp``, otherwise 0.
        epochs: evaluations, one after each.
        steps_per_epoch: optimizer steps in an epoch.
        options: of the task.
    """

    task: str
    method: str
    lr: float
    seed: int
    budget: float
    strength: float
    epochs: int
    steps_per_epoch: int
    options: Mapping[str, str] = field(default_factory=dict)

    def file(self, folder: Path) -> Path:
        """Where the run's result is kept."""
        method = re.sub(r"[^\w]+", "-", self.method)
        strength = f"-strength{self.strength:g}" if self.strength else ""
        return folder / f"{self.task}-{method}-budget{self.budget:g}-lr{self.lr:g}{strength}-seed{self.seed}.json"

    def weights(self, folder: Path) -> Path:
        """Where the parameters that the run trained are kept."""
        return self.file(folder).with_suffix(".pt")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        plan: what it was.
        path: (loss, retention) before the first step and after each epoch; of ``wise_ft``, along the line.
        probes: each probe's metric at the same points.
        trainable: parameters that trained.
        seconds: wall time.
    """

    plan: Plan
    path: list[tuple[float, float]]
    probes: dict[str, list[float]]
    trainable: int
    seconds: float

    def save(self, folder: Path) -> None:
        """Write the run to its file, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(self.plan.file(folder), json.dumps(asdict(self) | {"torch": torch.__version__}, indent=1))

    @classmethod
    def load(cls, plan: Plan, folder: Path) -> Run | None:
        """The finished run of a plan, if there is one.

        Raises:
            ValueError: if its file is of a run with other settings.
        """
        file = plan.file(folder)
        if not file.is_file():
            return None
        entry = json.loads(file.read_text(encoding="utf-8"))
        if entry["plan"] != asdict(plan):
            differences = [key for key, value in asdict(plan).items() if entry["plan"].get(key) != value]
            raise ValueError(
                f"{file} is of a run with another {', '.join(differences)}: give another --runs, or delete it"
            )
        path = [(loss, retention) for loss, retention in entry["path"]]
        return cls(plan, path, entry["probes"], entry["trainable"], entry["seconds"])


def execute(plan: Plan, folder: Path, *, keep_weights: bool = False) -> Run:
    """Train and evaluate as planned; what runs share is kept in the folder.

    Args:
        plan: the run.
        folder: where the task keeps what its runs share, and where trained parameters are.
        keep_weights: keep them there, so that a method that walks back from them later need not train again.

    Raises:
        ValueError: if the plan's method or task is unknown, or nothing fits its budget.
    """
    # What Lightning says of devices and loaders, and the table of the callback, are noise once for each of many runs.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    started = time.perf_counter()
    task = TASKS[plan.task](**plan.options)
    model = task.model(plan.seed, plan.lr, folder)
    data = task.data(model, plan.seed)
    probes = task.probes(model, plan.seed)
    walks, trained_as = walks_back(plan.method)
    pl.seed_everything(plan.seed, verbose=False)
    callbacks = prepare(trained_as, model, task, budget=plan.budget, strength=plan.strength, seed=plan.seed)
    start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    weights = replace(plan, method=trained_as).weights(folder)
    # The order of the data and dropout must not depend on the numbers that a method drew.
    pl.seed_everything(plan.seed, verbose=False)
    losses, forgetting = Losses(), ForgettingEval(probes)
    if walks and weights.is_file():
        trained = torch.load(weights, weights_only=True)
        model.load_state_dict(start | trained)
    else:
        _trainer(losses).validate(model, data, verbose=False)
        fit = _trainer(*callbacks, forgetting, losses, max_epochs=plan.epochs, limit_train_batches=plan.steps_per_epoch)
        fit.fit(model, data)
        trained = trained_state(model)
        if keep_weights:
            save_state(trained, weights)
    if walks:
        path_losses, figures = walk_back(model, data, probes, start, task.new)
        retentions = [statistics.fmean(point) for point in zip(*_ratios(figures, probes).values(), strict=True)]
    else:
        path_losses, records = losses.values, forgetting.history
        retentions = [record["forgetting/retention"] for record in records]
        figures = {name: [r[f"forgetting/{name}/{probe.name}"] for r in records] for name, probe in probes.items()}
    trainable = sum(parameter.numel() for name, parameter in model.named_parameters() if name in trained)
    path = list(zip(path_losses, retentions, strict=True))
    return Run(plan, path, figures, trainable, time.perf_counter() - started)


def trained_state(model: pl.LightningModule) -> dict[str, Tensor]:
    """Of a model's state, copies of the parameters that train and of all buffers."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name not in frozen}


def _ratios(figures: Mapping[str, Sequence[float]], probes: Mapping[str, Probe]) -> dict[str, list[float]]:
    """The retention of each probe along a path: its metric over the first one, inverted where lower is better."""
    directions = {name: 1 if probe.higher_is_better else -1 for name, probe in probes.items()}
    return {name: [(value / values[0]) ** directions[name] for value in values] for name, values in figures.items()}


def walk_back(
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    probes: Mapping[str, Probe],
    pretrained: Mapping[str, Tensor],
    new: Sequence[str],
) -> tuple[list[float], dict[str, list[float]]]:
    """The losses, and the metrics of the probes, at the blends (1 − a)·pretrained + a·trained, a = 0, 0.1, …, 1.

    Parameters that are new, and what is not floating point, stay as trained.
    """
    trained = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    blended = [
        name
        for name, tensor in trained.items()
        if tensor.is_floating_point() and not any(fnmatchcase(name, glob) for glob in new)
    ]
    losses, metrics = Losses(), Metrics(probes)
    trainer = _trainer(losses, metrics)
    for point in range(BLENDS + 1):
        blend = {name: torch.lerp(pretrained[name], trained[name], point / BLENDS) for name in blended}
        model.load_state_dict({**trained, **blend})
        trainer.validate(model, data, verbose=False)
    return losses.values, metrics.values


class Losses(pl.Callback):
    """The held-out task loss of each validation."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take it from what the module logged."""
        self.values.append(float(trainer.callback_metrics[LOSS]))


class Metrics(pl.Callback):
    """The metric of each probe at each validation."""

    def __init__(self, probes: Mapping[str, Probe]) -> None:
        self.probes = probes
        self.values: dict[str, list[float]] = {name: [] for name in probes}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure."""
        for name, probe in self.probes.items():
            self.values[name].append(evaluate(trainer, pl_module, name, probe))


def _trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        callbacks=list(callbacks),
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )

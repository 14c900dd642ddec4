"""One run: a candidate, a learning rate and a seed, and the path of loss and retention that comes of it."""

from __future__ import annotations

import copy
import gc
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from kappa_lightning.callbacks.averaging import AVERAGING
from kappa_lightning.callbacks.evaluation import evaluate
from kappa_lightning.callbacks.order import move_before
from kappa_lightning.callbacks.task import generators_of
from kappa_lightning.callbacks.trainer import callbacks_of
from kappa_lightning.pilot.adaptation import Point, factor_of
from kappa_lightning.pilot.candidates import Candidate, candidate
from kappa_lightning.pilot.given import made_by, probes_of
from kappa_lightning.pilot.halves import Half, half_of
from kappa_lightning.pilot.nowhere import Nowhere
from kappa_lightning.pilot.rates import RateFactor
from kappa_lightning.probes import Probe
from kappa_lightning.restoring import environment_restored, interruptible, random_numbers_restored
from kappa_lightning.weights import plain_parameters
from kappa_lightning.weights.names import plain_name
from kappa_lightning.weights.patterns import match_parameters

Data = pl.LightningDataModule | tuple[Any, Any]
"""A data module, or the dataloaders to train with and to validate with."""

SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
"""What ``seed_everything`` leaves in the environment, by which later runs of the user's would be seeded, too."""

OWN = frozenset(
    {
        "barebones", "check_val_every_n_epoch", "enable_checkpointing", "enable_model_summary", "enable_progress_bar",
        "fast_dev_run", "limit_train_batches", "logger", "max_epochs", "max_steps", "max_time", "min_epochs",
        "min_steps", "num_sanity_val_steps", "overfit_batches", "val_check_interval",
    }
)  # fmt: skip
"""Trainer arguments that a pilot sets itself."""

_SHOWING = (Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar)
"""Callbacks that write or show and change no run: they are left out, since a run writes and shows nothing."""


@dataclass(frozen=True)
class Setup:
    """What all runs have in common.

    Attributes:
        make_module: makes the pretrained module; it may take a ``seed``.
        make_data: makes the data of the new task; it may take a ``seed``.
        probes: what is kept, by name; or a function from the module to them.
        monitor: what the module logs in validation, the held-out loss of the new task; lower is better.
        steps: optimizer steps of a run.
        evaluations: of loss and probes in a run, at equal distances, beside the one before the first step.
        blends: points on the way back from the trained to the pretrained weights.
        always_train: globs of what is new: it trains with every candidate and is not walked back.
        exclude: globs of what no choice takes.
        draw: the seed of ``random``.
        trainer: arguments of the Trainer: precision, clipping, accumulation, devices, strategy, …
    """

    make_module: Callable[..., pl.LightningModule]
    make_data: Callable[..., Data]
    probes: Mapping[str, Probe] | Callable[[pl.LightningModule], Mapping[str, Probe]]
    monitor: str
    steps: int
    evaluations: int = 10
    blends: int = 5
    always_train: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    draw: int = 0
    trainer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spec:
    """What determines a run of a setup.

    Attributes:
        candidate: its name.
        step: of the learning rate; see :func:`~kappa_lightning.pilot.adaptation.factor_of`.
        seed: of weights, data and order.
        half: of the probes' data.
    """

    candidate: str
    step: int
    seed: int
    half: Half = "all"


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes:
        spec: what it was.
        path: the evaluations, from before the first step to behind the last.
        line: those on the way from the pretrained (0) to the trained (1) weights; empty if there is no way back.
        metrics: each probe's metric before the first step.
        trainable: parameters that trained.
        total: parameters of the module.
        seconds: wall time.
    """

    spec: Spec
    path: tuple[Point, ...]
    line: tuple[Point, ...]
    metrics: Mapping[str, float]
    trainable: int
    total: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which may hold infinite numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Run:
        """The inverse of :meth:`to_dict`."""
        path, line = (tuple(Point(**point) for point in entry[key]) for key in ("path", "line"))
        trainable, total, seconds = (entry[key] for key in ("trainable", "total", "seconds"))
        return cls(Spec(**entry["spec"]), path, line, entry["metrics"], trainable, total, seconds)


def run_trial(setup: Setup, spec: Spec, by: Candidate | str) -> Run:
    """Train and evaluate; the module, the data and the probes that the setup gives are left as they were.

    Args:
        setup: what all runs have in common.
        spec: the run.
        by: the candidate that the spec names, or its name.

    Raises:
        TypeError: if the setup's functions give something else than they should.
        ValueError: if the module does not log ``monitor``, or a probe gives nothing to form a ratio of. This and any
            other error has a note that names the candidate.
    """
    try:
        with (
            random_numbers_restored(),
            environment_restored(*SEEDS),
            quiet(),
            interruptible(),
            closing(Nowhere()) as log,
        ):
            return _trial(setup, spec, by, log)
    except Exception as error:
        error.add_note(f"in a run of the candidate {spec.candidate!r}")
        raise


def _trial(setup: Setup, spec: Spec, by: Candidate | str, log: Nowhere) -> Run:
    started = time.perf_counter()
    if isinstance(by, str):
        by = candidate(by, always_train=setup.always_train, exclude=setup.exclude, seed=setup.draw)
    # A trainer and its module refer to each other, so those of the last run are still there.
    gc.collect()
    pl.seed_everything(spec.seed, workers=True, verbose=False)
    pretrained = configured(made_by(setup.make_module, spec.seed, pl.LightningModule, "make_module"), setup.trainer)
    module = _copy_of(pretrained)
    data = made_by(setup.make_data, spec.seed, (pl.LightningDataModule, tuple, list), "make_data")
    probes = {name: half_of(probe, spec.half, name) for name, probe in probes_of(setup.probes, module).items()}
    callbacks = [RateFactor(factor_of(spec.step)), *by.build(module)]
    recorder = Recorder(probes, setup.monitor)
    # The order of the data and dropout must not depend on the numbers that a candidate drew.
    pl.seed_everything(spec.seed, workers=True, verbose=False)
    counter = _Trainable(pretrained)
    trainer = _trainer(setup, [*callbacks, recorder, counter], log)
    with _generators_seeded(data, spec.seed):
        _validate(trainer, module, data)
        if not recorder.validated:
            raise ValueError(
                "the validation before training ran no batch: give validation data of at least one batch, and no "
                "limit_val_batches=0"
            )
        _fit(trainer, module, data)
        if not recorder.points:
            raise ValueError(
                "the train dataloader gives no batch: give it more data, or a smaller batch_size where it has drop_last"
            )
        path = list(recorder.points)
        line = _way_back(setup, pretrained, module, data, recorder, counter.names, log)
    if path[-1].position < setup.steps and line and math.isfinite(path[-1].loss):
        path.append(Point(float(setup.steps), line[-1].loss, line[-1].retention))
    run = Run(
        spec,
        tuple(path),
        tuple(line),
        dict(recorder.baseline),
        counter.trainable,
        sum(parameter.numel() for parameter in pretrained.parameters()),
        time.perf_counter() - started,
    )
    return trainer.strategy.broadcast(run)


def configured(module: pl.LightningModule, trainer: Mapping[str, Any]) -> pl.LightningModule:
    """The module, or a copy whose ``configure_model`` has been called, so that its parameters are there.

    A strategy of the user's may be what it needs for that; then Lightning is left to call it.
    """
    if not is_overridden("configure_model", module) or "strategy" in trainer:
        return module
    module = copy.deepcopy(module)
    module.configure_model()
    return module


def _copy_of(pretrained: pl.LightningModule) -> pl.LightningModule:
    module = copy.deepcopy(pretrained)
    for part in module.modules():
        # What module.compile() made runs the weights of the module that it was made of.
        part._compiled_call_impl = None
    return module


@contextmanager
def _generators_seeded(data: Data, seed: int) -> Iterator[None]:
    """The generators that the data holds begin from the seed, and afterwards are where they were."""
    if isinstance(data, pl.LightningDataModule):
        held = [one for one in vars(data).values() if isinstance(one, torch.Generator)]
    else:
        held = generators_of(data)
    kept = [(one, one.get_state()) for one in held]
    for one, _ in kept:
        one.manual_seed(seed)
    try:
        yield
    finally:
        for one, state in kept:
            one.set_state(state)


class Recorder(Callback):
    """The held-out loss and the retention of every probe before the first step and with each validation.

    A loss that is not finite ends the run, whose last point then has the loss ∞: the run has diverged.
    """

    def __init__(self, probes: Mapping[str, Probe], monitor: str) -> None:
        super().__init__()
        self.probes = dict(probes)
        self.monitor = monitor
        self.points: list[Point] = []
        self.baseline: dict[str, float] = {}
        self.validated: list[float] = []
        self.measured: list[dict[str, float]] = []
        self.logged: dict[str, Tensor] = {}
        self.measures_all = False
        self._averaged: dict[str, float] | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Whose averages are in the module while validation runs, up to its own on_validation_epoch_end.
        move_before(trainer, self, WeightAveraging)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for probe in self.probes.values():
            probe.begin_baseline()
        self.baseline = self._metrics(trainer, pl_module)
        for name, value in self.baseline.items():
            if not 0 < value < math.inf:
                raise ValueError(
                    f"the probe {name!r} has {self.probes[name].name}={value:g} before the first step, and retention "
                    "is a ratio to that: use a capability that the model has, and a metric that is above 0 for it"
                )
        self.points.append(Point(0.0, self.validated[-1], dict.fromkeys(self.baseline, 1.0)))
        # A schedule with a monitor may look at it after an epoch that ends before the first validation.
        wanted = {schedule.monitor for schedule in trainer.lr_scheduler_configs}
        trainer.callback_metrics.update({name: value for name, value in self.logged.items() if name in wanted})

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The loss is that of the averages, so what is kept must be, too.
        self._averaged = None
        if trainer.state.fn == TrainerFn.FITTING and callbacks_of(trainer, WeightAveraging):
            loss = trainer.callback_metrics.get(self.monitor)
            if loss is None or math.isfinite(loss):
                self._averaged = self._retention(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(f"monitor={self.monitor!r}: validation logs {known}; log the held-out loss, or name it")
        loss = float(value) if math.isfinite(value) else math.inf
        if trainer.state.fn != TrainerFn.FITTING:
            self.validated.append(loss)
            self.logged = dict(trainer.callback_metrics)
            if self.measures_all:
                self.measured.append(self._retention(trainer, pl_module))
            return
        # With manual optimization a step is a batch, however many optimizers make theirs in it.
        automatic = pl_module.automatic_optimization
        done = trainer.global_step if automatic else trainer.fit_loop.total_batch_idx + 1
        if loss == math.inf:
            kept = dict.fromkeys(self.probes, 0.0)
        else:
            kept = self._retention(trainer, pl_module) if self._averaged is None else self._averaged
        self.points.append(Point(float(done), loss, kept))
        if loss == math.inf:
            trainer.should_stop = True

    def _retention(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        return {
            name: _ratio(self.baseline[name], value, self.probes[name].higher_is_better)
            for name, value in self._metrics(trainer, module).items()
        }

    def _metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        return {name: evaluate(trainer, module, name, probe) for name, probe in self.probes.items()}


class _Trainable(Callback):
    """What trains, as it is when training starts; and the limit of steps where an optimizer is not all of them.

    It also ends a run in which the copy's functions train the module that it was copied from, and one without data.
    """

    def __init__(self, pretrained: pl.LightningModule) -> None:
        super().__init__()
        self.names: frozenset[str] = frozenset()
        self.trainable = 0
        self._original = [(name, parameter, parameter.grad) for name, parameter in pretrained.named_parameters()]
        self._batches = 0
        self._begun = -1

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._begun == self._batches:
            raise ValueError(
                f"the train dataloader gave {self._batches} batches and gives no more when it is read again, and "
                f"{trainer.max_steps} steps are asked for: give data that can be read more than once, or fewer steps"
            )
        self._begun = self._batches

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self._batches += 1
        if self._batches == 1:
            reached = [name for name, parameter, grad in self._original if parameter.grad is not grad]
            for _name, parameter, grad in self._original:
                parameter.grad = grad
            if reached:
                raise ValueError(
                    f"training a copy of the module reached {reached[0]} of the module itself: a function that it "
                    "holds was made with the original's tensors or methods (such as self.encode = lambda x: "
                    "self.body(x), or a compiled method). Make it a method, or compile in configure_model"
                )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = {name: p for name, p in plain_parameters(pl_module).items() if p.requires_grad}
        self.names = frozenset(trained)
        self.trainable = sum(parameter.numel() for parameter in trained.values())
        if not pl_module.automatic_optimization:
            # Lightning counts every optimizer's step.
            trainer.fit_loop.epoch_loop.max_steps *= max(1, len(trainer.optimizers))


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks on devices and loaders, which are noise once for each of many runs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _own_callbacks(setup: Setup) -> list[Callback]:
    """The user's, but for those that only show or save something."""
    given = setup.trainer.get("callbacks") or []
    return [one for one in (given if isinstance(given, list | tuple) else [given]) if not isinstance(one, _SHOWING)]


def _trainer(setup: Setup, callbacks: Sequence[Callback], log: Nowhere) -> pl.Trainer:
    options = {"devices": 1, **setup.trainer, "callbacks": [*copy.deepcopy(_own_callbacks(setup)), *callbacks]}
    accumulate = int(options.get("accumulate_grad_batches", 1))
    return pl.Trainer(
        **options,
        max_steps=setup.steps,
        max_epochs=-1,
        val_check_interval=math.ceil(setup.steps / setup.evaluations) * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        # A module may call its logger's own methods, and write into trainer.log_dir.
        logger=log,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _fit(trainer: pl.Trainer, module: pl.LightningModule, data: Data) -> None:
    if isinstance(data, pl.LightningDataModule):
        trainer.fit(module, data)
    else:
        trainer.fit(module, *data)


def _validate(trainer: pl.Trainer, module: pl.LightningModule, data: Data) -> None:
    if isinstance(data, pl.LightningDataModule):
        trainer.validate(module, data, verbose=False)
    else:
        trainer.validate(module, data[1], verbose=False)


@torch.no_grad()
def _way_back(
    setup: Setup,
    pretrained: pl.LightningModule,
    module: pl.LightningModule,
    data: Data,
    recorder: Recorder,
    trained: frozenset[str],
    log: Nowhere,
) -> list[Point]:
    """The points (1 − a)·pretrained + a·trained for a = 0, …, 1; none if the run has diverged or there is no way."""
    if not setup.blends or not math.isfinite(recorder.points[-1].loss):
        return []
    state = {plain_name(name): tensor for name, tensor in module.state_dict().items()}
    start = {plain_name(name): tensor for name, tensor in pretrained.state_dict().items()}
    new = match_parameters(pretrained, setup.always_train, argument="always_train")
    ends: dict[str, tuple[Tensor, Tensor]] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or name in new:
            continue
        if name in start:
            ends[name] = (start[name].to(tensor.device, tensor.dtype), tensor.clone())
        elif ".lora_B." in name or ".lora_embedding_B." in name:
            ends[name] = (torch.zeros_like(tensor), tensor.clone())
        elif name in trained and ".lora_" not in name:
            return []
    recorder.measures_all = True
    # What averages weights puts the averages into the module behind the last evaluation.
    averages = any(isinstance(one, AVERAGING) for one in _own_callbacks(setup))
    trainer = _trainer(setup, [recorder], log)
    points = [Point(0.0, recorder.points[0].loss, recorder.points[0].retention)]
    for number in range(1, setup.blends + 1):
        share = number / setup.blends
        for name, (first, last) in ends.items():
            state[name].copy_(torch.lerp(first, last, share))
        if number == setup.blends and recorder.points[-1].position == setup.steps and not averages:
            points.append(replace(recorder.points[-1], position=1.0))
            break
        _validate(trainer, module, data)
        points.append(Point(share, recorder.validated[-1], recorder.measured[-1]))
    return points


def _ratio(before: float, now: float, higher_is_better: bool) -> float:
    """The retention; 0 where the metric is no number any longer."""
    if math.isnan(now):
        return 0.0
    if higher_is_better:
        return now / before
    return 0.0 if now == math.inf else before / now if now else math.inf

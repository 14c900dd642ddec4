"""Walk part of the way back from the trained weights to the pretrained ones, when training has ended."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from kappa_lightning.anchoring.choice import Goal, Point, check_bisections, check_points, num_points, search
from kappa_lightning.anchoring.halves import HalvedProbes
from kappa_lightning.anchoring.path import Along, WalkPath, walked
from kappa_lightning.anchoring.table import walk_table
from kappa_lightning.arguments import as_count
from kappa_lightning.callbacks.evaluation import evaluate
from kappa_lightning.callbacks.forgetting import ForgettingEval
from kappa_lightning.callbacks.keyed import Keyed
from kappa_lightning.callbacks.pretrained import PretrainedKeeper
from kappa_lightning.callbacks.progress import track
from kappa_lightning.callbacks.reporting import log_figure, log_scalars, shows_pictures
from kappa_lightning.callbacks.walk_measures import require_logged, validated
from kappa_lightning.probes import Probe
from kappa_lightning.strategies import adapter_for
from kappa_lightning.weights.patterns import check_patterns


class WalkBack(Keyed):
    """Look along the way from the pretrained weights to the trained ones, and stay at the best point.

    When training has ended, the module's weights are set to points θ₀ + α(θ₁ − θ₀) between what trained as it was and
    as it is; at each the validation loop gives ``monitor`` and the probes give their retention, which is their metric
    there over that at α = 0. The point that keeps ``min_retention`` with the best monitor (or keeps to
    ``monitor_limit`` with the highest retention) stays in the module, and is saved as a checkpoint. Averaging weights
    in this way is WiSE-FT (Wortsman et al., arXiv 2109.01903).

    The point is chosen on every other batch of the probes, and its retention is reported on the others, so that the
    figure is not selected by its own noise.

    Logged at the trainer's global step, to every logger: ``walk_back/alpha`` (the mean of the factors),
    ``walk_back/monitor``, ``walk_back/retention`` (of the probe that keeps least) and ``walk_back/<probe>/retention``;
    to TensorBoard a picture of the way, ``walk_back/path``; on the console a table. ``trainer.callback_metrics`` have
    the validation's figures at the chosen point.

    Of LoRA adapters the scale is what shrinks. Running statistics of normalization layers are interpolated; after a
    long way they may fit the weights between badly. Beside ``WeightAveraging`` it walks back from the averaged weights
    and must stand behind it. Frozen tensors, and a quantized base under adapters, are left alone.

    Args:
        min_retention: the retention that every probe must keep, in (0, 1].
        monitor: the name of a metric that the validation loop logs, or a :class:`~kappa_lightning.Probe` of the new
            task.
        mode: ``"min"`` or ``"max"``: which way the monitor is better; a probe knows that itself.
        monitor_limit: instead of ``min_retention``, the worst value that the monitor may have.
        probes: what is to be kept; by default the probes of the Trainer's ``ForgettingEval``.
        along: one factor for ``"all"`` tensors, one for each ``"role"`` or for each stretch of ``"depth"``, or
            ``"singular_values"``, which drops the small singular values of each update instead.
        points: how many points, evenly spaced, or the factors themselves.
        bisections: how often the stretch behind the best of these points, up to the next one that misses the limit
            on the way to what would be better, is halved, so that as much is learned or kept as the limit allows; by
            default 3, and 0 where ``points`` gives the factors themselves.
        depth_groups: the number of stretches.
        exclude: globs of what is new, such as a head or a projector, and stays as trained at every point: it has no
            pretrained weights to go back to.
        every_n_epochs: look after every n-th epoch as well, and only log; the module trains on as it is.
        save: whether the chosen point is saved as ``walk_back.ckpt``, or a path to save it at.
        directory: a folder that keeps what trains as it was; in memory on the CPU, and in every checkpoint, if
            ``None``.

    Attributes:
        alpha: the chosen factor, or with several the factor of each group; ``None`` before.
        path: a dict for each point that was measured, by rising ``alpha``, with ``alpha``, ``factors``, ``monitor``,
            ``retention`` (of the half that chooses) and whether it is ``chosen``.
        report: of the half that reports, the retention of each probe at the chosen and at the trained point.
        checkpoint_path: where the chosen point was saved.

    Raises:
        TypeError: if an argument has the wrong type; when training starts, if a parameter that trains is quantized.
        ValueError: if an argument is out of range; when training starts, if there are no probes, a probe cannot be
            halved, ``exclude`` matches nothing that trains, the validation loop does not run, or the weights have
            trained already and no checkpoint says what they were; after a validation loop, if it has not logged
            ``monitor``. The trained weights are then in the module.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from kappa_lightning import AccuracyProbe
        >>> model, images = BoringModel(), torch.randn(2, 8, 32)
        >>> probe = AccuracyProbe([(x, model(x).argmax(-1)) for x in images])
        >>> walk_back = WalkBack(min_retention=0.5, monitor=probe, probes={"old task": probe}, points=3, save=False)
        >>> trainer = Trainer(
        ...     callbacks=[walk_back], max_epochs=1, limit_train_batches=1, logger=False, accelerator="cpu",
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(model)
        >>> [point["alpha"] for point in walk_back.path]
        [0.0, 0.5, 1.0]
    """

    def __init__(
        self,
        min_retention: float | None = None,
        monitor: str | Probe = "val_loss",
        mode: str = "min",
        *,
        monitor_limit: float | None = None,
        probes: Mapping[str, Probe] | None = None,
        along: Along = "all",
        points: int | Sequence[float] = 11,
        bisections: int | None = None,
        depth_groups: int = 3,
        exclude: Sequence[str] = (),
        every_n_epochs: int | None = None,
        save: bool | str | os.PathLike[str] = True,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r} must be 'min' or 'max', the direction in which the monitor is better")
        if not isinstance(monitor, str | Probe):
            raise TypeError(f"monitor is a {type(monitor).__name__}: give the name of a logged metric, or a Probe")
        if probes is not None and not (
            isinstance(probes, Mapping) and probes and all(isinstance(probe, Probe) for probe in probes.values())
        ):
            raise TypeError("probes must be a dict of at least one name to a Probe")
        for argument, value in (("depth_groups", depth_groups), ("every_n_epochs", every_n_epochs)):
            if value is not None:
                as_count(value, argument)
        if along not in get_args(Along):
            raise ValueError(f"along={along!r} is unknown: use one of {', '.join(map(repr, get_args(Along)))}")
        higher = monitor.higher_is_better if isinstance(monitor, Probe) else mode == "max"
        self.goal = Goal(min_retention, monitor_limit, higher)
        self.monitor = monitor
        self.probes = None if probes is None else dict(probes)
        self.along = along
        self.points = check_points(points)
        self.bisections = check_bisections(bisections, points)
        self.depth_groups = depth_groups
        self.exclude = check_patterns(exclude, argument="exclude")
        self.every_n_epochs = every_n_epochs
        self.save = save
        self.alpha: float | dict[str, float] | None = None
        self.path: list[dict[str, Any]] = []
        self.report: dict[str, dict[str, float]] = {}
        self.checkpoint_path: Path | None = None
        self._keeper = PretrainedKeeper("WalkBack", directory)
        self._halved: HalvedProbes | None = None
        self._walked = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.refuse_equals(trainer, "and one fit ends at one point", "give one of them all probes")
        adapter_for(trainer)  # which refuses a strategy before it has moved or wrapped anything
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        behind = callbacks[callbacks.index(self) + 1 :]
        averaging = next((other for other in behind if isinstance(other, WeightAveraging)), None)
        if averaging is not None:
            raise ValueError(
                f"{type(averaging).__name__} stands behind WalkBack, and would put its averages in the place of the "
                "point that was chosen: list it first"
            )
        self._keeper.runs.announced()
        self._walked = False

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._keeper.runs.opened(checkpoint)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(self.monitor, str) and not trainer.enable_validation:
            raise ValueError(
                f"monitor={self.monitor!r} is measured by the validation loop, and none runs: give validation data, "
                "or a Probe as monitor"
            )
        self._halved = HalvedProbes(*self._probes(trainer), partial(evaluate, trainer, pl_module))
        # By now a checkpoint is restored under every strategy, and whoever freezes has frozen.
        self._keeper.take(trainer, pl_module, "cpu")
        assert self._keeper.state is not None
        walked(self._keeper.state, self.exclude)  # which refuses a glob that matches nothing, before training

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A wrong name should not show only when hours of training are over.
        if isinstance(self.monitor, str) and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            require_logged(self.monitor, trainer.callback_metrics)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # What was unfrozen since has not moved yet.
        assert self._keeper.state is not None
        self._keeper.state.add(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            assert self._keeper.state is not None
            self._keeper.state.add(pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        ends = trainer.max_epochs is not None and epoch == trainer.max_epochs
        if (
            self.every_n_epochs is not None
            and epoch % self.every_n_epochs == 0
            and not ends
            and not trainer.should_stop
        ):
            self._walk(trainer, pl_module, stay=False)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._walk(trainer, pl_module, stay=True)
        self._walked = True

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keeper.runs.fit_ended()
        if not self._walked:
            # Lightning then skips everything from on_train_start to on_train_end.
            rank_zero_warn(
                "WalkBack: this fit had nothing left to train, so it did not look for a point, and the module's "
                "weights are those that it began with: to walk back from a checkpoint of the end of training, raise "
                "the Trainer's max_epochs or max_steps, or use kappa-lightning walk-back BASE TRAINED"
            )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._keeper.runs.ended()
        self._halved = None

    @override
    def state_dict(self) -> dict[str, Any]:
        pretrained = self._keeper.state_dict()
        return self._keeper.runs.to_save() if pretrained is None else {"pretrained": pretrained}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning calls this for validate, test and predict, too; only a fit takes it over.
        self._keeper.runs.loaded(state_dict)

    def __repr__(self) -> str:
        shown = {
            "min_retention": self.goal.min_retention,
            "monitor": self.monitor,
            "probes": self.probes,
            "along": self.along,
            "points": self.points,
            "bisections": self.bisections,
            "every_n_epochs": self.every_n_epochs,
        }
        return f"WalkBack({', '.join(f'{name}={value!r}' for name, value in shown.items() if value is not None)})"

    def __getstate__(self) -> dict[str, Any]:
        # What refers to one process' objects stays out of a copy and of what a spawned process gets.
        return self.__dict__ | {"_halved": None}

    def _probes(self, trainer: pl.Trainer) -> tuple[dict[str, Probe], bool]:
        """The probes by name, and whether somebody else has begun their baselines."""
        if self.probes is not None:
            return self.probes, False
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = {
            name: probe
            for callback in callbacks
            if isinstance(callback, ForgettingEval)
            for name, probe in callback.probes.items()
        }
        if not found:
            raise ValueError("WalkBack has no probes: give it some, or a ForgettingEval to the Trainer")
        return found, True

    def _walk(self, trainer: pl.Trainer, module: pl.LightningModule, stay: bool) -> None:
        assert self._keeper.state is not None
        assert self._halved is not None
        adapter_for(trainer).settle(module)
        path = WalkPath(module, self._keeper.state, self.along, depth_groups=self.depth_groups, exclude=self.exclude)
        arrived = False
        try:
            points = self._measured(trainer, module, path, self._halved)
            best = self.goal.best(points)
            path.go_to(0.0)
            self._halved.begin_report()
            reports = {}
            for label, factors in (("trained", dict.fromkeys(path.groups, 1.0)), ("chosen", best.factors)):
                path.go_to(factors)
                reports[label] = self._halved.report()
            if stay and isinstance(self.monitor, str):
                # Leaves the validation's figures at this point for whoever reads them after fit.
                validated(trainer, self.monitor, keep=True)
            arrived = stay
        finally:
            if not arrived:
                path.go_to(1.0)
        self.alpha = best.alpha if len(path.groups) == 1 else dict(best.factors)
        self.path = [
            {**point.record(), "chosen": point is best} for point in sorted(points, key=lambda point: point.alpha)
        ]
        self.report = reports
        self._show(trainer, points, best)
        if stay and self.save and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.checkpoint_path = self._file(trainer)
            trainer.save_checkpoint(self.checkpoint_path, weights_only=False)

    def _measured(
        self, trainer: pl.Trainer, module: pl.LightningModule, path: WalkPath, probes: HalvedProbes
    ) -> list[Point]:
        # At the pretrained end first, where retention has its measure.
        path.go_to(0.0)
        probes.begin_choice()

        def measure(factors: Mapping[str, float]) -> Point:
            path.go_to(factors)
            adapter_for(trainer).settle(module)
            if isinstance(self.monitor, str):
                monitor = validated(trainer, self.monitor)
            else:
                monitor = evaluate(trainer, module, "monitor", self.monitor)
            return Point(dict(factors), monitor, probes.choice())

        points, bisections = self.points, self.bisections
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            points, bisections = (0.0, 1.0), 0
        steps = search(measure, self.goal, path.groups, points, bisections)
        total = num_points(len(path.groups), len(points), bisections)
        return list(track(trainer, steps, total=total, description="Walking back", unit="point"))

    def _show(self, trainer: pl.Trainer, points: Sequence[Point], best: Point) -> None:
        name = self.monitor if isinstance(self.monitor, str) else self.monitor.name
        retention = self.report["chosen"]
        scalars = {
            "walk_back/alpha": best.alpha,
            "walk_back/monitor": best.monitor,
            "walk_back/retention": min(retention.values()),
            **{f"walk_back/{probe}/retention": value for probe, value in retention.items()},
        }
        if len(best.factors) > 1:
            scalars |= {f"walk_back/alpha/{group}": factor for group, factor in best.factors.items()}
        log_scalars(trainer, scalars)
        if shows_pictures(trainer):
            from kappa_lightning.anchoring.figure import walk_figure  # Matplotlib takes about a second to import

            log_figure(trainer, "walk_back/path", walk_figure(points, best, self.report, self.goal, monitor=name))
        if not trainer.barebones:
            rank_zero_info(walk_table(points, best, self.report, self.goal, monitor=name))
        if not self.goal.is_met(best):
            rank_zero_warn(
                f"WalkBack: no point of the way has {self.goal}; the one that comes nearest is alpha={best.alpha:.6g} "
                f"with retention {best.lowest_retention:.4f} and {name} {best.monitor:.4g}"
            )

    def _file(self, trainer: pl.Trainer) -> Path:
        if not isinstance(self.save, bool):
            return Path(self.save)
        callback = trainer.checkpoint_callback
        folder = callback.dirpath if isinstance(callback, ModelCheckpoint) and callback.dirpath else trainer.log_dir
        return Path(trainer.strategy.broadcast(str(folder or trainer.default_root_dir))) / "walk_back.ckpt"

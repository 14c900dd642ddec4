"""Watch how the condition numbers drift while a model trains."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from kappa_lightning.callbacks.drift import drift, drift_charts, quantiles_by_role
from kappa_lightning.callbacks.expert_strips import ExpertKappas, experts_that_train
from kappa_lightning.callbacks.freeze import KappaFreezeCallback
from kappa_lightning.callbacks.freezing import FreezeCallback
from kappa_lightning.callbacks.keyed import Keyed
from kappa_lightning.callbacks.progress import watching
from kappa_lightning.callbacks.reporting import (
    has_folder,
    log_figure,
    log_layout,
    log_scalars,
    publish,
    save_figure,
    shows_pictures,
)
from kappa_lightning.callbacks.resume import Runs, Start
from kappa_lightning.callbacks.schedule import Schedule
from kappa_lightning.callbacks.state import figures_in
from kappa_lightning.callbacks.trainer import batch_limit, callbacks_of, has_trained
from kappa_lightning.profile import KappaProfile
from kappa_lightning.profile.settings import ProfileSettings
from kappa_lightning.strategies import adapter_for
from kappa_lightning.weights import Weight, find_weights, match_parameters

MOST_SCALARS = 40
"""Tensors that have a card each; more are not looked through."""
_FURTHEST = 5


class KappaMonitor(Keyed):
    """Log the condition number κ of tensors at fit start and after every n-th epoch or optimizer step, and its drift.

    Logged at the trainer's global step, to every logger, and visible to ``ModelCheckpoint`` and ``EarlyStopping``:

    - ``kappa/<tensor>``: κ now;
    - ``kappa_drift/<tensor>``: log10 of κ now over κ at fit start, so +1 is ten times as ill-conditioned;
    - ``kappa/median``: the median κ of the tensors;
    - ``kappa_drift/max`` and ``kappa_drift/min``: the largest and the smallest drift.

    Several in one Trainer share the tags of tensors that more than one of them watches; the median and the extremes of
    one that watches others than the first in the list have its ``tensors`` in their tags, as ``kappa/all/median``.
    Two with the same ``tensors`` and schedule would be one and the same, and are refused.

    Of more than 40 tensors only a CSV file and ``history`` hold all. Other loggers get quantiles by role
    (``kappa/by_role/<role>/p10``, ``p50``, ``p90``, and the same of ``kappa_drift``) and the scalars of the tensors
    that drifted furthest, unless ``scalars="all"``.

    With ``figures`` and a logger that takes pictures, ``kappa/drift`` shows the drift over the steps, with the tensors
    named that drifted furthest, and ``kappa/drift_map`` that of more than 40 tensors by layer and role. Where a layer
    has experts, ``kappa/experts`` shows the κ of each as a strip, with a dot on those that train; the last one is also
    written as ``kappa-experts.png`` into the folder of the logger.

    Beside a :class:`KappaFreezeCallback` its profile serves as the figures at fit start. A frozen tensor is not
    decomposed again. The figures at fit start survive a resume. No weight is changed. With
    ``Trainer(barebones=True)``, which turns logging off, nothing is computed.

    Args:
        every_n_epochs: the number of epochs between figures; by default 1, or none with ``every_n_train_steps``.
        tensors: ``"trainable"``, ``"all"``, or globs over parameter names and groups such as ``["@attention"]``.
        figures: whether to draw.
        every_n_train_steps: the number of optimizer steps (``Trainer.global_step``) between figures.
        scalars: whether each of more than 40 tensors has its scalars in loggers that show a card for each (``"all"``).

    Attributes:
        baseline: κ of each tensor at fit start.
        history: for each time, a dict of ``epoch`` (epochs completed), ``step`` (global step) and ``kappa``, the κ of
            each tensor.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if ``every_n_epochs`` is below 1; at the start of training, if a pattern matches no parameter,
            there is no matrix to watch, a weight has NaN or infinite entries, or another monitor is its equal.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> monitor = KappaMonitor()
        >>> trainer = Trainer(
        ...     callbacks=[monitor], fast_dev_run=True, accelerator="cpu", enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> [record["step"] for record in monitor.history], list(monitor.baseline)
        ([0, 1], ['layer.weight'])
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        tensors: str | Sequence[str] = "trainable",
        figures: bool = True,
        *,
        every_n_train_steps: int | None = None,
        scalars: Literal["auto", "all"] = "auto",
    ) -> None:
        super().__init__()
        self.schedule = Schedule(every_n_epochs, every_n_train_steps)
        self.every_n_epochs = self.schedule.every_n_epochs
        self.every_n_train_steps = self.schedule.every_n_train_steps
        if isinstance(tensors, str) and tensors not in ("trainable", "all"):
            raise ValueError(
                f'tensors={tensors!r} must be "trainable", "all" or a list of globs, such as [{tensors!r}]'
            )
        self.tensors: str | tuple[str, ...] = tensors if isinstance(tensors, str) else tuple(tensors)
        if scalars not in ("auto", "all"):
            raise ValueError(f'scalars={scalars!r} must be "auto" or "all"')
        self.figures = figures
        self.scalars = scalars
        self._followed: set[str] = set()
        self.baseline: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self._weights: dict[str, Weight] = {}
        self._moved: set[str] = set()
        self._logged: tuple[int, set[str]] = (-1, set())
        self._step = 0
        self._settings = ProfileSettings()
        self._experts = ExpertKappas()
        self._runs = Runs()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            adapter_for(trainer)  # which refuses a strategy before it has moved or wrapped anything
            remedy = "give it other tensors, every_n_epochs or every_n_train_steps"
            self.refuse_equals(trainer, "which would measure and log the same", remedy)
            self._runs.announced()

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Called before load_state_dict, and also if the checkpoint has no state of this callback.
        self._runs.opened(checkpoint)
        self._runs.loaded(figures_in(checkpoint, self, None) or {})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.barebones:
            return
        adapter_for(trainer).settle(pl_module)
        # Not on_fit_start: by now every callback has frozen what it freezes, whatever their order.
        self._weights = {weight.name: weight for weight in self._watched(pl_module)}
        self._moved = set()
        self._logged = (-1, set())
        self._step = trainer.global_step
        start = self._runs.start(trainer, pl_module, trainer.ckpt_path)
        if start is Start.RESUMED:
            saved = self._runs.state
            assert saved is not None
            self.baseline, self.history = dict(saved["baseline"]), list(saved["history"])
            self._moved = {name for name in saved.get("moved", ()) if name in self._weights}
            self._experts.load(saved.get("experts", {}))
        elif start is not Start.CONTINUED:
            self.baseline, self.history = {}, []
            self._experts = ExpertKappas()
        self._experts.watch(pl_module, self._weights)
        self._runs.begun(pl_module)
        known = _profile_at_start(trainer)
        if known is not None:
            # Computed in another way, κ would seem to have drifted.
            self._settings = known.settings
        if self.history:
            # Already logged before the interruption; the callbacks that monitor a metric have not seen it in this run.
            publish(trainer, self._scalars(trainer, self.history[-1]["kappa"]))
            if self.schedule.missed_step(self.history[-1]["step"], self._step):
                self._update(trainer, trainer.current_epoch)
            return
        if not has_trained(trainer):
            self.baseline = self._measure(trainer, self._weights, known)
            self._record(trainer, self.baseline, epoch=trainer.current_epoch)
            return
        kappas = self._measure(trainer, self._weights)
        self.baseline = {name: known[name].kappa if known and name in known else kappas[name] for name in kappas}
        late = [name for name in kappas if known is None or name not in known]
        if late:
            rank_zero_warn(
                f"this run starts with trained weights and without figures of KappaMonitor: the drift of {len(late)} "
                f"tensor(s), {late[0]} first, is relative to those weights"
            )
        self._record(trainer, kappas, epoch=trainer.current_epoch)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # Here and not at the epoch's end: another callback may thaw a tensor for a part of it only.
        self._note_moving()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.barebones:
            return
        # A bare optimizer of manual optimization steps without Lightning's hook.
        self._note_moving()
        if self.schedule.passes_step(self._step, trainer.global_step):
            self._update(trainer, trainer.current_epoch)
        self._step = trainer.global_step

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if trainer.barebones or not self.schedule.ends_epoch(epoch) or self.history[-1]["epoch"] == epoch:
            return
        if self.schedule.every_n_train_steps is None or self.history[-1]["step"] != trainer.global_step:
            self._update(trainer, epoch)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A callback that outlives the fit must not keep the model in memory.
        self._weights = {}
        if self.figures and has_folder(trainer) and batch_limit(trainer) is None and not self._label(trainer):
            self._draw_experts(trainer, to_file=True)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._runs.fit_ended()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._weights = {}
        self._runs.ended()

    @property
    @override
    def own_key(self) -> str:
        # The arguments, so that several in one Trainer have several; a resume with others looks for its tensors.
        return self._generate_state_key(
            tensors=self.tensors,
            every_n_epochs=self.schedule.every_n_epochs,
            every_n_train_steps=self.schedule.every_n_train_steps,
        )

    def __repr__(self) -> str:
        shown = {
            "every_n_epochs": self.schedule.every_n_epochs,
            "every_n_train_steps": self.schedule.every_n_train_steps,
            "tensors": self.tensors if isinstance(self.tensors, str) else list(self.tensors),
            "figures": self.figures,
        }
        return f"KappaMonitor({', '.join(f'{name}={value!r}' for name, value in shown.items() if value is not None)})"

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._runs.announced_only or not self.baseline:
            return self._runs.to_save()
        # What has moved since the last figure and may be frozen again by now is not told by the model.
        state = {"baseline": dict(self.baseline), "history": list(self.history), "moved": sorted(self._moved)}
        return state | ({"experts": self._experts.state()} if self._experts.fused else {})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning calls this for validate, test and predict, too; only a fit takes it over.
        self._runs.loaded(state_dict or self._runs.state or {})

    def __getstate__(self) -> dict[str, Any]:
        # What refers to one process' objects stays out of a copy and of what a spawned process gets.
        return self.__dict__ | {"_weights": {}}

    def _note_moving(self) -> None:
        self._moved.update(
            name for name, weight in self._weights.items() if name not in self._moved and weight.is_trainable
        )

    def _update(self, trainer: pl.Trainer, epoch: int) -> None:
        last = self.history[-1]["kappa"]
        kappas = {name: last[name] for name in self._weights if name in last}
        moved = {name: weight for name, weight in self._weights.items() if name in self._moved or name not in last}
        self._moved = set()
        kappas.update(self._measure(trainer, moved))
        self._record(trainer, kappas, epoch)

    def _watched(self, module: pl.LightningModule) -> list[Weight]:
        weights = find_weights(module)
        if self.tensors == "trainable":
            weights = [weight for weight in weights if weight.is_trainable]
        elif not isinstance(self.tensors, str):
            wanted = match_parameters(module, self.tensors, argument="tensors")
            weights = [weight for weight in weights if weight.name in wanted]
        if not weights:
            raise ValueError(f"KappaMonitor(tensors={self.tensors!r}) finds no matrix to watch in this model")
        return weights

    def _measure(
        self, trainer: pl.Trainer, weights: Mapping[str, Weight], known: KappaProfile | None = None
    ) -> dict[str, float]:
        kappas = {} if known is None else self._experts.known(known, weights)
        pending = [weight for name, weight in weights.items() if name not in kappas]
        profile = KappaProfile.from_weights(
            pending,
            self._settings,
            device=trainer.strategy.root_device,
            watch=watching(trainer),
            processes=adapter_for(trainer).processes(trainer),
        )
        for row in profile:
            kappas[row.name] = row.kappa
            self._experts.note(row)
        return {name: kappas[name] for name in weights}

    def _record(self, trainer: pl.Trainer, kappas: Mapping[str, float], epoch: int) -> None:
        self.history.append({"epoch": epoch, "step": trainer.global_step, "kappa": dict(kappas)})
        scalars = self._scalars(trainer, kappas)
        # What two monitors watch has one tag, and one value at a step.
        known = {tag for other in self._others(trainer) for tag in other.logged_at(trainer.global_step)}
        self._logged = (trainer.global_step, set(scalars))
        shown = self._shown(trainer, kappas, scalars)
        log_scalars(
            trainer,
            {tag: value for tag, value in scalars.items() if tag not in known},
            shown={tag: value for tag, value in shown.items() if tag not in known},
        )
        if not shows_pictures(trainer):
            return
        label = self._label(trainer)
        if len(self.history) == 1:
            log_layout(trainer, f"kappa{label}", drift_charts(label, shown))
        if self.figures:
            # Matplotlib takes about a second to import, which only a run that draws should pay.
            from kappa_lightning.callbacks.pictures import drift_lines, drift_map

            log_figure(trainer, f"kappa{label}/drift", drift_lines(self.baseline, self.history))
            if len(kappas) > MOST_SCALARS:
                log_figure(trainer, f"kappa{label}/drift_map", drift_map(self.baseline, kappas))
            self._draw_experts(trainer)

    def _draw_experts(self, trainer: pl.Trainer, *, to_file: bool = False) -> None:
        strips = self._experts.strips(self.history[-1]["kappa"]) if self.history else {}
        if strips:
            from kappa_lightning.callbacks.pictures import expert_strips

            names = [name for freeze in callbacks_of(trainer, FreezeCallback) for name in freeze.trained_names]
            figure = expert_strips(strips, experts_that_train(names))
            if to_file:
                save_figure(trainer, "kappa-experts", figure)
            else:
                log_figure(trainer, f"kappa{self._label(trainer)}/experts", figure)

    def _shown(
        self, trainer: pl.Trainer, kappas: Mapping[str, float], scalars: Mapping[str, float]
    ) -> Mapping[str, float]:
        """What gets a card of its own: all, or of many tensors the quantiles by role and those furthest off."""
        if self.scalars == "all" or len(kappas) <= MOST_SCALARS:
            return scalars
        label = self._label(trainer)
        drifts = {name: scalars[f"kappa_drift/{name}"] for name in kappas}
        # Once among the furthest, a tensor is followed to the end of the run.
        furthest = sorted(drifts, key=lambda name: -abs(drifts[name]))[:_FURTHEST]
        self._followed |= {name for name in furthest if drifts[name] != 0}
        tensors = {
            f"{kind}/{name}" for name in kappas if name not in self._followed for kind in ("kappa", "kappa_drift")
        }
        shown = {tag: value for tag, value in scalars.items() if tag not in tensors}
        return shown | quantiles_by_role(kappas, f"kappa{label}") | quantiles_by_role(drifts, f"kappa_drift{label}")

    def logged_at(self, step: int) -> set[str]:
        """The tags that it has logged at a global step, if that is the last at which it did."""
        return self._logged[1] if self._logged[0] == step else set()

    def _others(self, trainer: pl.Trainer) -> list[KappaMonitor]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return [other for other in callbacks if isinstance(other, KappaMonitor) and other is not self]

    def _label(self, trainer: pl.Trainer) -> str:
        """What tells its median and extremes from those of other tensors: nothing for the first of the monitors."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        first = next(other for other in callbacks if isinstance(other, KappaMonitor))
        if first.tensors == self.tensors:
            return ""
        return "/" + (self.tensors if isinstance(self.tensors, str) else " ".join(self.tensors))

    def _scalars(self, trainer: pl.Trainer, kappas: Mapping[str, float]) -> dict[str, float]:
        label = self._label(trainer)
        drifts = {name: drift(self.baseline.setdefault(name, kappa), kappa) for name, kappa in kappas.items()}
        return {
            **{f"kappa/{name}": kappa for name, kappa in kappas.items()},
            **{f"kappa_drift/{name}": value for name, value in drifts.items()},
            f"kappa{label}/median": statistics.median(kappas.values()),
            f"kappa_drift{label}/max": max(drifts.values()),
            f"kappa_drift{label}/min": min(drifts.values()),
        }


def _profile_at_start(trainer: pl.Trainer) -> KappaProfile | None:
    """The profile that a freeze callback made of the weights before their first step."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    profiles = [callback.profile for callback in callbacks if isinstance(callback, KappaFreezeCallback)]
    return profiles[0] if profiles else None

"""Watch how the condition numbers drift while a model trains."""

from __future__ import annotations

import math
import statistics
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import override

from kappa_lightning.callbacks.freeze import KappaFreezeCallback
from kappa_lightning.callbacks.progress import watching
from kappa_lightning.callbacks.reporting import log_figure, log_scalars, publish, shows_pictures
from kappa_lightning.profile import KappaProfile
from kappa_lightning.profile.settings import ProfileSettings
from kappa_lightning.strategies import adapter_for
from kappa_lightning.weights import Weight, find_weights, match_parameters


class KappaMonitor(Callback):
    """Log the condition number κ of tensors at fit start and after every n-th epoch, and how far it has drifted.

    Logged at the trainer's global step, to every logger, and visible to ``ModelCheckpoint`` and ``EarlyStopping``:

    - ``kappa/<tensor>``: κ now;
    - ``kappa_drift/<tensor>``: log10 of κ now over κ at fit start, so +1 is ten times as ill-conditioned;
    - ``kappa/median``: the median κ of the tensors;
    - ``kappa_drift/max`` and ``kappa_drift/min``: the largest and the smallest drift.

    With a TensorBoard logger and ``figures``, the picture ``kappa/drift`` shows κ against its value at fit start and
    the drift over the epochs.

    Beside a :class:`KappaFreezeCallback` its profile serves as the figures at fit start. A frozen tensor is not
    decomposed again. The figures at fit start survive a resume. No weight is changed. With
    ``Trainer(barebones=True)``, which turns logging off, nothing is computed.

    Args:
        every_n_epochs: the number of epochs between figures.
        tensors: ``"trainable"``, ``"all"``, or globs over parameter names and groups such as ``["@attention"]``.
        figures: whether to draw.

    Attributes:
        baseline: κ of each tensor at fit start.
        history: for each time, a dict of ``epoch`` (epochs completed), ``step`` (global step) and ``kappa``, the κ of
            each tensor.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if ``every_n_epochs`` is below 1; at the start of training, if a pattern matches no parameter,
            there is no matrix to watch, or a weight has NaN or infinite entries.

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
        self, every_n_epochs: int = 1, tensors: str | Sequence[str] = "trainable", figures: bool = True
    ) -> None:
        super().__init__()
        if isinstance(every_n_epochs, bool) or not isinstance(every_n_epochs, int) or every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs!r} must be an int of at least 1")
        if isinstance(tensors, str) and tensors not in ("trainable", "all"):
            raise ValueError(
                f'tensors={tensors!r} must be "trainable", "all" or a list of globs, such as [{tensors!r}]'
            )
        self.every_n_epochs = every_n_epochs
        self.tensors: str | tuple[str, ...] = tensors if isinstance(tensors, str) else tuple(tensors)
        self.figures = figures
        self.baseline: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self._weights: dict[str, Weight] = {}
        self._trained: set[str] = set()
        self._settings = ProfileSettings()
        self._restored: dict[str, Any] | None = None
        self._module: weakref.ref[nn.Module] | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            adapter_for(trainer)  # which refuses a strategy before it has moved or wrapped anything

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Called before load_state_dict, and also if the checkpoint has no state of this callback.
        self._restored = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.barebones:
            return
        adapter_for(trainer).settle(pl_module)
        # Not on_fit_start: by now every callback has frozen what it freezes, whatever their order.
        self._weights = {weight.name: weight for weight in self._watched(pl_module)}
        self._trained = {name for name, weight in self._weights.items() if weight.is_trainable}
        resumed = trainer.ckpt_path is not None and self._restored is not None
        continued = trainer.global_step > 0 and self._module is not None and self._module() is pl_module
        if self._restored is not None and resumed:
            self.baseline, self.history = dict(self._restored["baseline"]), list(self._restored["history"])
        elif not continued:
            self.baseline, self.history = {}, []
        self._restored = None
        self._module = weakref.ref(pl_module)
        known = _profile_at_start(trainer)
        if known is not None:
            # Computed in another way, κ would seem to have drifted.
            self._settings = known.settings
        if self.history:
            # Already logged before the interruption; the callbacks that monitor a metric have not seen it in this run.
            publish(trainer, self._scalars(self.history[-1]["kappa"]))
            return
        if trainer.global_step == 0:
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
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.barebones or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        if self.history[-1]["epoch"] == trainer.current_epoch + 1:
            return
        trained = {name for name, weight in self._weights.items() if weight.is_trainable}
        # One that another callback froze meanwhile has changed since its last figure, too.
        moving = {name: self._weights[name] for name in self._weights if name in trained | self._trained}
        self._trained = trained
        last = self.history[-1]["kappa"]
        kappas = {name: last[name] for name in self._weights if name in last}
        moving |= {name: weight for name, weight in self._weights.items() if name not in last}
        kappas.update(self._measure(trainer, moving))
        self._record(trainer, kappas, epoch=trainer.current_epoch + 1)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A callback that outlives the fit must not keep the model in memory.
        self._weights = {}

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._weights = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"baseline": dict(self.baseline), "history": list(self.history)} if self.baseline else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning calls this for validate, test and predict, too; only a fit takes it over.
        self._restored = state_dict or None

    def __getstate__(self) -> dict[str, Any]:
        # What refers to one process' objects stays out of a copy and of what a spawned process gets.
        return self.__dict__ | {"_module": None, "_weights": {}}

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
        kappas = {name: known[name].kappa for name in weights if known is not None and name in known}
        pending = [weight for name, weight in weights.items() if name not in kappas]
        profile = KappaProfile.from_weights(
            pending,
            self._settings,
            device=trainer.strategy.root_device,
            watch=watching(trainer),
            processes=adapter_for(trainer).processes(trainer),
        )
        kappas |= {row.name: row.kappa for row in profile}
        return {name: kappas[name] for name in weights}

    def _record(self, trainer: pl.Trainer, kappas: Mapping[str, float], epoch: int) -> None:
        self.history.append({"epoch": epoch, "step": trainer.global_step, "kappa": dict(kappas)})
        log_scalars(trainer, self._scalars(kappas))
        if self.figures and shows_pictures(trainer):
            # Matplotlib takes about a second to import, which only a run that draws should pay.
            from kappa_lightning.figures import drift_figure

            log_figure(trainer, "kappa/drift", drift_figure(self.baseline, self.history))

    def _scalars(self, kappas: Mapping[str, float]) -> dict[str, float]:
        drifts = {name: drift(self.baseline.setdefault(name, kappa), kappa) for name, kappa in kappas.items()}
        return {
            **{f"kappa/{name}": kappa for name, kappa in kappas.items()},
            **{f"kappa_drift/{name}": value for name, value in drifts.items()},
            "kappa/median": statistics.median(kappas.values()),
            "kappa_drift/max": max(drifts.values()),
            "kappa_drift/min": min(drifts.values()),
        }


def drift(before: float, now: float) -> float:
    """log10(κ now / κ before); 0 if both are infinite, ±∞ if one is.

    Example:
        >>> drift(10.0, 1000.0), drift(float("inf"), float("inf")), drift(float("inf"), 10.0)
        (2.0, 0.0, -inf)
    """
    if math.isinf(before) or math.isinf(now):
        return 0.0 if before == now else math.copysign(math.inf, now - before)
    return math.log10(now / before)


def _profile_at_start(trainer: pl.Trainer) -> KappaProfile | None:
    """The profile that a freeze callback made of the weights before their first step."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    profiles = [callback.profile for callback in callbacks if isinstance(callback, KappaFreezeCallback)]
    return profiles[0] if profiles else None

"""Measure what a model could do before fine-tuning and still can."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from kappa_lightning.arguments import as_bool
from kappa_lightning.callbacks.breach import JudgedBy, Limit, OnBreach
from kappa_lightning.callbacks.keyed import Keyed
from kappa_lightning.callbacks.measures import NO_BASELINE, Measures
from kappa_lightning.callbacks.order import move_before
from kappa_lightning.callbacks.reporting import (
    has_folder,
    log_figure,
    log_layout,
    log_scalars,
    log_text,
    publish,
    save_figure,
    shows_pictures,
)
from kappa_lightning.callbacks.resume import Runs, Start
from kappa_lightning.callbacks.retention import retention_charts
from kappa_lightning.callbacks.schedule import Schedule, warn_of_stale_monitors
from kappa_lightning.callbacks.state import figures_in
from kappa_lightning.callbacks.story import Story
from kappa_lightning.callbacks.trainer import batch_limit, has_trained
from kappa_lightning.evaluation import Measurement
from kappa_lightning.probes import Probe
from kappa_lightning.strategies import adapter_for

Moment = Literal["start", "step", "epoch"]


class ForgettingEval(Keyed):
    """Measure retained capabilities before the first step and after every n-th epoch or optimizer step.

    The *retention* of a probe is its metric now over its metric before the first step, or the inverse where lower is
    better: 1 means that nothing is lost, more than 1 that the model got better at it. For perplexity it is
    exp(−Δ nats per token).

    Logged at the trainer's global step, to every logger, and visible to ``ModelCheckpoint(monitor=...)`` and
    ``EarlyStopping``, with and without a validation loop:

    - ``forgetting/<probe>/<metric>``: the metric, as the probe names it;
    - ``forgetting/<probe>/retention``: 1 is all;
    - ``forgetting/<probe>/forgetting``: 1 − retention;
    - ``forgetting/<probe>/retention_low`` and ``retention_high``: a 95 % interval of the retention by a paired
      bootstrap over samples (or batches, where the metric of a batch can't be taken apart), for metrics that are made
      of sums or lists;
    - ``forgetting/<probe>/above_chance``, for a probe that knows its chance level: (now − chance) over
      (baseline − chance);
    - ``forgetting/<probe>/nats``, for a perplexity: the loss in nats a token, ln(now / baseline);
    - ``forgetting/<probe>/recoverable``, with ``recoverable=k``: the retention after k steps back, on a copy;
    - ``forgetting/retention``: the mean retention over all probes, those of the Trainer's other ForgettingEvals
      included, each with its latest figure.

    An evaluation runs in eval mode, without gradients and under the Trainer's precision, and leaves modes, random
    number generators, gradients and BatchNorm statistics as they were. Where the epoch ends with a validation loop it
    runs with it, so that a checkpoint saved there sees the new figures; a run that validates by steps instead of by
    epochs (``check_val_every_n_epoch=None``) is evaluated with every validation. Beside ``WeightAveraging``, and with a
    validation loop, it measures the averaged weights, which are those that a checkpoint holds. Several processes share
    the batches, each of which counts once.

    Several in one Trainer, such as one with a cheap probe often and one with a dear probe seldom, need other names for
    their probes. With ``every_n_train_steps`` it measures as soon as that many optimizer steps are done, accumulated
    batches counting as one, so that ``ModelCheckpoint(every_n_train_steps=...)`` sees the figures of its step.

    With adapters in the module (PEFT, or a parametrization with parameters on a frozen tensor) the baseline is measured
    with the adapters off. If they are not the identity at the start, that is warned of.

    What is lost may only be out of line: features that are still there, and a last layer that no longer uses them
    (Zheng et al., *Spurious Forgetting in Continual Learning of Language Models*, arXiv 2501.13453). With
    ``recoverable=k`` each evaluation takes k steps on copies of the parameters that train (under FSDP2 and tensor
    parallelism, and of single experts or heads, on these themselves, which are then put back bit for bit), one on each
    of the probe's first k batches, in eval mode, with optimizers of the kinds, the settings and the initial rates of
    the module's own, and measures the probe's other batches again. What comes back was never lost. The figure before
    the first step tells what such steps do to a model that has lost nothing. The run itself goes on bit for bit as
    without. It costs k forward and backward passes and a second pass over the probe for each evaluation, and the memory
    of another copy of what trains with its gradients and its optimizer's state.

    The baseline survives a resume and a second fit of the same module, and is never measured on trained weights. With
    ``fast_dev_run`` each probe reads as many batches as the other loops, and its figures are not judged.

    Args:
        probes: the probes by name, which appears in the tags.
        every_n_epochs: the number of epochs between evaluations; by default 1, or none with ``every_n_train_steps``.
        min_retention: the retention below which no probe may fall.
        on_breach: what happens if one does: ``"stop"`` ends the training after this epoch or step, ``"warn"`` only
            warns, ``"raise"`` raises a RuntimeError.
        every_n_train_steps: the number of optimizer steps (``Trainer.global_step``) between evaluations.
        judged_by: what may not fall below ``min_retention``: the ``"retention"`` itself, or ``"retention_low"``, the
            lower end of its interval.
        recoverable: the number k of steps back; ``None`` takes none. Each probe needs a loss (those for accuracy,
            perplexity and agreement have one, others take ``loss=``), more than k batches and no shuffling.
        figures: whether to draw ``forgetting/story``, the retention of every probe with its interval over the training
            loss, for loggers that take pictures, and at the end as ``forgetting.png`` into the logger's folder.

    Attributes:
        baseline: each probe's metric before the first step.
        history: a dict for each evaluation, the one before the first step included, with ``epoch`` (epochs
            completed), ``step`` (global step) and the logged figures under their tags.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there is no probe or an argument is out of range; when training starts, if a probe's dataloader
            gives no batch, its metric is NaN or no scalar or has a baseline from which no ratio can be formed or
            that is no better than chance, or a resumed checkpoint has no baseline.
        RuntimeError: on a breach with ``on_breach="raise"``.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from kappa_lightning import AccuracyProbe
        >>> model, images = BoringModel(), torch.randn(8, 32)
        >>> probe = AccuracyProbe([(images, model(images).argmax(-1))])
        >>> callback = ForgettingEval({"old task": probe}, min_retention=0.5, on_breach="warn")
        >>> trainer = Trainer(
        ...     callbacks=[callback], max_epochs=2, limit_train_batches=1, logger=False, accelerator="cpu",
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(model)
        >>> callback.baseline, [record["epoch"] for record in callback.history]
        ({'old task': 1.0}, [0, 1, 2])
    """

    def __init__(
        self,
        probes: Mapping[str, Probe],
        every_n_epochs: int | None = None,
        min_retention: float | None = None,
        on_breach: OnBreach = "stop",
        *,
        every_n_train_steps: int | None = None,
        judged_by: JudgedBy = "retention",
        recoverable: int | None = None,
        figures: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(probes, Mapping):
            raise TypeError(
                f'probes is a {type(probes).__name__}: give a dict of names to probes, such as {{"text": …}}'
            )
        if not probes:
            raise ValueError("probes is empty: give at least one")
        for name, probe in probes.items():
            if not isinstance(name, str) or not name:
                raise TypeError(f"probes: the name {name!r} is not a non-empty string")
            if not isinstance(probe, Probe):
                raise TypeError(f"probes[{name!r}] is a {type(probe).__name__}, not a Probe")
        self.schedule = Schedule(every_n_epochs, every_n_train_steps)
        self.every_n_epochs = self.schedule.every_n_epochs
        self.every_n_train_steps = self.schedule.every_n_train_steps
        self.limit = Limit(min_retention, on_breach, judged_by)
        self.min_retention, self.on_breach, self.judged_by = self.limit.min_retention, on_breach, judged_by
        self.probes = dict(probes)
        self.figures = as_bool(figures, "figures")
        self.story = Story()
        self.history: list[dict[str, Any]] = []
        self._measures = Measures(self.probes, recoverable)
        self.recoverable = self._measures.recovery.steps
        self._runs = Runs()
        self._step = 0

    @property
    def baseline(self) -> dict[str, float]:
        """Each probe's metric before the first step."""
        return self._measures.baseline

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            adapter_for(trainer)  # which refuses a strategy before it has moved or wrapped anything
            # Whose averaged weights are in the module while validation runs, up to its own on_validation_epoch_end.
            move_before(trainer, self, WeightAveraging)
            self._require_distinct_probes(trainer)
            self._runs.announced()

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Called before load_state_dict, and also if the checkpoint has no state of this callback.
        self._runs.opened(checkpoint)
        self._runs.loaded(figures_in(checkpoint, self, self.probes) or {})

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        warn_of_stale_monitors(trainer, self.schedule)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaging = next((other for other in callbacks if isinstance(other, WeightAveraging)), None)
        by_steps = self.schedule.every_n_train_steps is not None
        if averaging is not None and (by_steps or not trainer.enable_validation):
            rank_zero_warn(
                f"ForgettingEval measures the weights that train, and {type(averaging).__name__} saves their averages: "
                "with a validation loop, during which the averages are in the module, those are measured"
                + (", but not by every_n_train_steps" if by_steps else "")
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = self._runs.start(trainer, pl_module, trainer.ckpt_path)
        if start is Start.RESUMED:
            self._resume(trainer)
        elif start is Start.WITHOUT_STATE:
            raise ValueError(
                NO_BASELINE.format(source=f"the checkpoint {trainer.ckpt_path}", probe=next(iter(self.probes)))
            )
        elif start is not Start.FRESH and self.baseline:
            # fit was called once more on a module that is trained by now. A new Trainer starts a new history.
            if start is Start.AGAIN:
                self.history = []
        elif start is not Start.FRESH or has_trained(trainer):
            raise ValueError(NO_BASELINE.format(source="the fit before this one", probe=next(iter(self.probes))))
        else:
            self._measures.forget()
            self.history, self.story = [], Story()
        self._step = trainer.global_step
        if self.history:
            # Already logged before the interruption; callbacks that monitor a metric have not seen it in this run.
            publish(trainer, _scalars(self.history[-1]))
            if self.schedule.missed_step(self.history[-1]["step"], self._step):
                self._evaluate(trainer, pl_module, trainer.current_epoch, "step")
        else:
            first = self._measures.begin(trainer, pl_module, self.limit)
            self._record(trainer, first, trainer.current_epoch, "start")
        self._runs.begun(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.story.note(trainer, outputs)
        if self._due_at_step(trainer):
            self._evaluate(trainer, pl_module, trainer.current_epoch, "step")
        self._step = trainer.global_step

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # ModelCheckpoint and EarlyStopping may look at the figures when validation ends, before on_train_epoch_end.
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._evaluate_epoch(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate_epoch(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        first = next(callback for callback in callbacks if isinstance(callback, ForgettingEval))
        # One picture a run, by the first of them; without a folder of a logger there is no place for it.
        if first is self and self.figures and has_folder(trainer) and batch_limit(trainer) is None:
            save_figure(trainer, "forgetting", self._drawn(trainer))

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._runs.fit_ended()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._runs.ended()

    @property
    @override
    def own_key(self) -> str:
        # By the probes, so that several in one Trainer have several; a resume with other probes looks for theirs.
        return self._generate_state_key(probes=sorted(self.probes))

    def __repr__(self) -> str:
        shown = {
            "probes": self.probes,
            "every_n_epochs": self.schedule.every_n_epochs,
            "every_n_train_steps": self.schedule.every_n_train_steps,
            "min_retention": self.min_retention,
            "recoverable": self.recoverable,
        }
        arguments = ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)
        return f"ForgettingEval({arguments}, on_breach={self.on_breach!r})"

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._runs.announced_only or not self.baseline:
            return self._runs.to_save()
        losses = [list(pair) for pair in self.story.losses()]
        return {**self._measures.state_dict(), "history": list(self.history), "losses": losses}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning calls this for validate, test and predict, too; only a fit takes it over.
        self._runs.loaded(state_dict or self._runs.state or {})

    def _resume(self, trainer: pl.Trainer) -> None:
        saved = self._runs.state
        assert saved is not None
        self._measures.resume(saved, f"the checkpoint {trainer.ckpt_path}")
        self.history = list(saved["history"])
        self.story = Story([(int(step), float(loss)) for step, loss in saved.get("losses", [])])

    def is_due(self, trainer: pl.Trainer, moment: Moment) -> bool:
        """Whether it will measure in this hook, whose turn has not come yet."""
        if moment == "step":
            return self._due_at_step(trainer)
        return moment == "start" or self._due_at_epoch(trainer) is not None

    def _due_at_step(self, trainer: pl.Trainer) -> bool:
        return self.schedule.passes_step(self._step, trainer.global_step)

    def _due_at_epoch(self, trainer: pl.Trainer) -> int | None:
        """The number of epochs after which it is due now, in the middle of one if it is counted by validations."""
        by_validations = trainer.check_val_every_n_epoch is None and trainer.validating
        at_epoch_end = trainer.is_last_batch or not trainer.validating
        epoch = trainer.current_epoch + int(at_epoch_end)
        if self.schedule.every_n_epochs is None or not (at_epoch_end or by_validations):
            return None
        if not (by_validations or self.schedule.ends_epoch(epoch)):
            return None
        # With a validation loop an epoch ends twice, in its last validation and in on_train_epoch_end.
        latest = self.history[-1]
        same = latest["step"] == trainer.global_step
        return None if same and (latest["epoch"] == epoch or self.schedule.every_n_train_steps is not None) else epoch

    def _evaluate_epoch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epoch = self._due_at_epoch(trainer)
        if epoch is not None:
            self._evaluate(trainer, module, epoch, "epoch")

    def _evaluate(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int, moment: Moment) -> None:
        self._record(trainer, self._measures.take(trainer, module), epoch, moment)
        if batch_limit(trainer) is None:
            by_epochs = self.schedule.every_n_train_steps is None
            when = f"after epoch {epoch}" if by_epochs else f"at step {trainer.global_step}"
            self.limit.judge(trainer, self.history[-1], self.probes, when)

    def _require_distinct_probes(self, trainer: pl.Trainer) -> None:
        for other in _others(trainer, self):
            shared = sorted(self.probes.keys() & other.probes.keys())
            if shared:
                raise ValueError(
                    f"two ForgettingEvals of this Trainer have a probe named {shared[0]!r}, and would log their "
                    "figures under the same tags: give it another name in one of them"
                )

    def _record(self, trainer: pl.Trainer, measured: Mapping[str, Measurement], epoch: int, moment: Moment) -> None:
        scalars = self._measures.figures(trainer, trainer.lightning_module, measured)
        retentions = [scalars[f"forgetting/{name}/retention"] for name in measured]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = _others(trainer, self)
        pending = [o for o in others if callbacks.index(o) > callbacks.index(self) and o.is_due(trainer, moment)]
        for other in others:
            known = other.history[-1] if other.history and not (other in pending and moment == "start") else {}
            retentions += [known.get(f"forgetting/{name}/retention", 1.0) for name in other.probes]
        scalars["forgetting/retention"] = statistics.fmean(retentions)
        self.history.append({"epoch": epoch, "step": trainer.global_step, **scalars})
        if pending:
            # The mean of this step is not complete before the last of them has measured, which logs it.
            publish(trainer, {"forgetting/retention": scalars.pop("forgetting/retention")})
        log_scalars(trainer, scalars)
        if moment == "start":
            log_layout(trainer, "forgetting", retention_charts([*self.probes, *(n for o in others for n in o.probes)]))
        elif not pending and self.figures and shows_pictures(trainer):
            log_figure(trainer, "forgetting/story", self._drawn(trainer))
        for name, probe in self.probes.items():
            text = probe.report()
            if text is not None:
                log_text(trainer, f"forgetting/{name}/samples", text)

    def _drawn(self, trainer: pl.Trainer) -> Any:
        # Matplotlib takes about a second to import, which only a run that draws should pay.
        from kappa_lightning.callbacks.pictures import story_figure

        every = [self, *_others(trainer, self)]
        histories = {name: callback.history for callback in every for name in callback.probes if callback.history}
        return story_figure(histories, self.story.losses(), self.min_retention)


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    return {tag: value for tag, value in record.items() if tag not in ("epoch", "step")}


def _others(trainer: pl.Trainer, callback: ForgettingEval) -> list[ForgettingEval]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [other for other in callbacks if isinstance(other, ForgettingEval) and other is not callback]

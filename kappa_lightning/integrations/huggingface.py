"""KappaTune in transformers' ``Trainer`` and those derived from it, such as trl's: a freeze and an evaluation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from kappa_lightning.callbacks.retention import require_ratios
from kappa_lightning.evaluation import Circumstances, Share, retention, run_probe
from kappa_lightning.integrations.freezing import Frozen, freeze
from kappa_lightning.probes import Probe
from kappa_lightning.processes import Processes


class KappaFreeze(TrainerCallback):
    """Freeze the tensors of high condition number when a ``Trainer`` is made, before it makes its optimizer.

    Args:
        arguments: those of :class:`~kappa_lightning.KappaFreezeCallback`.

    Attributes:
        frozen: what was chosen, with ``profile``, ``trained_names``, ``frozen_names`` and ``selected_names``; ``None``
            until a ``Trainer`` has the callback.

    Raises:
        TypeError: as in :class:`~kappa_lightning.KappaFreezeCallback`.
        ValueError: as in :class:`~kappa_lightning.KappaFreezeCallback`; when training begins, if the callback was added
            to a ``Trainer`` that had been made before, with ``add_callback``, or its model has been replaced since.

    A run that is resumed is given the pretrained weights again by the user's script, so it chooses the same as before.

    Example:
        >>> KappaFreeze(top_p=0.2, include=["@attention"]).frozen is None
        True
    """

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._module: nn.Module | None = None
        self.frozen: Frozen | None = None

    @override
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model: nn.Module = kwargs["model"]
        self.frozen = freeze(model, progress=not args.disable_tqdm, **self._arguments)
        self._module = model

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._module is not kwargs["model"]:
            raise ValueError(
                "KappaFreeze has not seen this model when its Trainer was made: give the callback to the Trainer "
                "itself, Trainer(callbacks=[KappaFreeze(…)]), and the model as an object instead of model_init"
            )


class Retention(TrainerCallback):
    """Measure what a model could do before, with every evaluation of a ``Trainer``.

    Logged with the Trainer's own figures, before the first step and after each evaluation, and usable as
    ``metric_for_best_model``: ``eval_<probe>_<metric>`` and ``eval_<probe>_retention`` (1: nothing is lost; the metric
    now over the metric before, or the inverse where lower is better), and ``eval_retention``, the mean of all probes.
    The model is left exactly as it was found.

    Args:
        trainer: whose model is measured; ``trainer.add_callback(Retention(trainer, probes))``.
        probes: by name; their steps get the model without what wraps it.

    Attributes:
        baseline: each probe's metric before the first step.

    Raises:
        ValueError: if there is no probe, or one has a baseline from which no ratio can be formed or that is at chance.
    """

    def __init__(self, trainer: Trainer, probes: Mapping[str, Probe]) -> None:
        if not probes:
            raise ValueError("probes is empty: give at least one")
        self.trainer = trainer
        self.probes = dict(probes)
        self.baseline: dict[str, float] = {}

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.baseline:
            return
        if state.global_step > 0:
            raise ValueError(
                "the run is resumed, and a baseline measured on trained weights would hide what they forgot: measure "
                "it on the pretrained model before, with trainer_callback.measure(), and set .baseline"
            )
        for probe in self.probes.values():
            probe.begin_baseline()
        values = self.measure()
        require_ratios(self.probes, values)
        self.baseline = values
        self.trainer.log(self._figures(values))

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.baseline:
            return
        figures = self._figures(self.measure())
        # The Trainer looks for metric_for_best_model in this very dict, after it has logged it.
        kwargs["metrics"].update(figures)
        self.trainer.log(figures)

    def measure(self) -> dict[str, float]:
        """Each probe's metric on the model as it is now, under the Trainer's precision."""
        processes = Processes.of_this_run()
        circumstances = Circumstances(
            device=torch.device(self.trainer.args.device),
            processes=processes,
            share=Share(processes.rank, processes.world_size),
            precision=self.trainer.compute_loss_context_manager,
        )
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {name: run_probe(model, probe, circumstances, name) for name, probe in self.probes.items()}

    def _figures(self, values: Mapping[str, float]) -> dict[str, float]:
        figures: dict[str, float] = {}
        retentions = []
        for name, value in values.items():
            probe = self.probes[name]
            left = retention(self.baseline[name], value, probe.higher_is_better)
            figures |= {f"eval_{name}_{probe.name}": value, f"eval_{name}_retention": left}
            retentions.append(left)
        return {**figures, "eval_retention": statistics.fmean(retentions)}

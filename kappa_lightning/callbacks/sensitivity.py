"""Train what learns most for what it changes in the pretrained model, and freeze the rest."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from kappa_lightning.arguments import as_bool, as_int, as_path, describe
from kappa_lightning.callbacks.freezing import FreezeCallback
from kappa_lightning.callbacks.plan import Choice, Plan
from kappa_lightning.callbacks.progress import ticking
from kappa_lightning.callbacks.task import (
    loss_of,
    placing,
    placing_reference,
    require_loss,
    silenced,
    train_batches,
)
from kappa_lightning.callbacks.trainer import batch_limit
from kappa_lightning.parts import split_into_parts
from kappa_lightning.probes import GeneratedText, ReferenceInputs, TaskInputs, resolve_reference
from kappa_lightning.probes.resolving import WORDS
from kappa_lightning.processes import Processes
from kappa_lightning.profile.settings import EACH
from kappa_lightning.selection import Budget, parameters_allowed
from kappa_lightning.sensitivity import SensitivityProfile
from kappa_lightning.sensitivity.measure import Measurement
from kappa_lightning.sensitivity.settings import METHODS
from kappa_lightning.sensitivity.signal import kind_of_optimizer
from kappa_lightning.strategies import adapter_for
from kappa_lightning.tables import sensitivity_markdown
from kappa_lightning.weights import Weight, plain_parameters


class SensitivityFreezeCallback(FreezeCallback[SensitivityProfile]):
    """Train only the tensors that learn most of the new task for what they change in the pretrained model.

    When fit starts, every candidate tensor gets two figures. Its *signal* b is how much moving it lowers the new task's
    loss: the mean gradient of the module's own ``training_step`` over some batches of its own train dataloader. Its
    *sensitivity* c is how much moving it changes what the pretrained model says: the Fisher information of its own
    output distribution, with labels drawn from the model, on a reference that needs no pretraining data. Under a budget
    those of the largest b²/(c·n) train, n being the number of entries; without one the set that minimizes Σc/(Σb)²,
    so that the budget comes out of it. Everything else is frozen and leaves every optimizer, as with
    :class:`~kappa_lightning.KappaFreezeCallback`, which also says what candidates are, what a resume does, what happens
    if a fit fails, and what is logged (here ``sensitivity/ranking``). The theory is on the page docs/sensitivity.md.

    The module, its optimizers, dataloaders and all random numbers are left as they were: training goes on as if nothing
    had been measured. What else ``training_step`` does is done as often as there are batches, but nothing is logged.

    The reference is what ``reference`` says; what the model says of a batch is found out as in
    :class:`~kappa_lightning.probes.ReferenceInputs`, and for everything but softmax classifiers and language models a
    module says it itself, with a method ``output_distribution(self, batch)``. With manual optimization, and so with
    several optimizers, the module has a method ``adaptation_loss(self, batch)``, as ``training_step`` returns no loss.

    Args:
        top_p: the share of the candidates that trains, in (0, 1]; without any budget it is found.
        num_tensors: the number of candidates that train.
        max_params: the number of candidates' parameters that train, or their share if a float.
        reference: ``"generated"`` (text that a causal or image-text model samples itself), ``"synthesized"`` (the new
            task's inputs, changed by a classifier's own gradient until it recognizes them), ``"inputs"`` (the new
            task's own inputs), ``"auto"`` (the first of these that the model can), a dataloader without labels, or
            :class:`~kappa_lightning.probes.ReferenceInputs`.
        method: ``"gradient"``: the signal is that of the mean gradient at the start; ``"path"``: it is summed along one
            step of training for each batch, on weights that are put back afterwards, and the sensitivity is measured
            along what these steps moved, of all pairs of tensors, too; ``"trial"``: all candidates train
            for ``2 · batches`` steps, each one's movement is taken back in turn, and the loss and the divergence are
            measured by forward passes alone. ``"auto"`` is ``"gradient"`` for what generates its text, since a path
            takes the memory of full fine-tuning, and ``"path"`` for all others, which may be confidently wrong at the
            start. Where there is the memory, ``"path"`` can choose far better for a language model (docs/evidence.md):
            it then reads four texts of 64 tokens once for each tensor.
        batches: how many batches of the new task are used.
        rates: let all candidates (or those within the budget) train, each at its own learning rate ∝ b/c, in place of
            freezing the others.
        include: globs and groups of the candidates, as in :class:`~kappa_lightning.KappaFreezeCallback`.
        exclude: globs and groups of what is no candidate, and therefore frozen.
        always_train: globs and groups of what trains whatever its figures (new heads, projectors), outside the budget.
        train_vectors: whether biases, norms and all other vectors train too.
        seed: of the labels and the text that are drawn, and of the order of the batches.
        profile: a :class:`~kappa_lightning.SensitivityProfile` of these weights and this task, or the path of its file,
            which is measured and written if there is none.
        draws: how often labels are drawn for each batch of the reference.
        experts: with ``"each"`` every expert of a fused tensor is a candidate of its own, ``<tensor>[<expert>]``;
            otherwise ``"together"``.

    Attributes:
        profile: the :class:`~kappa_lightning.SensitivityProfile` of the candidates, after fit start.
        trained_names: the names of all parameters that train, in the model's order, after fit start.
        frozen_names: the names of all other parameters, after fit start.
        selected_names: the candidates that were selected, the first to train first, after fit start.
        rates: after fit start the factor of each tensor's learning rate by name, or ``None``.

    Raises:
        TypeError: if an argument has the wrong type; at fit start, if what the model says of a batch cannot be told
            (the message says what to write).
        ValueError: if more than one budget is given or one that selects nothing; at setup, if the module optimizes
            manually and says no loss; at fit start, if a pattern matches no parameter, nothing is left to train, a loss
            or a gradient is not finite, the model cannot do what ``reference`` says, the profile is another model's, or
            the strategy is not supported. Nothing has been changed then.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> class Digits(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        ...     def forward(self, x):
        ...         return self.net(x)
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters())
        >>> data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.randint(3, (16,)))
        >>> callback = SensitivityFreezeCallback(num_tensors=1)
        >>> trainer = Trainer(
        ...     callbacks=[callback], fast_dev_run=True, accelerator="cpu", enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(Digits(), torch.utils.data.DataLoader(data, batch_size=8))
        >>> len(callback.trained_names), sorted(row.name for row in callback.profile)
        (1, ['net.0.weight', 'net.2.weight'])
    """

    def __init__(
        self,
        top_p: float | None = None,
        num_tensors: int | None = None,
        max_params: int | float | None = None,
        reference: str | Iterable[Any] | ReferenceInputs = "auto",
        method: str = "auto",
        batches: int = 16,
        rates: bool = False,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = ("@embeddings",),
        always_train: Sequence[str] = (),
        train_vectors: bool = False,
        seed: int = 0,
        profile: SensitivityProfile | str | os.PathLike[str] | None = None,
        draws: int = 1,
        experts: str = "together",
    ) -> None:
        super().__init__(include=include, exclude=exclude, always_train=always_train, train_vectors=train_vectors)
        limits = {"top_p": top_p, "num_tensors": num_tensors, "max_params": max_params}
        given = any(limit is not None for limit in limits.values())
        self.budget = Budget(top_p=top_p, num_tensors=num_tensors, max_params=max_params) if given else None
        if method not in ("auto", *METHODS):
            raise ValueError(f"method={method!r} is unknown: use one of {', '.join(map(repr, ('auto', *METHODS)))}")
        for argument, value in (("batches", batches), ("draws", draws)):
            if as_int(value, argument) < 1:
                raise ValueError(f"{argument}={value!r} must be at least 1")
        if isinstance(reference, str) and reference not in WORDS:
            raise ValueError(
                f"reference={reference!r} is unknown: use one of {', '.join(map(repr, WORDS))}, a dataloader or "
                "ReferenceInputs"
            )
        if experts not in ("together", EACH):
            raise ValueError(f"experts={experts!r} is unknown: use 'together' or {EACH!r}")
        self.experts = experts
        self.reference = reference
        self.method = method
        self.batches = as_int(batches, "batches")
        self.draws = as_int(draws, "draws")
        self.scale_rates = as_bool(rates, "rates")
        self.seed = as_int(seed, "seed")
        self._given_profile = profile if isinstance(profile, SensitivityProfile) else None
        self.profile_path = None
        if profile is not None and self._given_profile is None:
            self.profile_path = as_path(profile, "profile", "a SensitivityProfile, or the path of the file of one")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self._given_profile is None:
            require_loss(trainer, pl_module, type(self).__name__)
        super().setup(trainer, pl_module, stage)

    @override
    def choose(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        candidates: Sequence[Weight],
        alongside: Collection[str],
        processes: Processes,
    ) -> Choice[SensitivityProfile]:
        if self.experts == EACH:
            candidates = split_into_parts(candidates, module)
        parts = {weight.name: weight.part for weight in candidates if weight.part is not None}
        profile = self._known(module, candidates, processes)
        if profile is None:
            profile = self._measure(trainer, module, candidates, alongside, processes)
            if self.reference == "auto" and profile.settings.reference == str(TaskInputs()):
                rank_zero_warn(
                    "the model writes no text, and its inputs are none that a gradient can change, so reference='auto' "
                    "asked it about the new task's own inputs. Of these it may know little, and then what is near its "
                    "output looks cheap to train: give reference=… a dataloader of unlabeled inputs of the kind that "
                    "it knows, or say reference='inputs' if these are"
                )
            if self.profile_path is not None and batch_limit(trainer) is None:
                with processes.failing_together():
                    if processes.is_global_zero:
                        profile.save(self.profile_path)
        unknown = [row.name for row in profile if row.sensitivity == 0]
        if unknown:
            rank_zero_warn(
                f"the reference does not reach {len(unknown)} candidate(s), {unknown[0]} first, so nothing is known of "
                "what training them would change, and they come last: give a reference that uses them, or name them in "
                "always_train"
            )
        if not self.scale_rates:
            return Choice(profile.select_within(self.budget), profile, parts=parts)
        names = [row.name for row in profile.rank()] if self.budget is None else profile.select_within(self.budget)
        rates = {name: rate for name, rate in profile.among(names).rates().items() if rate > 0}
        return Choice([name for name in names if name in rates], profile, rates, parts)

    @override
    def profile_from_dict(self, state: dict[str, Any]) -> SensitivityProfile:
        return SensitivityProfile.from_dict(state)

    @override
    def arguments(self) -> dict[str, Any]:
        limits = {"top_p": None, "num_tensors": None, "max_params": None}
        if self.budget is not None:
            limits = {name: getattr(self.budget, name) for name in limits}
        return {
            **limits,
            "reference": self.reference if isinstance(self.reference, str) else _described(self.reference),
            "method": self.method,
            "batches": self.batches,
            "rates": self.scale_rates,
            "draws": self.draws,
            "experts": self.experts,
            "seed": self.seed,
        }

    @property
    @override
    def label(self) -> str:
        return "signal over sensitivity"

    @override
    def ranking(self, plan: Plan[SensitivityProfile]) -> tuple[str, str]:
        return "sensitivity/ranking", sensitivity_markdown(plan.profile, plan.selected, plan.rates)

    @override
    def figures(self, plan: Plan[SensitivityProfile]) -> tuple[str, dict[str, float]]:
        if plan.rates is not None:
            return "rate", dict(plan.rates)
        return "b²/(c·n)", {row.name: plan.profile.value(row.name) for row in plan.profile}

    @override
    def title(self, plan: Plan[SensitivityProfile]) -> str:
        shown = [] if self.budget is None else [str(self.budget)]
        shown += ["rates ∝ b/c"] if self.scale_rates else []
        title = f"{type(self).__name__}({', '.join(shown) or 'the least predicted forgetting'})"
        allowed = None if self.budget is None else parameters_allowed(plan.profile, self.budget)
        if allowed is None:
            return title
        left = allowed - sum(plan.profile[name].num_parameters for name in plan.selected)
        return f"{title}: {left:,} of {allowed:,} parameters are left of the budget"

    @override
    def __repr__(self) -> str:
        return describe(self, {**self.all_arguments(), "profile": self._given_profile or self.profile_path})

    def _known(
        self, module: pl.LightningModule, candidates: Sequence[Weight], processes: Processes
    ) -> SensitivityProfile | None:
        known = self._given_profile
        with processes.failing_together():
            # Whether there is a file is for one process to say, or one that comes later would see it half written.
            path = self.profile_path
            if processes.is_global_zero and known is None and path is not None and path.exists():
                known = SensitivityProfile.load(path)
        known = processes.broadcast(known)
        if known is None:
            return None
        missing = [weight.name for weight in candidates if weight.name not in known]
        if missing:
            raise ValueError(
                f"the profile has no row for {missing[0]}: it was measured on a different model or with other patterns"
            )
        found = [text for texts in processes.gather(list(known.differences(module))) for text in texts]
        if found:
            raise ValueError(found[0])
        return known.among([weight.name for weight in candidates])

    def _measure(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        candidates: Sequence[Weight],
        alongside: Collection[str],
        processes: Processes,
    ) -> SensitivityProfile:
        adapter = adapter_for(trainer)
        lockstep = adapter.share(trainer).lockstep
        with processes.failing_together():
            reference = resolve_reference(self.reference, module)
            method = self.method
            if method == "auto":
                method = "gradient" if isinstance(reference, GeneratedText) else "path"
        batches = train_batches(trainer, self.batches, self.seed, processes)
        half = trainer.precision_plugin.precision in ("16-mixed", "16-true")
        measurement = Measurement(
            module,
            candidates,
            batches,
            loss_of(trainer),
            self.reference,
            self.seed,
            place=placing(trainer),
            place_reference=placing_reference(trainer),
            precision=trainer.precision_plugin.train_step_context,
            settle=lambda: adapter.settle(module),
            processes=Processes() if lockstep else processes,
            watch=lambda description, total: ticking(trainer, description, total),
            alongside=[parameter for name, parameter in plain_parameters(module).items() if name in alongside],
            loss_scale=1024.0 if half else 1.0,
        )
        with silenced(trainer, module), adapter.evaluating(module):
            if method == "trial":
                return SensitivityProfile(*measurement.by_trial(trainer.optimizers, 2 * self.batches))
            if method == "path":
                return SensitivityProfile(*measurement.by_path(trainer.optimizers))
            return SensitivityProfile(*measurement.by_gradients(self._optimizer(trainer, candidates), self.draws))

    def _optimizer(self, trainer: pl.Trainer, candidates: Sequence[Weight]) -> str:
        """The kind of the optimizer that trains most of the candidates."""
        wanted = {id(parameter): parameter.numel() for weight in candidates for parameter in weight.parameters}
        shares = [
            sum(wanted.get(id(p), 0) for group in optimizer.param_groups for p in group["params"])
            for optimizer in trainer.optimizers
        ]
        optimizer = trainer.optimizers[shares.index(max(shares))]
        kind = kind_of_optimizer(optimizer)
        if kind is None:
            rank_zero_warn(
                f"how far {type(optimizer).__name__} moves an entry is not known; the signal is taken as under Adam, "
                "which moves all alike"
            )
        return kind or "adam"


def _described(reference: Any) -> str:
    return str(reference) if isinstance(reference, ReferenceInputs) else type(reference).__name__

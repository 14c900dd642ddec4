"""Freeze the specialized tensors of a model by their condition number, and train the rest."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelSummary, OnExceptionCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from kappa_lightning.callbacks.evaluation import batch_limit
from kappa_lightning.callbacks.order import move_before
from kappa_lightning.callbacks.plan import Plan
from kappa_lightning.callbacks.progress import watching
from kappa_lightning.callbacks.reporting import log_text
from kappa_lightning.processes import Processes
from kappa_lightning.profile import KappaProfile
from kappa_lightning.profile.settings import EXPERTS, ProfileSettings
from kappa_lightning.selection import DEFAULT_TOP_P, Budget, check_ranking, rank, select
from kappa_lightning.spectra import check_options
from kappa_lightning.strategies import adapter_for
from kappa_lightning.tables import ranking_markdown, training_table
from kappa_lightning.weights import (
    Weight,
    check_patterns,
    find_weights,
    included,
    match_parameters,
    plain_parameters,
)


class KappaFreezeCallback(Callback):
    """Train only the tensors of low condition number κ = σ_max / σ_min, and freeze all others (KappaTune).

    When fit starts, on the device that trains, every candidate matrix is decomposed; the candidates are ranked by
    ``criterion``, the first ones within the budget train, and everything else gets ``requires_grad=False`` and leaves
    every optimizer. Reference: Ludwig, "The Condition Number as a Scale-Invariant Proxy for Information Encoding in
    Neural Units", arXiv 2506.16289.

    *Candidates* are the matrices (Linear, Conv and Embedding weights, fused experts, other parameters with at least
    two dimensions larger than one) that require a gradient, that ``include`` matches, and that neither ``exclude``
    nor ``always_train`` does. Parameters that were frozen before stay frozen.

    A run that is resumed with ``trainer.fit(ckpt_path=...)`` takes its selection from the checkpoint. If a fit fails,
    ``requires_grad`` is put back, and before the first step the optimizers' groups, too (later, a checkpoint that is
    saved on the exception needs them); after a fit that succeeds, :meth:`unfreeze` puts both back.

    Works under the strategies that ``kappa_lightning.strategies`` has an adapter for. Several processes share the
    decompositions and come to the same selection. It moves itself before a ``ModelSummary`` in the Trainer's list, so
    that the summary counts what trains.

    Logs a table of what trains and, to TensorBoard, the full ranking as the text ``kappa/ranking``.

    Args:
        top_p: the share of the candidates that trains, in (0, 1]; 0.2 if no budget is given.
        num_tensors: the number of candidates that train.
        max_kappa: candidates with a κ of at most this train.
        max_params: the number of candidates' parameters that train, or their share if a float.
        criterion: what ranks the candidates: ``"kappa"``, ``"excess_kappa"``, ``"entropy_deficit"``,
            ``"stable_rank"``, ``"random"`` or one that you registered (:func:`kappa_lightning.selection.register`);
            with ``reversed:`` in front the other way round.
        include: shell globs over the names of ``LightningModule.named_parameters()``, and groups of them such as
            ``"@attention"`` or ``"@gate_up"`` (:data:`kappa_lightning.weights.groups.GROUPS`; in YAML between quotes).
        exclude: globs and groups of what is no candidate, and therefore frozen.
        always_train: globs of what trains whatever its κ (new heads, projectors), outside the budget.
        train_vectors: whether biases, norms and all other vectors train too.
        solver: see :func:`kappa_lightning.spectrum`.
        rtol: see :func:`kappa_lightning.spectrum`.
        profile: a :class:`~kappa_lightning.KappaProfile` of the model's weights, or the path of its file, which is
            computed and written if there is none.
        experts: how the κ of fused experts combine into the tensor's: ``"mean"``, ``"median"`` or ``"max"``.
        within: ``"all"``, ``"shape"`` or ``"role"``: candidates of one shape, or whose names differ only in numbers,
            are ranked among themselves, and every group keeps its share.
        seed: of the criterion ``"random"``.

    Attributes:
        profile: the :class:`~kappa_lightning.KappaProfile` of the candidates, after fit start.
        trained_names: the names of all parameters that train, in the model's order, after fit start.
        frozen_names: the names of all other parameters, after fit start.
        selected_names: the candidates that were selected, the lowest-ranked first, after fit start.

    Raises:
        TypeError: if an argument has the wrong type; at fit start, if ``always_train`` matches a parameter that is not
            floating point, or a candidate is quantized in a way that cannot be read.
        ValueError: if more than one budget is given or one that selects nothing; at fit start, if a pattern matches no
            parameter, nothing is left to train, a weight has NaN or infinite entries, the profile is another model's,
            the checkpoint holds no selection or one of other tensors, or the strategy is not supported. Nothing has
            been changed then.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callback = KappaFreezeCallback(num_tensors=1)
        >>> trainer = Trainer(
        ...     callbacks=[callback], fast_dev_run=True, accelerator="cpu", enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> callback.trained_names, callback.frozen_names
        (['layer.weight'], ['layer.bias'])
    """

    def __init__(
        self,
        top_p: float | None = None,
        num_tensors: int | None = None,
        max_kappa: float | None = None,
        max_params: int | float | None = None,
        criterion: str = "kappa",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        always_train: Sequence[str] = (),
        train_vectors: bool = False,
        solver: str = "auto",
        rtol: float = 1e-3,
        profile: KappaProfile | str | os.PathLike[str] | None = None,
        experts: str = "mean",
        within: str = "all",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if all(limit is None for limit in (top_p, num_tensors, max_kappa, max_params)):
            top_p = DEFAULT_TOP_P
        self.budget = Budget(top_p=top_p, num_tensors=num_tensors, max_kappa=max_kappa, max_params=max_params)
        check_ranking(criterion, within, seed)
        check_options(solver=solver, rtol=rtol)
        if not include:
            raise ValueError("include=() leaves nothing to train: give at least one glob")
        self.criterion = criterion
        self.within = within
        self.seed = seed
        self.include = check_patterns(include, argument="include")
        self.exclude = check_patterns(exclude, argument="exclude")
        self.always_train = check_patterns(always_train, argument="always_train")
        self.train_vectors = train_vectors
        if experts not in EXPERTS:
            raise ValueError(f"experts={experts!r} is unknown: use one of {', '.join(map(repr, EXPERTS))}")
        self.experts = experts
        self.solver = solver
        self.rtol = rtol
        self.profile: KappaProfile | None = profile if isinstance(profile, KappaProfile) else None
        self.profile_path = None if profile is None or isinstance(profile, KappaProfile) else Path(profile)
        self.trained_names: list[str] = []
        self.frozen_names: list[str] = []
        self.selected_names: list[str] = []
        self._given_profile = self.profile
        self._restored: dict[str, Any] | None = None
        self._module: weakref.ref[nn.Module] | None = None
        self._frozen_here: list[nn.Parameter] = []
        self._restore_optimizers: Callable[[], None] | None = None
        self._rewrap: Callable[[], None] | None = None
        self._first_step = 0
        self._numbering = "optimizer"
        self._checkpoint_step = 0
        self._fitting = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        adapter_for(trainer)  # which refuses a strategy before it has moved or wrapped anything
        move_before(trainer, self, ModelSummary)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Called before load_state_dict, and also if the checkpoint has no state of this callback.
        self._restored = None
        self._checkpoint_step = checkpoint["global_step"]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        adapter = adapter_for(trainer)
        processes = adapter.processes(trainer)
        same_module = self._last_module() is pl_module
        checkpoint = adapter.checkpoint_path(trainer, self)
        if checkpoint is not None and (self._restored is not None or self._checkpoint_step > 0):
            plan = self._plan_from_checkpoint(checkpoint, pl_module)
            saved = (self._restored or {}).get("optimizer_numbering", "optimizer")
            adapter.require_numbering(trainer, saved, plan.trained)
        elif self.profile is not None and same_module and trainer.global_step > 0:
            # fit was called once more on a module that is trained by now: its weights have no say any longer.
            plan = self._plan_of_names(pl_module, self.trained_names, self.selected_names, self.profile)
        else:
            plan = self._plan_from_weights(trainer, pl_module, processes)
        plan.require_same(processes)

        if same_module:
            self._thaw()
        parameters = plain_parameters(pl_module)
        self.profile = plan.profile
        self.selected_names = plan.selected
        self.trained_names = [name for name in parameters if name in plan.trained]
        self.frozen_names = [name for name in parameters if name not in plan.trained]
        frozen = [parameters[name] for name in self.frozen_names]
        self._module = weakref.ref(pl_module)
        self._first_step = trainer.global_step
        self._numbering = adapter.numbering(trainer)
        self._restore_optimizers = adapter.drop_from_optimizers(trainer, frozen)
        self._frozen_here = [parameter for parameter in frozen if parameter.requires_grad]
        for parameter in self._frozen_here:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._rewrap = partial(adapter.requires_grad_changed, trainer)
        self._rewrap()
        self._fitting = True
        self._report(trainer, pl_module, plan)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forget_checkpoint()
        self._fitting = False
        self._rewrap = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._forget_checkpoint()
        # What wraps the module is about to go, and the other processes may not be there to make it anew.
        self._rewrap = None
        if not self._fitting:
            return
        self._fitting = False
        if trainer.global_step == self._first_step and not _saves_on_exception(trainer):
            self._put_back()
        else:
            # A checkpoint that is saved on this exception needs the optimizers as they trained.
            self._thaw()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.profile is None or not self.trained_names:
            return {}
        return {
            "arguments": self._arguments(),
            "optimizer_numbering": self._numbering,
            "profile": self.profile.to_dict(),
            "trained_names": list(self.trained_names),
            "selected_names": list(self.selected_names),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    def unfreeze(self) -> None:
        """Give every parameter that this callback froze its ``requires_grad`` back, and its place in the optimizers."""
        self._put_back()
        if self._rewrap is not None:
            self._rewrap()

    def __getstate__(self) -> dict[str, Any]:
        # What refers to one process' objects stays out of a copy and of what a spawned process gets.
        return self.__dict__ | {"_module": None, "_frozen_here": [], "_restore_optimizers": None, "_rewrap": None}

    def _put_back(self) -> None:
        self._thaw()
        if self._restore_optimizers is not None:
            self._restore_optimizers()
        self._restore_optimizers = None

    def _forget_checkpoint(self) -> None:
        self._restored = None
        self._checkpoint_step = 0

    def _thaw(self) -> None:
        for parameter in self._frozen_here:
            parameter.requires_grad_(True)
        self._frozen_here = []

    def _plan_from_weights(self, trainer: pl.Trainer, module: pl.LightningModule, processes: Processes) -> Plan:
        trainable = self._trainable(module)
        always = self._always_trained(module, trainable)
        weights = find_weights(module)
        candidates, frozen_before = [], 0
        for weight in included(weights, module, self.include, self.exclude):
            if weight.name in always:
                continue
            if not trainable.isdisjoint((weight.name, *weight.companions)):
                candidates.append(weight)
            else:
                frozen_before += 1
        if not candidates:
            raise ValueError(
                f"nothing to train: include={list(self.include)}, exclude={list(self.exclude)} and "
                f"always_train={list(self.always_train)} leave no matrix as a candidate"
                + (
                    f"; {frozen_before} that they leave are frozen already (requires_grad=False)"
                    if frozen_before
                    else ""
                )
            )
        profile = self._profile(trainer, module, candidates, processes)
        selected = select(list(profile), self.budget, self.criterion, within=self.within, seed=self.seed)
        companions = {weight.name: weight.companions for weight in weights}
        trained = {*selected, *always, *(name for chosen in selected for name in companions[chosen])} & trainable
        if self.train_vectors:
            trained |= trainable - {name for weight in weights for name in (weight.name, *weight.companions)}
        dead = [row.name for row in profile if row.frobenius_norm == 0 and row.name not in trained]
        if dead:
            rank_zero_warn(
                f"{len(dead)} candidate(s) are all zero, so their κ is infinite and they stay frozen, {dead[0]} first. "
                "If they are new, such as the B of a LoRA adapter, name them in always_train"
            )
        return Plan(trained, selected, profile)

    def _always_trained(self, module: pl.LightningModule, trainable: set[str]) -> set[str]:
        parameters = plain_parameters(module)
        always = match_parameters(module, self.always_train, argument="always_train")
        for name in sorted(always):
            if not (parameters[name].is_floating_point() or parameters[name].is_complex()):
                raise TypeError(f"always_train matches {name}, which is {parameters[name].dtype} and cannot be trained")
        stay = [name for name in sorted(always) if name not in trainable]
        if stay:
            rank_zero_warn(
                f"always_train matches {len(stay)} parameter(s) that were frozen before and stay so: {stay[0]}"
            )
        return always

    def _profile(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        candidates: Sequence[Weight],
        processes: Processes,
    ) -> KappaProfile:
        known = self._given_profile
        with processes.failing_together():
            # Whether there is a file is for one process to say, or one that comes later would see it half written.
            path = self.profile_path
            if processes.is_global_zero and known is None and path is not None and path.exists():
                known = KappaProfile.load(path)
        known = processes.broadcast(known)
        if known is not None:
            profile = known.renamed_for([weight.name for weight in candidates])
            if processes.world_size == 1:
                profile.check(module)
                return profile
            # Sharded weights are read by all together, so nobody stops at the first difference.
            found = [text for texts in processes.gather(list(profile.differences(module))) for text in texts]
            if found:
                raise ValueError(found[0])
            return profile
        return KappaProfile.from_weights(
            candidates,
            ProfileSettings(self.solver, self.rtol, self.experts),
            device=trainer.strategy.root_device,
            save_to=self.profile_path if batch_limit(trainer) is None else None,
            watch=watching(trainer),
            processes=processes,
        )

    def _plan_from_checkpoint(self, path: str | os.PathLike[str], module: pl.LightningModule) -> Plan:
        if self._restored is None:  # and its weights are trained
            raise ValueError(
                f"{path} was saved without KappaFreezeCallback and holds no selection. To go on with that "
                "run, leave the callback out; to start a new one from its weights, load them into the module "
                "(load_state_dict) and call fit without ckpt_path"
            )
        saved, now = self._restored["arguments"], self._arguments()
        ignored = [key for key in now if now[key] != saved.get(key)]
        if ignored:
            differences = ", ".join(f"{key}={now[key]!r} (checkpoint: {saved.get(key)!r})" for key in ignored)
            rank_zero_warn(f"KappaFreezeCallback resumes with the selection of the checkpoint; ignored: {differences}")
        profile = KappaProfile.from_dict(self._restored["profile"])
        return self._plan_of_names(module, self._restored["trained_names"], self._restored["selected_names"], profile)

    def _plan_of_names(
        self, module: pl.LightningModule, trained: Sequence[str], selected: Sequence[str], profile: KappaProfile
    ) -> Plan:
        parameters, trainable = plain_parameters(module), self._trainable(module)
        for name in trained:
            if name not in parameters:
                raise ValueError(f"the earlier run trained {name}, which this model has not: it is another model's")
            if name not in trainable:
                raise ValueError(
                    f"the earlier run trained {name}, which is frozen here (requires_grad=False): unfreeze it"
                )
        shapes = {weight.name: weight.shape for weight in find_weights(module)}
        for row in profile:
            shape = shapes.get(row.name)
            if shape != row.shape:
                found = "missing here" if shape is None else f"{shape} here"
                raise ValueError(f"the earlier run was of another model: {row.name} is {row.shape} there and {found}")
        return Plan(set(trained), list(selected), profile)

    def _arguments(self) -> dict[str, Any]:
        return {
            **vars(self.budget),
            "criterion": self.criterion,
            "within": self.within,
            "seed": self.seed,
            "experts": self.experts,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "always_train": list(self.always_train),
            "train_vectors": self.train_vectors,
        }

    def _last_module(self) -> nn.Module | None:
        return None if self._module is None else self._module()

    def _trainable(self, module: pl.LightningModule) -> set[str]:
        """The names of what nobody has frozen but this callback, in an earlier fit."""
        earlier = {id(parameter) for parameter in self._frozen_here} if self._last_module() is module else set()
        return {name for name, p in plain_parameters(module).items() if p.requires_grad or id(p) in earlier}

    def _report(self, trainer: pl.Trainer, module: pl.LightningModule, plan: Plan) -> None:
        if not trainer.barebones:
            groups = plan.groups(module, criterion=self.criterion, train_vectors=self.train_vectors)
            rank_zero_info(training_table(groups, title=f"KappaFreezeCallback({self.budget})"))
        ranking = rank(plan.profile, self.criterion, within=self.within, seed=self.seed)
        log_text(trainer, "kappa/ranking", ranking_markdown(ranking, set(plan.selected)))


def _saves_on_exception(trainer: pl.Trainer) -> bool:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(
        isinstance(callback, OnExceptionCheckpoint)
        or (isinstance(callback, ModelCheckpoint) and callback.save_on_exception)
        for callback in callbacks
    )

"""Freeze the specialized tensors of a model by their condition number, and train the rest."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import override

from kappa_lightning.arguments import as_path, describe
from kappa_lightning.callbacks.freezing import FreezeCallback
from kappa_lightning.callbacks.plan import Choice, Plan
from kappa_lightning.callbacks.progress import watching
from kappa_lightning.callbacks.trainer import batch_limit
from kappa_lightning.processes import Processes
from kappa_lightning.profile import KappaProfile
from kappa_lightning.profile.distributed import Watch
from kappa_lightning.profile.settings import ProfileSettings
from kappa_lightning.selection import DEFAULT_TOP_P, Budget, check_ranking, parameters_allowed, rank, select
from kappa_lightning.tables import ranking_markdown
from kappa_lightning.weights import Weight


class KappaFreezeCallback(FreezeCallback[KappaProfile]):
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
        max_params: the number of candidates' parameters that train, or their share if a float: the first ones of the
            ranking until the next does not fit.
        criterion: what ranks the candidates: ``"kappa"``, ``"excess_kappa"``, ``"entropy_deficit"``,
            ``"stable_rank"``, ``"random"`` or one that you registered with
            :func:`kappa_lightning.selection.register_criterion`; with ``reversed:`` in front the other way round.
        include: shell globs over the names of ``LightningModule.named_parameters()``, and groups of them such as
            ``"@attention"`` or ``"@gate_up"`` (:data:`kappa_lightning.weights.groups.GROUPS`; in YAML between quotes).
        exclude: globs and groups of what is no candidate, and therefore frozen: by default embeddings, which the
            reference implementation and PEFT leave out, too.
        always_train: globs of what trains whatever its κ (new heads, projectors), outside the budget.
        train_vectors: whether biases, norms and all other vectors train too.
        solver: see :func:`kappa_lightning.spectrum`.
        rtol: see :func:`kappa_lightning.spectrum`.
        profile: a :class:`~kappa_lightning.KappaProfile` of the model's weights, or the path of its file, which is
            computed and written if there is none.
        experts: how the κ of fused experts combine into the tensor's: ``"mean"``, ``"median"`` or ``"max"``; with
            ``"each"`` every expert is a candidate of its own, ``<tensor>[<expert>]``, and budgets count experts. The
            others of its tensor stay as they are to the last bit, and have no gradient and no optimizer state.
        within: ``"all"``, ``"shape"`` or ``"role"``: candidates of one shape, or whose names differ only in numbers,
            are ranked among themselves, and every group keeps its share.
        seed: of the criterion ``"random"``.
        gate_up: with ``experts="each"``, whether gate and up of a fused ``gate_up_proj`` are one candidate
            (``"together"``) or two (``"apart"``).
        heads: with ``"each"``, every attention head of a projection is a candidate of its own,
            ``<tensor>[head <number>]``.

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
        exclude: Sequence[str] = ("@embeddings",),
        always_train: Sequence[str] = (),
        train_vectors: bool = False,
        solver: str = "auto",
        rtol: float = 1e-3,
        profile: KappaProfile | str | os.PathLike[str] | None = None,
        experts: str = "mean",
        within: str = "all",
        seed: int = 0,
        gate_up: str = "together",
        heads: str = "whole",
    ) -> None:
        super().__init__(include=include, exclude=exclude, always_train=always_train, train_vectors=train_vectors)
        if all(limit is None for limit in (top_p, num_tensors, max_kappa, max_params)):
            top_p = DEFAULT_TOP_P
        self.budget = Budget(top_p=top_p, num_tensors=num_tensors, max_kappa=max_kappa, max_params=max_params)
        self.criterion, self.within, self.seed = check_ranking(criterion, within, seed)
        self.settings = ProfileSettings(str(solver), rtol, str(experts), gate_up=str(gate_up), heads=str(heads))
        self.profile = profile if isinstance(profile, KappaProfile) else None
        self.profile_path = None
        if profile is not None and self.profile is None:
            self.profile_path = as_path(profile, "profile", "a KappaProfile, or the path of the file of one")
        self._given_profile = self.profile

    @property
    def solver(self) -> str:
        """See the argument."""
        return self.settings.solver

    @property
    def rtol(self) -> float:
        """See the argument."""
        return self.settings.rtol

    @property
    def experts(self) -> str:
        """See the argument."""
        return self.settings.experts

    @override
    def choose(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        candidates: Sequence[Weight],
        alongside: Collection[str],
        processes: Processes,
    ) -> Choice[KappaProfile]:
        return self.choose_among(
            module,
            candidates,
            device=trainer.strategy.root_device,
            watch=watching(trainer),
            processes=processes,
            save=batch_limit(trainer) is None,
        )

    def choose_among(
        self,
        module: nn.Module,
        candidates: Sequence[Weight],
        *,
        device: torch.device | str | None,
        watch: Watch | None,
        processes: Processes,
        save: bool = True,
    ) -> Choice[KappaProfile]:
        """:meth:`choose`, for those who have no Trainer.

        Args:
            module: has the candidates.
            candidates: the matrices that may be chosen.
            device: where to decompose; by default where each weight is.
            watch: sees the weights and their rows as they come, to show progress.
            processes: who takes part.
            save: whether a profile that was computed is written to the path that was given.
        """
        candidates = self.settings.split(candidates, module)
        profile = self._profile(module, candidates, device, watch, processes, save)
        selected = select(list(profile), self.budget, self.criterion, within=self.within, seed=self.seed)
        dead = [row.name for row in profile if row.frobenius_norm == 0 and row.name not in selected]
        if dead:
            rank_zero_warn(
                f"{len(dead)} candidate(s) are all zero, so their κ is infinite and they stay frozen, {dead[0]} first. "
                "If they are new, such as the B of a LoRA adapter, name them in always_train"
            )
        parts = {weight.name: weight.part for weight in candidates if weight.part is not None}
        return Choice(selected, profile, parts=parts)

    @override
    def profile_from_dict(self, state: dict[str, Any]) -> KappaProfile:
        return KappaProfile.from_dict(state)

    @override
    def arguments(self) -> dict[str, Any]:
        return {
            **vars(self.budget),
            "criterion": self.criterion,
            "within": self.within,
            "seed": self.seed,
            "experts": self.experts,
            "gate_up": self.settings.gate_up,
            "heads": self.settings.heads,
        }

    @property
    @override
    def label(self) -> str:
        return self.criterion

    @override
    def ranking(self, plan: Plan[KappaProfile]) -> tuple[str, str]:
        ranking = rank(plan.profile, self.criterion, within=self.within, seed=self.seed)
        return "kappa/ranking", ranking_markdown(ranking, plan.selected)

    @override
    def figures(self, plan: Plan[KappaProfile]) -> tuple[str, dict[str, float]]:
        return "κ", {row.name: row.kappa for row in plan.profile}

    @override
    def title(self, plan: Plan[KappaProfile]) -> str:
        allowed = parameters_allowed(plan.profile, self.budget)
        if allowed is None:
            return f"{type(self).__name__}({self.budget})"
        left = allowed - sum(plan.profile[name].num_parameters for name in plan.selected)
        return f"{type(self).__name__}({self.budget}): {left:,} of {allowed:,} parameters are left of the budget"

    @override
    def __repr__(self) -> str:
        profile = self._given_profile or self.profile_path
        computed = {"solver": self.solver, "rtol": self.rtol, "profile": profile}
        return describe(self, {**self.all_arguments(), **computed})

    def _profile(
        self,
        module: nn.Module,
        candidates: Sequence[Weight],
        device: torch.device | str | None,
        watch: Watch | None,
        processes: Processes,
        save: bool,
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
            self.settings,
            device=device,
            save_to=self.profile_path if save else None,
            watch=watch,
            processes=processes,
        )

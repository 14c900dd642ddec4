"""The profile of a model: its rows, and what is done with them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kappa_lightning.arguments import as_module, as_names
from kappa_lightning.processes import Processes
from kappa_lightning.profile.compute import compute_rows
from kappa_lightning.profile.distributed import Watch, compute_distributed
from kappa_lightning.profile.file import read_profile_file, write_profile_file
from kappa_lightning.profile.journal import Journal
from kappa_lightning.profile.mismatch import common_prefixes, differences, fused_experts
from kappa_lightning.profile.progress import progress_bar
from kappa_lightning.profile.row import KappaRow
from kappa_lightning.profile.settings import ProfileSettings
from kappa_lightning.selection import Budget, select
from kappa_lightning.text import counted, near_names
from kappa_lightning.weights import (
    Weight,
    checkpoint_weights,
    find_weights,
    included,
    included_by_name,
)


class KappaProfile:
    """The condition numbers of a model: rows in the model's order, one for each tensor that is a matrix.

    ``len(profile)``, ``for row in profile``, ``profile[name]`` and ``name in profile`` do what they say.

    Args:
        rows: the rows, with distinct names.
        settings: what they were computed with.

    Raises:
        ValueError: if two rows have one name.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        ...     _ = net[2].weight.copy_(torch.eye(2))
        >>> profile = KappaProfile.from_model(net, progress=False)
        >>> [(row.name, row.kappa) for row in profile]
        [('0.weight', 2.0), ('2.weight', 1.0)]
        >>> profile.select(top_p=0.5)
        ['2.weight']
    """

    def __init__(self, rows: Iterable[KappaRow], settings: ProfileSettings | None = None) -> None:
        self.settings = settings or ProfileSettings()
        self._rows: dict[str, KappaRow] = {}
        for row in rows:
            if row.name in self._rows:
                raise ValueError(f"two rows of a profile have the name {row.name!r}")
            self._rows[row.name] = row

    @property
    def solver(self) -> str:
        """The solver that computed the rows."""
        return self.settings.solver

    @property
    def rtol(self) -> float:
        """The relative error that was asked for."""
        return self.settings.rtol

    @property
    def experts(self) -> str:
        """How the κ of fused experts were combined."""
        return self.settings.experts

    @classmethod
    def from_model(
        cls,
        module: nn.Module,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        device: torch.device | str | None = None,
        progress: bool = True,
        solver: str = "auto",
        rtol: float = 1e-3,
        experts: str = "mean",
        save_to: str | os.PathLike[str] | None = None,
        memory_budget: int | None = None,
        gate_up: str = "together",
        heads: str = "whole",
    ) -> KappaProfile:
        """Decompose the matrices of a module.

        Args:
            module: any module; it is not changed.
            include: globs over the names of ``named_parameters()``, and groups such as ``"@attention"``
                (:data:`kappa_lightning.weights.groups.GROUPS`); only what one of them matches is profiled.
            exclude: globs and groups of what is left out of that; a group may match nothing.
            device: where to compute; by default where each tensor is. Only what is being worked on is copied there.
            progress: whether to show a progress bar on standard error.
            solver: see :func:`~kappa_lightning.spectrum`.
            rtol: see :func:`~kappa_lightning.spectrum`.
            experts: how the κ of fused experts combine into the tensor's: ``"mean"``, ``"median"`` or ``"max"``; with
                ``"each"`` every expert has a row of its own, ``<tensor>[<expert>]``.
            save_to: the file to save the profile to. Finished rows are kept beside it, in ``<file>.partial``, from
                where an interrupted pass goes on the next time.
            memory_budget: bytes of working memory, by default a quarter of what is free on a CPU and half on a GPU; how
                many matrices are worked on at a time follows from it. One tensor is always worked on, whatever it
                needs.
            gate_up: with ``experts="each"``, whether gate and up of a fused ``gate_up_proj`` are one row
                (``"together"``) or two (``"apart"``).
            heads: with ``"each"`` every attention head of a projection has a row of its own,
                ``<tensor>[head <number>]``.

        Raises:
            TypeError: if a weight is quantized and cannot be read.
            ValueError: if a pattern matches no parameter, no matrix is left, or a weight has NaN or infinite entries
                (the message names it).
        """
        settings = ProfileSettings(solver, rtol, experts, memory_budget, gate_up, heads)
        weights = settings.split(included(find_weights(module), module, include, exclude), module)
        if not weights:
            raise ValueError(f"no matrix to profile: include={list(include)}, exclude={list(exclude)} leave none")
        watch = progress_bar if progress else None
        return cls.from_weights(weights, settings, device=device, save_to=save_to, watch=watch)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        device: torch.device | str | None = None,
        progress: bool = True,
        solver: str = "auto",
        rtol: float = 1e-3,
        experts: str = "mean",
        save_to: str | os.PathLike[str] | None = None,
        memory_budget: int | None = None,
        gate_up: str = "together",
        heads: str = "whole",
    ) -> KappaProfile:
        """Decompose the matrices of a checkpoint, read from disk tensor by tensor.

        In memory is at most one tensor more than there are threads, within the memory budget, and only one
        where more do not fit. Where a ``config.json`` of transformers lies beside the checkpoint, the rows are those of
        the model that transformers makes of it, with its names and layers, fused experts included.

        Elsewhere names and shapes must tell what a layer is, a warning says what was assumed, and :meth:`check` refuses
        a row whose layer uses the tensor in another way. Nor does a checkpoint alone tell a buffer from a weight: one
        of floats in two or more dimensions, such as a mask, has a row, which counts in a budget unless ``exclude``
        names it and which :meth:`check` passes over.

        Args:
            path: a ``.safetensors`` file, a Lightning ``.ckpt`` or another file of ``torch.save`` with a state dict
                (read without running code), a folder with one of these or with an index and its shards, or a hub id
                that is in the local cache; see :func:`kappa_lightning.weights.checkpoint_weights`.
            include: as in :meth:`from_model`, over the names in the checkpoint.
            exclude: as in :meth:`from_model`.
            device: where to compute, by default the CPU.
            progress: as in :meth:`from_model`.
            solver: as in :meth:`from_model`.
            rtol: as in :meth:`from_model`.
            experts: as in :meth:`from_model`.
            save_to: as in :meth:`from_model`.
            memory_budget: as in :meth:`from_model`.
            gate_up: as in :meth:`from_model`.
            heads: only ``"whole"``, since a checkpoint does not say how many heads it has.

        Raises:
            FileNotFoundError: if there is no such file or cached model, or a shard is missing.
            ValueError: as in :meth:`from_model`, or if the file is corrupt, foreign or quantized.
        """
        settings = ProfileSettings(solver, rtol, experts, memory_budget, gate_up, heads)
        weights = settings.split(included_by_name(checkpoint_weights(path), include, exclude))
        if not weights:
            raise ValueError(f"no matrix to profile: include={list(include)}, exclude={list(exclude)} leave none")
        watch = progress_bar if progress else None
        return cls.from_weights(weights, settings, device=device or "cpu", save_to=save_to, watch=watch)

    @classmethod
    def from_weights(
        cls,
        weights: Sequence[Weight],
        settings: ProfileSettings | None = None,
        *,
        device: torch.device | str | None = None,
        save_to: str | os.PathLike[str] | None = None,
        watch: Watch | None = None,
        processes: Processes | None = None,
    ) -> KappaProfile:
        """Decompose weights that were found already.

        Args:
            weights: what is decomposed, as :func:`kappa_lightning.weights.find_weights` gives them; none are no rows.
            settings: how. Without a memory budget, the processes of one machine share the quarter of what is free on a
                CPU.
            device: as in :meth:`from_model`.
            save_to: as in :meth:`from_model`.
            watch: sees the weights and their rows as they come, to show progress.
            processes: who shares the work and all get the profile; by default this process does it all.

        Raises:
            TypeError: as in :meth:`from_model`.
            ValueError: as in :meth:`from_model`.
            FileNotFoundError: if the folder of ``save_to`` does not exist.
        """
        settings = settings or ProfileSettings()
        processes = processes or Processes()
        with contextlib.ExitStack() as stack:
            journal: Journal | None = None
            with processes.failing_together():
                here = save_to is not None and Path(save_to).parent.is_dir()
                if save_to is not None and not here and processes.is_global_zero:
                    raise FileNotFoundError(
                        f"the profile cannot be saved to {save_to}: there is no folder {Path(save_to).parent}"
                    )
                if save_to is not None and here:  # on other nodes than the first the folder may not be there
                    journal = Journal(f"{os.fspath(save_to)}.partial", settings, rank=processes.rank)
                    stack.enter_context(journal)
            neighbors = processes.local_world_size()
            compute = partial(compute_rows, settings=settings, device=device, journal=journal, neighbors=neighbors)
            finished = {row.name: row for row in compute_distributed(weights, compute, processes, watch)}
            profile = cls((finished[weight.name] for weight in weights), settings)
            with processes.failing_together():
                if save_to is not None and processes.is_global_zero:
                    profile.save(save_to)
            if journal is not None:
                journal.remove()
        return profile

    def select(
        self,
        top_p: float | None = None,
        num_tensors: int | None = None,
        max_kappa: float | None = None,
        max_params: int | float | None = None,
        criterion: str = "kappa",
        *,
        within: str = "all",
        seed: int = 0,
    ) -> list[str]:
        """The names that train under exactly one budget, the first to train first; ties are broken by name.

        Args:
            top_p: a share of the tensors in (0, 1].
            num_tensors: a number of tensors.
            max_kappa: every tensor whose κ is at most this.
            max_params: a number of parameters if an int, a share of the profiled parameters if a float.
            criterion: what ranks the tensors, ``"kappa"``, ``"excess_kappa"``, ``"entropy_deficit"``,
                ``"stable_rank"``, ``"random"`` or one of yours
                (:func:`kappa_lightning.selection.register_criterion`); with ``reversed:`` in front the other way round.
            within: ``"all"``, ``"shape"`` or ``"role"``: tensors of one shape, or whose names differ only in numbers,
                are ranked among themselves, and every group keeps its share; see
                :func:`kappa_lightning.selection.rank`.
            seed: of the criterion ``random``.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if there is not exactly one budget, it selects nothing, or ``criterion`` or ``within`` is
                unknown.
        """
        budget = Budget(top_p=top_p, num_tensors=num_tensors, max_kappa=max_kappa, max_params=max_params)
        return select(list(self), budget, criterion, within=within, seed=seed)

    def restrict(self, names: Iterable[str]) -> KappaProfile:
        """The same profile with only the rows of some names.

        Raises:
            TypeError: if ``names`` is one string.
            KeyError: if a name has no row.
        """
        rows = [self[name] for name in as_names(names, "names")]
        return KappaProfile(rows, self.settings)

    def renamed_for(self, names: Sequence[str]) -> KappaProfile:
        """The rows of a model's parameters, where this profile may name them without the model's place in a module.

        A checkpoint names ``layers.0.weight`` what a LightningModule that holds the model as ``net`` names
        ``net.layers.0.weight``. Whether they are the same weights is for :meth:`check` to say.

        Args:
            names: parameter names; each is a row's name, or all are with one common prefix in place of one of the rows'
                (``module.`` of DataParallel, ``model.`` or ``net.`` of a LightningModule, none).

        Raises:
            ValueError: if a name has no row.
        """
        for of_names, of_rows in common_prefixes(names, self._rows):
            rows = (replace(self[of_rows + name.removeprefix(of_names)], name=name) for name in names)
            return KappaProfile(rows, self.settings)
        missing = next(name for name in names if name not in self)
        raise ValueError(
            fused_experts(self._rows, [missing])
            or f"the profile has no row for {missing}: it is another model's, or was computed with other patterns"
        )

    def check(self, module: nn.Module) -> None:
        """Make sure that this is the profile of a module's present weights.

        The rows of a checkpoint's buffers are passed over where the module has a buffer of that name and shape.

        Raises:
            TypeError: if ``module`` is none.
            ValueError: if a tensor of the profile is missing from the module or its content is another; the message
                names the first.
        """
        as_module(module, "module")
        for difference in self.differences(module):
            raise ValueError(difference)

    def differences(self, module: nn.Module) -> Iterator[str]:
        """What :meth:`check` would complain of, tensor by tensor."""
        return differences(self, self.settings.split(find_weights(module), module), module)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a JSON file, atomically."""
        write_profile_file(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KappaProfile:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            IsADirectoryError: if it is a folder.
            ValueError: if the file is truncated, is no profile, or comes from a newer version of this package.
        """
        document = read_profile_file(path)
        try:
            return cls.from_dict(document)
        except ValueError as error:
            raise ValueError(f"{path} is a damaged profile: {error}; profile again") from error

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain lists, numbers and strings, for a checkpoint or a file."""
        return {**self.settings.of_rows, "rows": [row.to_dict() for row in self]}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> KappaProfile:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if an entry has the wrong type or makes no sense.
        """
        if not isinstance(state["rows"], list):
            raise ValueError(f"its rows are a {type(state['rows']).__name__}, not a list")
        settings = ProfileSettings.from_dict(state)
        rows = [KappaRow.from_dict(entry) for entry in state["rows"]]
        for row in rows:
            if row.experts != settings.combine:
                raise ValueError(f"the row of {row.name!r} has experts={row.experts!r}, not {settings.combine!r}")
        return cls(rows, settings)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[KappaRow]:
        return iter(self._rows.values())

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> KappaRow:
        if name not in self._rows:
            raise KeyError(f"the profile has no row for {name}{near_names(name, self._rows)}")
        return self._rows[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KappaProfile) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        finite = [row.kappa for row in self if math.isfinite(row.kappa)]
        span = f", κ {min(finite):.3g} to {max(finite):.3g}" if finite else ""
        return f"KappaProfile({counted(len(self), 'tensor')}{span})"

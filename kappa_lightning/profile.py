"""A model's condition numbers, one row a tensor: computed, saved, checked against weights, and selected from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from kappa_lightning.fingerprint import fingerprint
from kappa_lightning.profile_file import read_profile_file, write_profile_file
from kappa_lightning.selection import Budget, select
from kappa_lightning.spectra import Spectrum, spectrum
from kappa_lightning.weights import Weight, find_weights, match_names, plain_parameters, tied_names


@dataclass(frozen=True, slots=True)
class KappaRow:
    """One tensor of a profile: a :class:`~kappa_lightning.Spectrum` as plain numbers, and where it came from.

    Of a stack of matrices, such as fused experts, ``sigma_max``, ``sigma_min``, ``log_volume`` and
    ``frobenius_norm`` are those of the block-diagonal matrix of all of them.

    Attributes:
        name: the parameter's name.
        shape: the parameter's shape, as stored.
        kappa: condition number; of a stack, the mean over its matrices, as in PEFT.
        sigma_max: largest singular value, in the unit of the weights.
        sigma_min: smallest of the min(rows, cols) singular values.
        log_volume: Σ ln σ_i, in nats.
        frobenius_norm: root of the sum of squares.
        rtol: the relative error of ``kappa`` that is guaranteed.
        kappas: of a stack, the κ of each matrix; otherwise ``None``.
        dtype: the stored precision, such as ``"float32"``.
        fingerprint: identifies the stored content.
    """

    name: str
    shape: tuple[int, ...]
    kappa: float
    sigma_max: float
    sigma_min: float
    log_volume: float
    frobenius_norm: float
    rtol: float
    kappas: tuple[float, ...] | None
    dtype: str
    fingerprint: str

    @property
    def num_parameters(self) -> int:
        """Number of entries of the tensor."""
        return math.prod(self.shape)


class KappaProfile:
    """The condition numbers of a model: rows in the model's order, one for each tensor that is a matrix.

    ``len(profile)``, ``for row in profile``, ``profile[name]`` and ``name in profile`` do what they say.

    Args:
        rows: the rows, with distinct names.
        solver: the solver that computed them.
        rtol: the relative error that was asked for.

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

    def __init__(self, rows: Iterable[KappaRow], *, solver: str = "auto", rtol: float = 1e-3) -> None:
        self._rows = {row.name: row for row in rows}
        self.solver = solver
        self.rtol = rtol

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
    ) -> KappaProfile:
        """Decompose the matrices of a module, one tensor after the other.

        Args:
            module: any module; it is not changed.
            include: globs over the names of ``named_parameters()``; only what one of them matches is profiled.
            exclude: globs of what is left out of that.
            device: where to compute; by default where each tensor is. One tensor at a time is moved there.
            progress: whether to show a progress bar on standard error.
            solver: see :func:`~kappa_lightning.spectrum`.
            rtol: see :func:`~kappa_lightning.spectrum`.

        Raises:
            TypeError: if a weight is quantised and cannot be read.
            ValueError: if a pattern matches no parameter, no matrix is left, or a weight has NaN or infinite entries
                (the message names it).
        """
        weights = included(module, include, exclude)
        if not weights:
            raise ValueError(f"no matrix to profile: include={list(include)}, exclude={list(exclude)} leave none")
        rows: Iterable[KappaRow] = iter_rows(weights, device=device, solver=solver, rtol=rtol)
        if progress:
            rows = tqdm(rows, total=len(weights), desc="Condition numbers", unit="tensor", leave=False)
        return cls(rows, solver=solver, rtol=rtol)

    def select(
        self,
        top_p: float | None = None,
        num_tensors: int | None = None,
        max_kappa: float | None = None,
        max_params: int | float | None = None,
        criterion: str = "kappa",
    ) -> list[str]:
        """The names that train under exactly one budget, the first to train first; ties are broken by name.

        Args:
            top_p: a share of the tensors in (0, 1].
            num_tensors: a number of tensors.
            max_kappa: every tensor whose κ is at most this.
            max_params: a number of parameters if an int, a share of the profiled parameters if a float.
            criterion: what ranks the tensors; see :data:`kappa_lightning.selection.CRITERIA`.

        Raises:
            ValueError: if there is not exactly one budget, or it selects nothing.
        """
        budget = Budget(top_p=top_p, num_tensors=num_tensors, max_kappa=max_kappa, max_params=max_params)
        return select(list(self), budget, criterion)

    def restrict(self, names: Iterable[str]) -> KappaProfile:
        """The same profile with only the rows of some names.

        Raises:
            KeyError: if a name has no row.
        """
        return KappaProfile((self[name] for name in names), solver=self.solver, rtol=self.rtol)

    def check(self, module: nn.Module) -> None:
        """Make sure that this is the profile of a module's present weights.

        Raises:
            ValueError: if a tensor of the profile is missing from the module or its content is another; the message
                names the first.
        """
        weights = {weight.name: weight for weight in find_weights(module)}
        for row in self:
            weight = weights.get(row.name)
            if weight is None:
                raise ValueError(f"the profile is another model's: it has {row.name}, which this model has not")
            shape, dtype = weight.shape, _name_of(weight.dtype)
            if (shape, dtype) != (row.shape, row.dtype):
                raise ValueError(
                    f"the profile is another model's: {row.name} is {dtype} of shape {shape} here and {row.dtype} of "
                    f"shape {row.shape} in the profile"
                )
            if fingerprint(weight.read()) != row.fingerprint:
                raise ValueError(
                    f"the profile is of other weights: the content of {row.name} differs; compute a new profile"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a JSON file, atomically."""
        write_profile_file(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KappaProfile:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, is no profile, or comes from a newer version of this package.
        """
        return cls.from_dict(read_profile_file(path))

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain lists, numbers and strings, for a checkpoint or a file."""
        return {"solver": self.solver, "rtol": self.rtol, "rows": [asdict(row) for row in self]}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> KappaProfile:
        """The inverse of :meth:`to_dict`."""
        rows = (
            KappaRow(**{**row, "shape": tuple(row["shape"]), "kappas": _tuple(row["kappas"])}) for row in state["rows"]
        )
        return cls(rows, solver=state["solver"], rtol=state["rtol"])

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[KappaRow]:
        return iter(self._rows.values())

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> KappaRow:
        return self._rows[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KappaProfile) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        finite = [row.kappa for row in self if math.isfinite(row.kappa)]
        span = f", κ {min(finite):.3g} to {max(finite):.3g}" if finite else ""
        return f"KappaProfile({len(self)} tensors{span})"


def included(module: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> list[Weight]:
    """The matrices of a module that ``include`` matches and ``exclude`` does not, in the model's order."""
    names, aliases = plain_parameters(module), tied_names(module)
    wanted = match_names(names, include, argument="include", aliases=aliases)
    wanted -= match_names(names, exclude, argument="exclude", aliases=aliases)
    return [weight for weight in find_weights(module) if weight.name in wanted]


def iter_rows(
    weights: Iterable[Weight], *, device: torch.device | str | None, solver: str, rtol: float
) -> Iterator[KappaRow]:
    """Decompose weights one after the other, each on ``device`` or, for ``None``, where it is."""
    for weight in weights:
        stored = weight.read()
        matrices = weight.view(stored)
        try:
            spectra = spectrum(matrices if device is None else matrices.to(device), solver=solver, rtol=rtol)
        except ValueError as error:
            raise ValueError(f"{weight.name}: {error}") from error
        yield _row(weight, spectra, fingerprint(stored))


def _row(weight: Weight, spectra: Spectrum, content: str) -> KappaRow:
    kappas = spectra.kappa.tolist()
    return KappaRow(
        name=weight.name,
        shape=weight.shape,
        kappa=float(spectra.kappa.mean()),
        sigma_max=float(spectra.sigma_max.max()),
        sigma_min=float(spectra.sigma_min.min()),
        log_volume=float(spectra.log_volume.sum()),
        frobenius_norm=float(torch.linalg.vector_norm(spectra.frobenius_norm)),
        rtol=float(spectra.rtol.max()),
        kappas=tuple(kappas) if weight.is_stack else None,
        dtype=_name_of(weight.dtype),
        fingerprint=content,
    )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tuple(values: list[float] | tuple[float, ...] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)

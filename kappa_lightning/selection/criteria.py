"""The criteria: each gives a row of a profile a score, and the lowest scores train first."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from kappa_lightning.arguments import as_int
from kappa_lightning.information import entropy_deficit as _entropy_deficit
from kappa_lightning.selection.expected_kappa import expected_log_kappa


class Matrix(Protocol):
    """One matrix: a tensor's, or one of a stack such as fused experts."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the matrix that acts on the inputs; a Conv kernel's is (out, in·kh·kw)."""

    @property
    def kappa(self) -> float:
        """Condition number; ∞ for a rank-deficient matrix."""

    @property
    def sigma_max(self) -> float:
        """Largest singular value, in the unit of the weights."""

    @property
    def log_volume(self) -> float:
        """Σ ln σ_i in nats; −∞ for a rank-deficient matrix."""

    @property
    def frobenius_norm(self) -> float:
        """√Σ σ_i², in the unit of the weights."""


class Scorable(Protocol):
    """What a criterion may look at: one row of a profile."""

    @property
    def name(self) -> str:
        """The parameter's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""

    @property
    def num_parameters(self) -> int:
        """Number of entries of the tensor."""

    @property
    def kappa(self) -> float:
        """Condition number, of a stack combined over its matrices; ∞ for a rank-deficient matrix."""

    @property
    def frobenius_norm(self) -> float:
        """Root of the sum of squares of all entries."""

    @property
    def matrices(self) -> Sequence[Matrix]:
        """The tensor's one matrix, or all of a stack."""

    def combine(self, values: Iterable[float]) -> float:
        """One figure from those of the matrices of a stack, as the profile's ``experts`` says."""


Criterion = Callable[[Scorable], float]
AnyCriterion = TypeVar("AnyCriterion", bound=Criterion)

CRITERIA: dict[str, Criterion] = {}
"""The criteria by name; see :func:`register_criterion`."""

REVERSED = "reversed:"
"""What stands before a criterion's name to rank the other way round."""


def register_criterion(name: str) -> Callable[[AnyCriterion], AnyCriterion]:
    """Make a function from a row to a score usable as ``criterion="its name"``, everywhere that takes a criterion.

    The lowest score trains first. ∞ is a score; NaN is refused when it comes up. Register before a callback is made,
    in every process.

    Args:
        name: not taken, and without a colon.

    Raises:
        ValueError: if the name is taken, empty or has a colon.

    Example:
        A criterion of the norm as well as of κ, on each matrix of a stack:

        >>> from torch import nn
        >>> from kappa_lightning import KappaProfile
        >>> @register_criterion("loud_and_round")
        ... @per_matrix
        ... def loud_and_round(matrix):
        ...     return matrix.kappa / matrix.frobenius_norm
        >>> profile = KappaProfile.from_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), progress=False)
        >>> len(profile.select(num_tensors=1, criterion="loud_and_round"))
        1
        >>> del CRITERIA["loud_and_round"]
    """
    if not name or ":" in name:
        raise ValueError(f"a criterion cannot be called {name!r}: give a name without a colon")
    if name in CRITERIA:
        raise ValueError(f"there is a criterion {name!r} already: choose another name")

    def add(criterion: AnyCriterion) -> AnyCriterion:
        CRITERIA[name] = criterion
        return criterion

    return add


def register(name: str) -> Callable[[AnyCriterion], AnyCriterion]:
    """The name that :func:`register_criterion` had in version 0.1."""
    warnings.warn(
        "kappa_lightning.selection.register is called register_criterion, and the old name will go with version 0.3",
        DeprecationWarning,
        stacklevel=2,
    )
    return register_criterion(name)


def per_matrix(score: Callable[[Matrix], float]) -> Criterion:
    """A criterion from the score of one matrix; those of a stack combine as its κ do (the profile's ``experts``)."""

    def criterion(row: Scorable) -> float:
        return row.combine(score(matrix) for matrix in row.matrices)

    criterion.__doc__ = score.__doc__
    return criterion


def criterion_of(name: str, seed: int = 0) -> Criterion:
    """The criterion of a name, with ``reversed:`` in front its negative.

    Args:
        name: a key of :data:`CRITERIA`, or one behind ``reversed:``.
        seed: of the criterion ``random``.

    Raises:
        TypeError: if the seed is no int.
        ValueError: if there is no such criterion.
    """
    seed = as_int(seed, "seed")
    plain = name.removeprefix(REVERSED)
    if plain not in CRITERIA:
        known = ", ".join(map(repr, CRITERIA))
        raise ValueError(f"criterion={name!r} is unknown: use one of {known}, or {REVERSED!r} and one of them")
    function = CRITERIA[plain]
    chosen = partial(random, seed=seed) if function is random else function
    return chosen if plain == name else lambda row: -chosen(row)


@register_criterion("kappa")
def kappa(row: Scorable) -> float:
    """The condition number, the paper's criterion: a low κ passes information evenly and may be retrained."""
    return row.kappa


@register_criterion("excess_kappa")
@per_matrix
def excess_kappa(matrix: Matrix) -> float:
    """ln κ less what it is expected to be for a random Gaussian matrix of that shape, in nats.

    κ grows with the size of a square matrix and shrinks as it gets longer than wide, learned or not; what is left here
    is what training put in. See :func:`~kappa_lightning.selection.expected_log_kappa`.
    """
    return math.log(matrix.kappa) - expected_log_kappa(*matrix.shape)


@register_criterion("entropy_deficit")
@per_matrix
def entropy_deficit(matrix: Matrix) -> float:
    """The nats per dimension that unequal singular values cost the output's entropy at the matrix's own norm.

    ½ ln(‖W‖_F²/r) − (Σ ln σ_i)/r with r = min(rows, cols): zero if all singular values are equal, ∞ if the matrix is
    rank-deficient. It is the paper's argument at a fixed norm with the whole spectrum in place of its two ends; see
    :func:`~kappa_lightning.information.entropy_deficit`.
    """
    return _entropy_deficit(matrix.log_volume, matrix.frobenius_norm, min(matrix.shape))


@register_criterion("stable_rank")
@per_matrix
def stable_rank(matrix: Matrix) -> float:
    """The share of ‖W‖_F² in the strongest direction, σ_max²/‖W‖_F², the reciprocal of the stable rank.

    A low stable rank says that few directions carry the matrix, so it counts as specialized, and the highest stable
    rank trains first.
    """
    if matrix.frobenius_norm == 0:
        return math.inf
    return (matrix.sigma_max / matrix.frobenius_norm) ** 2


@register_criterion("random")
def random(row: Scorable, seed: int = 0) -> float:
    """A number in [0, 1) from the tensor's name and the seed alone: a control that is the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{row.name}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48

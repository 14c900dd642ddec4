"""The argument that a value found by block Lanczos is the extreme one: how far above it another may lie."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kappa_lightning.spectra.random_blocks import BLOCK, Start
from kappa_lightning.spectra.recurrence import Recurrence

# The ratio of one gap of the grid to the next, less 1, in units of overlap/‖R‖.
# Measured against its neighbors by benchmarks/ablation.py.
_GROWTH = 0.7


@dataclass(frozen=True, slots=True)
class RitzPairs:
    """The eigendecomposition T = S diag(θ) Sᵀ of the block tridiagonal matrices of a batch.

    Attributes:
        values: θ, shape (batch, 16k), ascending.
        coordinates: S, shape (batch, 16k, 16k), of which column i belongs to θ_i.
    """

    values: Tensor
    coordinates: Tensor

    @classmethod
    def of(cls, tridiagonal: Tensor) -> "RitzPairs":
        """Decompose T, shape (batch, 16k, 16k)."""
        return cls(*torch.linalg.eigh(tridiagonal))

    def vectors(self, basis: Tensor, count: int) -> Tensor:
        """The vectors of the largest Ritz values as rows, shape (batch, count, n), float64.

        They are orthonormal up to the rounding of the run's precision.

        Args:
            basis: the rows of Q₁ … Q_k, shape (batch, 16k, n).
            count: how many of them.
        """
        vectors: Tensor = self.coordinates[..., -count:].mT.to(basis.dtype) @ basis
        return vectors.to(torch.float64)


def bracket_prospect(recurrence: Recurrence, start: Start, tolerance: float, top: Tensor) -> tuple[Tensor, Tensor]:
    """Ask at one point whether :func:`largest_eigenvalue_interval` may succeed, at a tenth of its price.

    The point is λ = (1 + tolerance)·top, and h(λ) < overlap there is what the bracket needs. One Cholesky factorization
    of λ − T gives h, or says that the largest Ritz value has passed λ. Where the answer is no, ``top`` is brought
    nearer to the largest Ritz value, and the question is asked once more.

    Args:
        recurrence: how far the run is.
        start: as there.
        tolerance: as there.
        top: a largest Ritz value of T or of an earlier, smaller T, shape (batch,).

    Returns:
        h, which is infinite where the largest Ritz value has passed λ, and a value between ``top`` and that Ritz value;
        both of shape (batch,).
    """
    h, nearer = _at_one_point(recurrence, start, tolerance, top)
    if bool(((h < start.overlap) | (nearer <= top)).all()):
        return h, nearer
    return _at_one_point(recurrence, start, tolerance, nearer)


def _at_one_point(recurrence: Recurrence, start: Start, tolerance: float, top: Tensor) -> tuple[Tensor, Tensor]:
    tridiagonal = recurrence.tridiagonal
    point = (1 + tolerance) * top[..., None, None]
    identity = torch.eye(tridiagonal.shape[-1], dtype=top.dtype, device=top.device)
    factor, info = torch.linalg.cholesky_ex(point * identity - tridiagonal)
    first_columns = torch.cholesky_solve(identity[:, :BLOCK].expand(*factor.shape[:-1], BLOCK), factor)
    passed = info != 0
    h = torch.linalg.matrix_norm(recurrence.coupling @ first_columns[..., -BLOCK:, :] @ start.triangle)
    h = h.masked_fill(passed, math.inf)
    worth = h < start.overlap
    if bool(passed.any()):
        top = torch.where(passed, torch.linalg.eigvalsh(tridiagonal)[..., -1], top)
    if not bool((passed | worth).all()):
        # A step of inverse iteration has just been done; its Ritz value lies below the largest one of T.
        usable = torch.where(passed[..., None, None], identity[:, :BLOCK], first_columns)
        directions = torch.linalg.qr(usable).Q
        ritz = torch.linalg.eigvalsh(directions.mT @ tridiagonal @ directions)[..., -1]
        top = torch.where(passed | worth, top, torch.maximum(top, ritz))
    return h, top


def largest_eigenvalue_interval(
    pairs: RitzPairs, last_coupling: Tensor, start: Start, tolerance: float, roundoff: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    r"""Bracket the largest eigenvalue of a positive semidefinite operator after k steps of block Lanczos.

    The lower end is the largest Ritz value θ. The upper end follows from the recurrence itself. Let (λ, u) be the top
    eigenpair, λ > θ, and let y = uᵀ[Q₁ … Q_k] and z = uᵀQ_{k+1}. Multiplying the Lanczos relation by uᵀ gives
    y(λ − T) = z B_k E_kᵀ, hence the start block Ω = Q₁R has seen u by

    .. math:: \|u^T \Omega\| = \|y E_1 R\| \le \|B_k E_k^T (\lambda - T)^{-1} E_1 R\| =: h(\lambda),

    while a random start block sees every u by at least ``overlap``. So no eigenvalue lies where h < overlap. h is
    evaluated on a grid; for λ in [λ_i, λ_i + δ] the same line with λ_i in place of λ adds at most δ‖(λ_i − T)⁻¹E₁R‖,
    and an error of the recurrence of norm roundoff·θ adds roundoff·θ‖(λ_i − T)⁻¹E₁R‖. Past the grid, at λ ≥ 5θ, the
    first k − 1 powers of T have no (k, 1) block, so the Neumann series gives
    h(λ) ≤ ‖B_k‖‖R‖/(λ − θ)·(θ/λ)^{k−1}, which only falls.
    Unlike a residual bound this says that the value is the extreme one, and unlike the a-priori bounds of Kuczyński
    and Woźniakowski (SIAM J. Matrix Anal. Appl. 13, 1992), which allow for the worst spectrum, it uses the spectrum
    that the run has seen.

    Args:
        pairs: the eigendecomposition of T, the block tridiagonal matrix.
        last_coupling: B_k, shape (batch, 16, 16).
        start: the block that the run started from.
        tolerance: the relative width that the caller would be content with; sets where the grid begins.
        roundoff: maps θ to the norm of the recurrence's error relative to θ, both of shape (batch,).

    Returns:
        The lower and the upper end, each of shape (batch,). The upper end is inf where nothing could be shown.
    """
    ritz, vectors = pairs.values, pairs.coordinates
    steps = ritz.shape[-1] // BLOCK
    top = ritz[..., -1].clamp(min=torch.finfo(ritz.dtype).tiny)
    # In units of the top Ritz value: h is then a pure number and the grid the same for the whole batch.
    ritz = ritz / top[..., None]
    coupling = last_coupling / top[..., None, None]
    first = start.triangle.mT @ vectors[..., :BLOCK, :]
    last = coupling @ vectors[..., -BLOCK:, :]
    longest = float(torch.linalg.matrix_norm(start.triangle, 2))

    growth = 1 + _GROWTH * start.overlap / longest
    # Far below what is asked for: what a sharp end leaves of the tolerance may be spent on the other one.
    beginning = tolerance / 16
    points = math.ceil(math.log(4.0 / beginning) / math.log(growth)) + 1
    gap = beginning * growth ** torch.arange(points, dtype=ritz.dtype, device=ritz.device)
    resolvent = 1 / (gap + (1 - ritz)[..., None])
    outer = (last[..., :, None, :] * first[..., None, :, :]).flatten(-3, -2)
    h = torch.linalg.vector_norm(outer @ resolvent, dim=-2)
    weights = first.square().sum(-2, keepdim=True)
    # The Frobenius norm is sharp near the top, where one eigenvector dominates, the other bound further out.
    spread = torch.minimum((weights @ resolvent.square()).squeeze(-2).sqrt(), longest / gap)
    step = gap * (growth - 1)
    excluded = h + (step + roundoff(top)[..., None]) * spread < start.overlap

    beyond = 1 + gap[-1]
    tail = torch.linalg.matrix_norm(coupling) / gap[-1] * beyond ** (1 - steps) + roundoff(top) / gap[-1]
    # The first grid point from which everything above is excluded.
    excluded_above = excluded.flip(-1).cummin(-1).values.flip(-1)
    index = (~excluded_above).sum(-1)
    shown = (index < points) & (tail * longest < start.overlap)
    upper = torch.where(shown, 1 + gap[index.clamp(max=points - 1)], torch.inf)
    return top, top * upper

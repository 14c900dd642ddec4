"""Bounds that turn a converged Lanczos run, or a computed factor, into a statement about the matrix itself.

All bounds rest on one fact about a Gaussian block Ω of 16 columns. For a fixed unit vector u the 16 entries of uᵀΩ are
independent standard normals, so ‖uᵀΩ‖² is χ² with 16 degrees of freedom, and P(χ²₁₆ ≤ t) = exp(−t/2) Σ_{j≥8} (t/2)ʲ/j!
is below 2.4e-11 at t = 0.36. Every use below fails with at most that probability over the draw of Ω. A matrix that
climbs the whole ladder meets at most 34 uses: on each of the three rungs with a factor one measurement of it and two
Lanczos runs, each of which starts at most twice (in float32 and in float64) and is measured at most three times in
float32; and one more float32 run, with a start block of its own, for the rotation. Together that is below the 1e-9
that the package states for each matrix.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 16
"""Columns of every random block; the probability above is for this number."""

OVERLAP = 0.6
"""‖uᵀΩ‖ is above this for a fixed unit vector u, except with probability 2.4e-11."""

# The ratio of one gap of the grid to the next, less 1, in units of the overlap.
_GROWTH = 0.7
_RECURRENCE_SEED = 0x7265_6375


def gaussian_block(rows: int, seed: int, device: torch.device) -> Tensor:
    """Return the (rows, 16) standard normal block of a seed: float64, equal on all devices, private generator."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(rows, BLOCK, generator=generator, dtype=torch.float64).to(device)


def bracket_prospect(
    diagonal_and_coupling: Tensor, last_coupling: Tensor, overlap: Tensor | float, tolerance: float, top: Tensor
) -> tuple[Tensor, Tensor]:
    """Ask at one point whether :func:`largest_eigenvalue_interval` may succeed, at a tenth of its price.

    The point is λ = (1 + tolerance)·top, and h(λ) < overlap there is what the bracket needs. One Cholesky factorisation
    of λ − T gives h, or says that the largest Ritz value has passed λ. Where the answer is no, ``top`` is brought
    nearer to the largest Ritz value, and the question is asked once more.

    Args:
        diagonal_and_coupling: T, shape (batch, 16k, 16k).
        last_coupling: B_k, shape (batch, 16, 16).
        overlap: as there.
        tolerance: as there.
        top: a largest Ritz value of T or of an earlier, smaller T, shape (batch,).

    Returns:
        h, which is infinite where the largest Ritz value has passed λ, and a value between ``top`` and that Ritz value;
        both of shape (batch,).
    """
    h, nearer = _at_one_point(diagonal_and_coupling, last_coupling, overlap, tolerance, top)
    if bool(((h < overlap) | (nearer <= top)).all()):
        return h, nearer
    return _at_one_point(diagonal_and_coupling, last_coupling, overlap, tolerance, nearer)


def _at_one_point(
    diagonal_and_coupling: Tensor, last_coupling: Tensor, overlap: Tensor | float, tolerance: float, top: Tensor
) -> tuple[Tensor, Tensor]:
    block = last_coupling.shape[-1]
    point = (1 + tolerance) * top[..., None, None]
    identity = torch.eye(diagonal_and_coupling.shape[-1], dtype=top.dtype, device=top.device)
    factor, info = torch.linalg.cholesky_ex(point * identity - diagonal_and_coupling)
    first_columns = torch.cholesky_solve(identity[:, :block].expand(*factor.shape[:-1], block), factor)
    h = torch.linalg.matrix_norm(last_coupling @ first_columns[..., -block:, :])
    passed = info != 0
    h = h.masked_fill(passed, torch.inf)
    worth = h < overlap
    if bool(passed.any()):
        top = torch.where(passed, torch.linalg.eigvalsh(diagonal_and_coupling)[..., -1], top)
    if not bool((passed | worth).all()):
        # A step of inverse iteration has just been done; its Ritz value lies below the largest one of T.
        usable = torch.where(passed[..., None, None], identity[:, :block], first_columns)
        directions = torch.linalg.qr(usable).Q
        ritz = torch.linalg.eigvalsh(directions.mT @ diagonal_and_coupling @ directions)[..., -1]
        top = torch.where(passed | worth, top, torch.maximum(top, ritz))
    return h, top


def largest_eigenvalue_interval(
    diagonal_and_coupling: Tensor,
    last_coupling: Tensor,
    overlap: Tensor | float,
    tolerance: float,
    roundoff: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    r"""Bracket the largest eigenvalue of a positive semidefinite operator after k steps of block Lanczos.

    The lower end is the largest Ritz value θ. The upper end follows from the recurrence itself. Let (λ, u) be the top
    eigenpair, λ > θ, and let y = uᵀ[Q₁ … Q_k] and z = uᵀQ_{k+1}. Multiplying the Lanczos relation by uᵀ gives
    y(λ − T) = z B_k E_kᵀ, hence the start block has seen u by

    .. math:: \|u^T Q_1\| \le \|B_k E_k^T (\lambda - T)^{-1} E_1\| =: h(\lambda),

    while a random start block has ‖uᵀQ₁‖ ≥ overlap. So no eigenvalue lies where h < overlap. h is evaluated on a
    grid; for λ in [λ_i, λ_i + δ] the same line with λ_i in place of λ adds at most δ‖(λ_i − T)⁻¹E₁‖, and an error of
    the recurrence of norm roundoff·θ adds roundoff·θ‖(λ_i − T)⁻¹E₁‖. Past the grid, at λ ≥ 5θ, the first k − 1
    powers of T have no (k, 1) block, so the Neumann series gives h(λ) ≤ ‖B_k‖/(λ − θ)·(θ/λ)^{k−1}, which only falls.
    Unlike a residual bound this says that the value is the extreme one, and unlike the a-priori bounds of Kuczyński
    and Woźniakowski (SIAM J. Matrix Anal. Appl. 13, 1992), which allow for the worst spectrum, it uses the spectrum
    that the run has seen.

    Args:
        diagonal_and_coupling: T, shape (batch, 16k, 16k), the block tridiagonal matrix.
        last_coupling: B_k, shape (batch, 16, 16).
        overlap: a lower bound of ‖uᵀQ₁‖ over unit eigenvectors u.
        tolerance: the relative width that the caller would be content with; sets where the grid begins.
        roundoff: maps θ to the norm of the recurrence's error relative to θ, both of shape (batch,).

    Returns:
        The lower and the upper end, each of shape (batch,). The upper end is inf where nothing could be shown.
    """
    block = last_coupling.shape[-1]
    steps = diagonal_and_coupling.shape[-1] // block
    ritz, vectors = torch.linalg.eigh(diagonal_and_coupling)
    top = ritz[..., -1].clamp(min=torch.finfo(ritz.dtype).tiny)
    # In units of the top Ritz value: h is then a pure number and the grid the same for the whole batch.
    ritz = ritz / top[..., None]
    coupling = last_coupling / top[..., None, None]
    first = vectors[..., :block, :]
    last = coupling @ vectors[..., -block:, :]
    smallest_overlap = float(overlap)

    growth = 1 + _GROWTH * smallest_overlap
    # Far below what is asked for: what a sharp end leaves of the tolerance may be spent on the other one.
    start = tolerance / 16
    points = math.ceil(math.log(4.0 / start) / math.log(growth)) + 1
    gap = start * growth ** torch.arange(points, dtype=ritz.dtype, device=ritz.device)
    resolvent = 1 / (gap + (1 - ritz)[..., None])
    outer = (last[..., :, None, :] * first[..., None, :, :]).flatten(-3, -2)
    h = torch.linalg.vector_norm(outer @ resolvent, dim=-2)
    weights = first.square().sum(-2, keepdim=True)
    # The Frobenius norm is sharp near the top, where one eigenvector dominates, the other bound further out.
    spread = torch.minimum((weights @ resolvent.square()).squeeze(-2).sqrt(), 1 / gap)
    step = gap * (growth - 1)
    excluded = h + (step + roundoff(top)[..., None]) * spread < smallest_overlap

    beyond = 1 + gap[-1]
    tail = torch.linalg.matrix_norm(coupling) / gap[-1] * beyond ** (1 - steps) + roundoff(top) / gap[-1]
    # The first grid point from which everything above is excluded.
    excluded_above = excluded.flip(-1).cummin(-1).values.flip(-1)
    index = (~excluded_above).sum(-1)
    shown = (index < points) & (tail < smallest_overlap)
    upper = torch.where(shown, 1 + gap[index.clamp(max=points - 1)], torch.inf)
    return top, top * upper


def recurrence_error(
    basis: Tensor, diagonal_and_coupling: Tensor, last_coupling: Tensor, operator: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    r"""Measure what is wrong with a block Lanczos recurrence that was computed in lower precision.

    With M the operator and E = M[Q₁ … Q_k] − [Q₁ … Q_k]T − Q_{k+1}B_kE_kᵀ as the numbers stand, E is applied in
    float64 to a Gaussian block G, and ‖E‖₂ ≤ ‖EG‖_F / 0.6 except with probability 2.4e-11. The argument of
    :func:`largest_eigenvalue_interval` then holds with ‖E‖₂ as the error of the recurrence, and the Ritz vector s has a
    Rayleigh quotient of at least θ − ‖E‖₂/√(1−d) − d‖B_k‖/(1−d), where d = ‖QᵀQ − I‖₂ is measured as well.

    Args:
        basis: the rows of Q₁ … Q_{k+1}, shape (batch, 16(k + 1), n).
        diagonal_and_coupling: T, shape (batch, 16k, 16k), float64.
        last_coupling: B_k, shape (batch, 16, 16), float64.
        operator: M in float64, (batch, 16, n) to the same shape.

    Returns:
        The bound of ‖E‖₂, and d; both of shape (batch,).
    """
    wide = basis.to(torch.float64)
    inner = diagonal_and_coupling.shape[-1]
    probe = gaussian_block(inner, _RECURRENCE_SEED, basis.device).mT.expand(len(basis), -1, -1)
    error = operator(probe @ wide[:, :inner])
    error = torch.baddbmm(error, probe @ diagonal_and_coupling, wide[:, :inner], alpha=-1.0)
    error = torch.baddbmm(error, probe[..., -BLOCK:] @ last_coupling.mT, wide[:, inner:], alpha=-1.0)
    identity = torch.eye(wide.shape[-2], dtype=wide.dtype, device=wide.device)
    return (
        torch.linalg.matrix_norm(error) / OVERLAP,
        torch.linalg.matrix_norm(wide @ wide.mT - identity),
    )

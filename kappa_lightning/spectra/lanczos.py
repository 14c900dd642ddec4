"""Block Lanczos for the largest eigenvalue of a positive semidefinite operator, with a bracket that holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kappa_lightning.spectra.certificate import (
    BLOCK,
    OVERLAP,
    bracket_prospect,
    gaussian_block,
    largest_eigenvalue_interval,
    recurrence_error,
)

MAX_STEPS = 40
BASIS_COLUMNS = BLOCK * (MAX_STEPS + 1)
# A Cholesky factor with nothing smaller on its diagonal magnifies no rounding error that could matter.
_ORTHONORMAL = 0.9
# Of the steps that a run seems to need still, the share that it takes before it is asked again.
_PATIENCE = 0.7
# How often a run in float32 is measured before it is given up; the certificate counts them.
_MEASUREMENTS = 3
# ‖QᵀQ − I‖ up to which a basis in float32 is taken for orthonormal.
_MOST_SKEW = 1e-3
START_SEED = 0x6B61_7070


@dataclass(frozen=True, slots=True)
class LargestEigenvalue:
    """What a run of block Lanczos knows about the largest eigenvalue of each operator of a batch.

    Attributes:
        lower: no eigenvalue is the largest below this; shape (batch,).
        ritz: the largest Ritz value, far closer than the ends; ``lower`` itself unless the run was in float32.
        upper: none is above this; further away than asked, or inf, where the run did not settle within its steps.
        basis: the rows of Q₁ … Q_k, shape (batch, 16k, n), in the run's precision.
        tridiagonal: T, shape (batch, 16k, 16k), float64.
    """

    lower: Tensor
    ritz: Tensor
    upper: Tensor
    basis: Tensor
    tridiagonal: Tensor

    def ritz_vectors(self, count: int) -> Tensor:
        """Return the vectors of the largest Ritz values as rows, shape (batch, count, n), float64.

        They are orthonormal up to the rounding of the run's precision.
        """
        coordinates = torch.linalg.eigh(self.tridiagonal).eigenvectors[..., -count:].mT
        vectors: Tensor = coordinates.to(self.basis.dtype) @ self.basis
        return vectors.to(torch.float64)


def largest_eigenvalue(
    operator: Callable[[Tensor], Tensor],
    size: int,
    batch: int,
    *,
    device: torch.device,
    tolerance: float,
    roundoff: Callable[[Tensor], Tensor] = torch.zeros_like,
    exact: Callable[[Tensor], Tensor] | None = None,
    max_steps: int = MAX_STEPS,
    seed: int = START_SEED,
) -> LargestEigenvalue:
    """Bracket the largest eigenvalue of a batch of symmetric positive semidefinite operators.

    Sixteen vectors at a time, with full reorthogonalisation, because the block is what makes both the matrix products
    and the certificate cheap. The whole batch takes the same steps; the host asks whether it has settled, after
    each of the first ones and then less often, as far as the end seems to be away.

    Args:
        operator: maps (batch, 16, size) to the same shape: blocks come as rows, the layout in which float64 products
            with a large matrix run several times faster on a CPU.
        size: the order n of the operator.
        batch: how many operators there are.
        device: where to work.
        tolerance: wanted (upper − lower) / lower.
        roundoff: maps a largest eigenvalue to the relative error of one application of the operator in float64, both of
            shape (batch,), beside the 1e-12 that is always allowed for.
        exact: the operator in float64, if the run and ``operator`` are to be in float32; what that did to the
            recurrence is measured with it.
        max_steps: how many to take at most. A run that is cut shorter than usual, and has no prospect of ``tolerance``
            at its end, spares itself the bracket.
        seed: of the start block, which must not depend on anything that the operator was made with.

    Returns:
        The ends of :func:`.certificate.largest_eigenvalue_interval`, and the Ritz value with its vectors. Lower end,
        Ritz value and upper end are 0, 0 and inf for an operator whose numbers overflow, and the lower and the upper
        end are 0 and inf where a run that was cut short has shown nothing.
    """
    # The basis must keep room for one more block, or there is nothing left to be orthogonal to.
    steps = min(max_steps, size // BLOCK - 1)
    if steps < 2:
        raise ValueError(f"block Lanczos needs an operator of order at least {3 * BLOCK}, got {size}")
    start = gaussian_block(size, seed, device)
    dtype = torch.float64 if exact is None else torch.float32
    # What rounding the start block to float32 can take from its overlap is far less than the last term.
    orthonormal, triangle = torch.linalg.qr(start)
    overlap = OVERLAP / float(torch.linalg.matrix_norm(triangle, 2)) - (0.0 if exact is None else 1e-5)
    basis = torch.empty(batch, BLOCK * (steps + 1), size, dtype=dtype, device=device)
    basis[:, :BLOCK] = orthonormal.mT
    # Filler for directions in which the Krylov space ends (an orthogonal matrix ends it at once).
    filler = basis[:1, :BLOCK].roll(1, dims=-1) * (1e-14 if exact is None else 1e-7)
    tridiagonal = start.new_zeros(batch, 0, 0)

    lower = start.new_zeros(batch)
    ritz, upper = lower, lower + torch.inf
    coupling = start[:0]
    ask_again, asked, previous = 1, 0, math.inf
    measured = 0
    for step in range(steps):
        done = (step + 1) * BLOCK
        before, here = slice(done - 2 * BLOCK, done - BLOCK), slice(done - BLOCK, done)
        spanned = basis[:, :done]
        image = operator(basis[:, here])
        projection = image @ spanned.mT
        diagonal = projection[..., -BLOCK:].to(torch.float64)
        tridiagonal = torch.nn.functional.pad(tridiagonal, (0, BLOCK, 0, BLOCK))
        if step:
            tridiagonal[..., here, before] = coupling
            tridiagonal[..., before, here] = coupling.mT
        tridiagonal[..., here, here] = (diagonal + diagonal.mT) / 2
        image = torch.baddbmm(image, projection, spanned, alpha=-1.0)
        image = image + filler * torch.linalg.matrix_norm(diagonal).to(dtype)[..., None, None]
        block, coupling = _orthonormalise(image, spanned)
        coupling = coupling.to(torch.float64)
        basis[:, done : done + BLOCK] = block
        # The inverse of a matrix that is singular beyond float64's range overflows, and nothing can be said of it.
        lost = ~(tridiagonal.isfinite().all((-2, -1)) & coupling.isfinite().all((-2, -1)))
        known, outward = tridiagonal.masked_fill(lost[:, None, None], 0.0), coupling.nan_to_num()
        last = step == steps - 1
        if step < ask_again and not last:
            continue
        if not last or max_steps < MAX_STEPS:
            h, ritz = bracket_prospect(known, outward, overlap, tolerance, ritz)
            distance = math.log(max(float((h / overlap).masked_fill(lost, 0.0).max()), 0.1))
            if distance >= 0:
                ask_again = step + _steps_to_skip(distance, (previous - distance) / (step - asked))
                previous, asked = distance, step
                continue
        if exact is None:
            ritz, upper = largest_eigenvalue_interval(
                known, outward, overlap, tolerance, lambda top: 1e-12 + roundoff(top)
            )
            lower = ritz
        else:
            measured += 1
            lower, ritz, upper = _measured_interval(
                basis[:, : done + BLOCK], known, outward, overlap, tolerance, exact, roundoff
            )
        lower, ritz = lower.masked_fill(lost, 0.0), ritz.masked_fill(lost, 0.0)
        upper = upper.masked_fill(lost, torch.inf)
        if measured == _MEASUREMENTS or bool((lost | (upper <= (1 + tolerance) * lower)).all()):
            break
    return LargestEigenvalue(lower, ritz, upper, basis[:, :done], known)


def _steps_to_skip(distance: float, slope: float) -> int:
    """How many steps to take before asking again, with ln(h/overlap) = ``distance`` and so much less in each step."""
    return max(1, int(_PATIENCE * distance / slope)) if 0 < slope < math.inf and distance < math.inf else 1


def _measured_interval(
    basis: Tensor,
    tridiagonal: Tensor,
    coupling: Tensor,
    overlap: float,
    tolerance: float,
    exact: Callable[[Tensor], Tensor],
    roundoff: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Bracket as :func:`.certificate.largest_eigenvalue_interval` does, after a run in float32."""
    error, skew = recurrence_error(basis, tridiagonal, coupling, exact)
    reach = torch.linalg.matrix_norm(coupling)
    # B_k stands in h with a block Q_{k+1} whose norm is not quite 1.
    stretched = coupling * (1 + skew).sqrt()[:, None, None]
    # uᵀ[Q₁ … Q_k] may be a little longer than u, and what it is a bound of grows with it.
    seen = overlap / math.sqrt(1 + _MOST_SKEW)
    ritz, upper = largest_eigenvalue_interval(
        tridiagonal, stretched, seen, tolerance, lambda top: 1e-12 + roundoff(top) + error / top
    )
    lower = ritz - error / (1 - skew).sqrt() - skew * reach / (1 - skew)
    sound = (skew < _MOST_SKEW) & (lower > 0)
    return lower.where(sound, 0.0), ritz.where(sound, 0.0), upper.where(sound, torch.inf)


def _orthonormalise(image: Tensor, spanned: Tensor) -> tuple[Tensor, Tensor]:
    """Factor imageᵀ = blockᵀ @ coupling with the rows of block orthonormal and orthogonal to those of ``spanned``.

    Shifted Cholesky QR, three passes (Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, SIAM J. Sci. Comput. 42,
    2020): matrix products and 16×16 factorisations only, where a GPU's batched Householder QR would dominate the run.
    The shift stands for directions that have ended, and is left out where none has: then two passes are enough.
    """
    coupling = torch.eye(BLOCK, dtype=image.dtype, device=image.device)
    identity = coupling
    # About 45 units of rounding.
    level = 1e-14 if image.dtype == torch.float64 else 5e-6
    for sweep in range(3):
        if sweep:
            image = torch.baddbmm(image, image @ spanned.mT, spanned, alpha=-1.0)
        gram = image @ image.mT
        shift = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] * level + torch.finfo(image.dtype).tiny
        settled = False
        if sweep == 0:
            factor = torch.linalg.cholesky_ex(gram + shift * identity).L
        else:
            factor = torch.linalg.cholesky_ex(gram + torch.finfo(image.dtype).tiny * identity).L
            orthonormal = (factor.diagonal(dim1=-2, dim2=-1) > _ORTHONORMAL).all(-1)
            settled = bool(orthonormal.all())
            if sweep == 1 and not settled:
                shifted = torch.linalg.cholesky_ex(gram + shift * identity).L
                factor = torch.where(orthonormal[:, None, None], factor, shifted)
        # From the right on columns, whose result lies in memory as the rows that the products want.
        image = torch.linalg.solve_triangular(factor.mT, image.mT, upper=True, left=False).mT
        coupling = factor.mT @ coupling
        if settled:
            break
    return image, coupling

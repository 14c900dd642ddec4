"""Block Lanczos for the largest eigenvalue of a positive semidefinite operator, with a bracket that holds."""

from collections.abc import Callable

import torch
from torch import Tensor

from kappa_lightning.spectra.certificate import (
    BLOCK,
    OVERLAP,
    gaussian_block,
    largest_eigenvalue_interval,
    worth_bracketing,
)

MAX_STEPS = 40
BASIS_COLUMNS = BLOCK * (MAX_STEPS + 1)
# A Cholesky factor with nothing smaller on its diagonal magnifies no rounding error that could matter.
_ORTHONORMAL = 0.9
_START_SEED = 0x6B61_7070


def largest_eigenvalue(
    operator: Callable[[Tensor], Tensor],
    size: int,
    batch: int,
    *,
    device: torch.device,
    tolerance: float,
    roundoff: Callable[[Tensor], Tensor] = torch.zeros_like,
) -> tuple[Tensor, Tensor]:
    """Bracket the largest eigenvalue of a batch of symmetric positive semidefinite operators.

    Sixteen vectors at a time, with full reorthogonalisation, because the block is what makes both the matrix products
    and the certificate cheap. The whole batch takes the same steps; after each the host asks whether it
    has settled.

    Args:
        operator: maps (batch, 16, size) to the same shape: blocks come as rows, the layout in which float64 products
            with a large matrix run several times faster on a CPU.
        size: the order n of the operator.
        batch: how many operators there are.
        device: where to work, in float64.
        tolerance: wanted (upper − lower) / lower.
        roundoff: maps a largest eigenvalue to the relative error of one application of the operator, both of shape
            (batch,), beside the 1e-12 that is always allowed for.

    Returns:
        Lower and upper end, each of shape (batch,); see :func:`.certificate.largest_eigenvalue_interval`. The upper end
        may be further away than asked, or inf, where the run did not settle within its steps. They are 0 and inf for an
        operator whose numbers overflow.
    """
    # The basis must keep room for one more block, or there is nothing left to be orthogonal to.
    steps = min(MAX_STEPS, size // BLOCK - 1)
    if steps < 2:
        raise ValueError(f"block Lanczos needs an operator of order at least {3 * BLOCK}, got {size}")
    start = gaussian_block(size, _START_SEED, device)
    overlap = OVERLAP / float(torch.linalg.matrix_norm(start, 2))
    basis = start.new_empty(batch, BLOCK * (steps + 1), size)
    basis[:, :BLOCK] = torch.linalg.qr(start).Q.mT
    # Filler for directions in which the Krylov space ends (an orthogonal matrix ends it at once); far below roundoff.
    filler = basis[:1, :BLOCK].roll(1, dims=-1) * 1e-14
    tridiagonal = start.new_zeros(batch, 0, 0)

    lower = start.new_zeros(batch)
    upper = lower + torch.inf
    coupling = start[:0]
    for step in range(steps):
        done = (step + 1) * BLOCK
        before, here = slice(done - 2 * BLOCK, done - BLOCK), slice(done - BLOCK, done)
        spanned = basis[:, :done]
        image = operator(basis[:, here])
        projection = image @ spanned.mT
        diagonal = projection[..., -BLOCK:]
        tridiagonal = torch.nn.functional.pad(tridiagonal, (0, BLOCK, 0, BLOCK))
        if step:
            tridiagonal[..., here, before] = coupling
            tridiagonal[..., before, here] = coupling.mT
        tridiagonal[..., here, here] = (diagonal + diagonal.mT) / 2
        image = torch.baddbmm(image, projection, spanned, alpha=-1.0)
        image = image + filler * torch.linalg.matrix_norm(diagonal)[..., None, None]
        block, coupling = _orthonormalise(image, spanned)
        basis[:, done : done + BLOCK] = block
        # The inverse of a matrix that is singular beyond float64's range overflows, and nothing can be said of it.
        lost = ~(tridiagonal.isfinite().all((-2, -1)) & coupling.isfinite().all((-2, -1)))
        known, outward = tridiagonal.masked_fill(lost[:, None, None], 0.0), coupling.nan_to_num()
        if step < steps - 1:
            worth, lower = worth_bracketing(known, outward, overlap, tolerance, lower)
            if not bool((worth | lost).all()):
                continue
        lower, upper = largest_eigenvalue_interval(
            known, outward, overlap, tolerance, lambda top: 1e-12 + roundoff(top)
        )
        lower, upper = lower.masked_fill(lost, 0.0), upper.masked_fill(lost, torch.inf)
        if bool((lost | (upper <= (1 + tolerance) * lower)).all()):
            break
    return lower, upper


def _orthonormalise(image: Tensor, spanned: Tensor) -> tuple[Tensor, Tensor]:
    """Factor imageᵀ = blockᵀ @ coupling with the rows of block orthonormal and orthogonal to those of ``spanned``.

    Shifted Cholesky QR, three passes (Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, SIAM J. Sci. Comput. 42,
    2020): matrix products and 16×16 factorisations only, where a GPU's batched Householder QR would dominate the run.
    The third pass is for blocks in which directions end; where the second found an orthonormal one it is left out.
    """
    coupling = torch.eye(BLOCK, dtype=image.dtype, device=image.device)
    identity = coupling
    for sweep in range(3):
        if sweep:
            image = torch.baddbmm(image, image @ spanned.mT, spanned, alpha=-1.0)
        gram = image @ image.mT
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        shift = (trace if sweep < 2 else 0.0 * trace) * 1e-14 + torch.finfo(image.dtype).tiny
        factor = torch.linalg.cholesky_ex(gram + shift * identity).L
        # From the right on columns, whose result lies in memory as the rows that the products want.
        image = torch.linalg.solve_triangular(factor.mT, image.mT, upper=True, left=False).mT
        coupling = factor.mT @ coupling
        if sweep == 1 and bool((factor.diagonal(dim1=-2, dim2=-1) > _ORTHONORMAL).all()):
            break
    return image, coupling

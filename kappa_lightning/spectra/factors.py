"""Factors R with RᵀR ≈ AᵀA by Cholesky, LU and QR."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kappa_lightning.spectra.matrices import TallMatrices
from kappa_lightning.spectra.products import Operator, full_precision_products, gram_product
from kappa_lightning.spectra.rotation import Rotation

# Column blocks of the Gram matrix; nothing is computed below them, which saves up to 7/16 of the work of a full
# product.
# Measured against its neighbors by benchmarks/ablation.py.
_GRAM_BLOCKS = 8
_NARROWEST_GRAM_BLOCK = 128
# Batched LAPACK-like kernels of a GPU are written for small matrices; above this order a loop of single calls is
# faster.
_LARGEST_BATCHED_ORDER = 512


@dataclass(frozen=True, slots=True)
class Factor:
    """A square R that stands for A: RᵀR ≈ AᵀA.

    The maps take a block of vectors as rows, X of shape (count, 16, n).

    Attributes:
        solve: X ↦ (R⁻¹Xᵀ)ᵀ.
        solve_transposed: X ↦ (R⁻ᵀXᵀ)ᵀ.
        gram: X ↦ XAᵀA or XRᵀR, whichever is at hand.
        order: n.
        log_volume: ln |det R|, shape (count,).
        dense: makes matrices of shape (count, n, n) with the singular values of R, or of A up to rounding in float64.
        gram32: makes ``gram`` for float32 vectors, on devices that gain by it.
        inverse32: X ↦ (R⁻¹R⁻ᵀXᵀ)ᵀ for float32 vectors, where R came from float32.
    """

    solve: Callable[[Tensor], Tensor]
    solve_transposed: Callable[[Tensor], Tensor]
    gram: Callable[[Tensor], Tensor]
    order: int
    log_volume: Tensor
    dense: Callable[[], Tensor]
    gram32: Callable[[], Operator] | None = None
    inverse32: Operator | None = None

    def inverse(self, block: Tensor) -> Tensor:
        """X ↦ (R⁻¹R⁻ᵀXᵀ)ᵀ."""
        return self.solve(self.solve_transposed(block))

    def rotated_back(self, rotation: Rotation) -> "Factor":
        """Return RHᵀ, which stands for A if R stands for AH."""
        return replace(
            self,
            solve=lambda block: rotation.back(self.solve(block)),
            solve_transposed=lambda block: self.solve_transposed(rotation.of_rows(block)),
            gram=lambda block: rotation.back(self.gram(rotation.of_rows(block))),
            gram32=None,
            inverse32=None,
        )


def gram_matrix(matrices: TallMatrices, dtype: torch.dtype, rows: int, rotation: Rotation | None = None) -> Tensor:
    """Accumulate AᵀA over blocks of rows.

    Args:
        matrices: shape (count, m, n).
        dtype: float32 or float64, the precision of the products.
        rows: how many rows to convert at a time; bounds the extra memory to count·rows·n numbers.
        rotation: an orthogonal H, to take AH in place of A.

    Returns:
        Shape (count, n, n), of which only the upper triangle is meant.
    """
    n = matrices.cols
    width = max(-(-n // _GRAM_BLOCKS), min(n, _NARROWEST_GRAM_BLOCK))
    gram = torch.empty(matrices.count, n, n, dtype=dtype, device=matrices.entries.device)
    with full_precision_products(dtype):
        for index, part in enumerate(matrices.row_blocks(dtype, rows)):
            if rotation is not None:
                part = rotation.of_rows(part)
            for first in range(0, n, width):
                target = gram[..., first : first + width, first:]
                # beta = 0 makes the first block overwrite what the fresh memory holds.
                target.baddbmm_(part[..., first : first + width].mT, part[..., first:], beta=float(index > 0))
    return gram


def gram_cholesky(gram: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    """Factor by Cholesky of the Gram matrix.

    The fastest factor there is on every device, since nearly all of it is a matrix product; it works on the square of
    κ and gives out, or turns out inaccurate in
    :func:`~kappa_lightning.spectra.backward_error.compare`, once κ²·eps is no longer small.

    Args:
        gram: shape (count, n, n); only the upper triangle is read.
        in_place: whether its memory may be used for the factor.

    Returns:
        The upper triangular factors, same shape, and whether the factorization went through, shape (count,). Where it
        did not, R is the identity.
    """
    # As the lower factor of the transpose, which LAPACK computes a quarter faster from the same entries.
    lower = gram.mT
    if in_place and gram.device.type == "cpu":
        info = torch.empty(len(gram), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
    else:
        lower, info = _each(torch.linalg.cholesky_ex, lower)
    factor = lower.mT
    found = (info == 0) & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    if not bool(found.all()):
        factor[~found] = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return factor, found


def mirror_upper(gram: Tensor) -> Tensor:
    """Make matrices of shape (count, n, n) symmetric in place by copying what is above the diagonal."""
    n = gram.shape[-1]
    for first in range(0, n, _NARROWEST_GRAM_BLOCK):
        last = min(first + _NARROWEST_GRAM_BLOCK, n)
        corner = gram[..., first:last, first:last]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        gram[..., first:last, :first] = gram[..., :first, first:last].mT
    return gram


def qr_factor(matrices: TallMatrices, rows: int) -> Tensor:
    """Factor by Householder QR in float64, over blocks of rows (TSQR), which is backward stable whatever κ.

    Each block of rows is stacked under the R so far, so the extra memory is that of one block and one n×n triangle
    (Demmel, Grigori, Hoemmen, Langou, SIAM J. Sci. Comput. 34, 2012).

    Returns:
        The upper triangular factors, float64, shape (count, n, n); the diagonal may be negative or zero.
    """
    blocks = matrices.row_blocks(torch.float64, max(rows, matrices.cols))
    factor: Tensor = torch.linalg.qr(next(blocks), mode="r").R
    for part in blocks:
        factor = torch.linalg.qr(torch.cat([factor, part], dim=-2), mode="r").R
    return factor


def lu_factor(matrices: TallMatrices, rows: int) -> Factor:
    """Factor square matrices by LU with partial pivoting in float64: R = PLU, which need not be triangular.

    Half the arithmetic of a Gram matrix of a square, and its error grows with κ instead of κ². It needs no bound on the
    growth of the pivots: :func:`~kappa_lightning.spectra.backward_error.compare` sees what they did.

    Args:
        matrices: shape (count, n, n).
        rows: how many rows to convert at a time where A itself is multiplied.
    """
    # Columns contiguous, as LAPACK wants them; or every solve would copy the factor.
    factor = matrices.scaled(torch.float64).mT.contiguous().mT
    pivots = torch.empty(*factor.shape[:-1], dtype=torch.int32, device=factor.device)
    # In place, since its own copy of the matrix would be as large as the factor.
    torch.linalg.lu_factor_ex(factor, out=(factor, pivots, pivots.new_empty(len(factor))))
    fill_pivots(factor)
    return Factor(
        solve=lambda block: torch.linalg.lu_solve(factor, pivots, block.mT).mT,
        solve_transposed=lambda block: torch.linalg.lu_solve(factor, pivots, block.mT, adjoint=True).mT,
        gram=lambda block: gram_product(block, matrices.row_blocks(torch.float64, rows)),
        order=matrices.cols,
        log_volume=_log_diagonal(factor),
        dense=lambda: matrices.scaled(torch.float64),
    )


def triangular_factor(factor: Tensor, gram: Tensor | None = None) -> Factor:
    """Wrap upper triangular R of nonzero diagonal; ``gram`` is RᵀR where it is known; both of shape (count, n, n).

    An R in float32 is worked with in float64, and, where the device gains by it, in float32 as well.
    """
    quick, factor = factor, factor.to(torch.float64)
    solve: Callable[[Tensor], Tensor]
    solve_transposed: Callable[[Tensor], Tensor]
    if factor.device.type == "cuda":
        # With 16 right-hand sides a substitution leaves a GPU idle; it pays to invert once and multiply.
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
        (inverse,) = _each(lambda r, i: (torch.linalg.solve_triangular(r, i, upper=True),), factor, identity)
        solve, solve_transposed = (lambda block: block @ inverse.mT), (lambda block: block @ inverse)
    else:
        solve = lambda block: torch.linalg.solve_triangular(factor, block.mT, upper=True).mT  # noqa: E731
        solve_transposed = lambda block: torch.linalg.solve_triangular(factor.mT, block.mT, upper=False).mT  # noqa: E731
    return Factor(
        solve,
        solve_transposed,
        (lambda block: (block @ factor.mT) @ factor) if gram is None else (lambda block: block @ gram),
        factor.shape[-1],
        _log_diagonal(factor),
        lambda: factor,
        gram32=_rounded_gram(quick if gram is None else gram, is_root=gram is None),
        inverse32=_inverse_of(quick) if quick.dtype == torch.float32 and quick.device.type == "cpu" else None,
    )


def _rounded_gram(matrix: Tensor, is_root: bool) -> Callable[[], Operator] | None:
    """Make X ↦ XMᵀM, or XM, in float32 on a CPU."""
    if matrix.device.type != "cpu":
        return None

    def make() -> Operator:
        rounded = matrix.to(torch.float32)
        return (lambda block: gram_product(block, [rounded])) if is_root else (lambda block: block @ rounded)

    return make


def _inverse_of(upper: Tensor) -> Operator:
    def inverse(block: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(upper.mT, block.mT, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(upper, half, upper=True)
        return solved.mT

    return inverse


def fill_pivots(factor: Tensor) -> None:
    """Move pivots near zero, which would stop the solves, by eps·max|R|: less than the factorization's own rounding."""
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    largest = torch.maximum(factor.amax((-2, -1)), -factor.amin((-2, -1)))
    floor = torch.finfo(factor.dtype).eps * largest[:, None]
    diagonal.copy_(torch.where(diagonal.abs() < floor, floor, diagonal))


def _log_diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def _each(function: Callable[..., tuple[Tensor, ...]], *stacks: Tensor) -> tuple[Tensor, ...]:
    """Apply a batched function, on a GPU one large matrix at a time; without waiting for the device either way."""
    if stacks[0].device.type != "cuda" or stacks[0].shape[-1] <= _LARGEST_BATCHED_ORDER:
        return tuple(function(*stacks))
    results = [function(*members) for members in zip(*stacks, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))

"""Factors R with RᵀR ≈ AᵀA by Cholesky, LU and QR, and the measurement of how far R's singular values are from A's."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kappa_lightning.spectra.certificate import OVERLAP, gaussian_block
from kappa_lightning.spectra.rotation import Rotation
from kappa_lightning.spectra.scaling import TallMatrices

_PROBE_SEED = 0x6C69_6768
# Column blocks of the Gram matrix; nothing is computed below them, which saves up to 7/16 of the work of a full
# product.
_GRAM_BLOCKS = 8
_NARROWEST_GRAM_BLOCK = 128
# Batched LAPACK-like kernels of a GPU are written for small matrices; above this order a loop of single calls is
# faster.
_LARGEST_BATCHED_ORDER = 512

_PRODUCTS: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul"))  # noqa: B009

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Factor:
    """A square R that stands for A: RᵀR ≈ AᵀA.

    The maps take a block of vectors as rows, X of shape (count, 16, n).

    Attributes:
        solve: X ↦ (R⁻¹Xᵀ)ᵀ.
        solve_transposed: X ↦ (R⁻ᵀXᵀ)ᵀ.
        gram: X ↦ XAᵀA or XRᵀR, whichever is at hand.
        log_volume: ln |det R|, shape (count,).
        matrix: shape (count, n, n), with the singular values of R.
        gram32: makes ``gram`` for float32 vectors, on devices that gain by it.
        inverse32: X ↦ (R⁻¹R⁻ᵀXᵀ)ᵀ for float32 vectors, where R came from float32.
    """

    solve: Callable[[Tensor], Tensor]
    solve_transposed: Callable[[Tensor], Tensor]
    gram: Callable[[Tensor], Tensor]
    log_volume: Tensor
    matrix: Tensor
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


def gram_cholesky(
    matrices: TallMatrices, dtype: torch.dtype, rows: int, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Factor by Cholesky of the Gram matrix, accumulated over blocks of rows.

    The fastest factor there is on every device, since nearly all of it is a matrix product; it works on the square of
    κ and gives out, or turns out inaccurate in :func:`relative_backward_error`, once κ²·eps is no longer small.

    Args:
        matrices: shape (count, m, n).
        dtype: float32 or float64, the precision of the products and of the factorisation.
        rows: how many rows to convert at a time; bounds the extra memory to count·rows·n numbers beside G and R.
        rotation: an orthogonal H, to factor AH in place of A.

    Returns:
        The Gram matrices, shape (count, n, n), of which only the upper triangle is meant, the upper triangular factors,
        same shape, and whether the factorisation went through, shape (count,). Where it did not, R is the identity.
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
    # As the lower factor of the transpose, which LAPACK computes a quarter faster from the same entries.
    lower, info = _each(torch.linalg.cholesky_ex, gram.mT)
    factor = lower.mT
    found = (info == 0) & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    if not bool(found.all()):
        factor[~found] = torch.eye(n, dtype=dtype, device=gram.device)
    return gram, factor, found


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


def lu_factor(matrices: TallMatrices) -> Factor:
    """Factor square matrices by LU with partial pivoting in float64: R = PLU, which need not be triangular.

    Half the arithmetic of a Gram matrix of a square, and its error grows with κ instead of κ². It needs no bound on the
    growth of the pivots: :func:`relative_backward_error` sees what they did.

    Returns:
        The factor, whose ``matrix`` is A itself.
    """
    matrix = matrices.scaled(torch.float64)
    factor, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    fill_pivots(factor)
    return Factor(
        solve=lambda block: torch.linalg.lu_solve(factor, pivots, block.mT).mT,
        solve_transposed=lambda block: torch.linalg.lu_solve(factor, pivots, block.mT, adjoint=True).mT,
        gram=lambda block: (block @ matrix.mT) @ matrix,
        log_volume=_log_diagonal(factor),
        matrix=matrix,
        gram32=_rounded_gram(matrix, is_root=True),
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
        _log_diagonal(factor),
        factor,
        gram32=_rounded_gram(quick if gram is None else gram, is_root=gram is None),
        inverse32=_inverse_of(quick) if quick.dtype == torch.float32 and quick.device.type == "cpu" else None,
    )


def _rounded_gram(matrix: Tensor, is_root: bool) -> Callable[[], Operator] | None:
    """Make X ↦ XMᵀM, or XM, in float32 on a CPU: half the memory that a product with 16 vectors has to read."""
    if matrix.device.type != "cpu":
        return None

    def make() -> Operator:
        rounded = matrix.to(torch.float32)
        return (lambda block: (block @ rounded.mT) @ rounded) if is_root else (lambda block: block @ rounded)

    return make


def _inverse_of(upper: Tensor) -> Operator:
    def inverse(block: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(upper.mT, block.mT, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(upper, half, upper=True)
        return solved.mT

    return inverse


def fill_pivots(factor: Tensor) -> None:
    """Move pivots near zero, which would stop the solves, by eps·max|R|: less than the factorisation's own rounding."""
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    largest = torch.maximum(factor.amax((-2, -1)), -factor.amin((-2, -1)))
    floor = torch.finfo(factor.dtype).eps * largest[:, None]
    diagonal.copy_(torch.where(diagonal.abs() < floor, floor, diagonal))


def _log_diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def relative_backward_error(
    row_blocks: Callable[[], Iterable[Tensor]], factor: Factor, powers: int, enough: float = 0.0
) -> tuple[Tensor, Tensor]:
    r"""Measure how well R stands for A: every σ_i(A)² is σ_i(R)² times a factor in [1 − f, 1 + f].

    With F = R⁻ᵀAᵀAR⁻¹ − I and f = ‖F‖₂ < 1, Ostrowski's theorem applied to A = (AR⁻¹)R gives the statement for every
    i at once (Eisenstat and Ipsen, SIAM J. Numer. Anal. 32, 1995, theorem 3.1). F is not formed: it is applied, in
    float64 and with the caller's matrix, to a Gaussian block Ω, and since ‖F^pΩ‖_F ≥ ‖F‖₂^p ‖uᵀΩ‖ for its top
    eigenvector u,

    .. math:: f \le (\|F^p \Omega\|_F / 0.6)^{1/p}

    except with probability 2.4e-11. Whatever spoilt R counts: precision, TF32, the squared κ of a Gram matrix, a
    half-broken BLAS. Rounding while measuring adds about κ·eps to f.

    Args:
        row_blocks: reads the A's from top to bottom, in float64, each block of shape (count, some rows, n).
        factor: the R's.
        powers: the largest p; each costs another reading of A and makes the bound sharper, for p = 1 it exceeds ‖F‖₂
            by up to √(16n/0.36).
        enough: f below which no more powers are taken.

    Returns:
        f, inf where it is not below 1, and ‖A‖_F² accumulated in float64 on the way; both of shape (count,).
    """
    device, (count, _, n) = factor.matrix.device, factor.matrix.shape
    probe = gaussian_block(n, _PROBE_SEED, device).mT.expand(count, -1, -1)
    image = probe
    norm_squared = torch.zeros(count, dtype=torch.float64, device=device)
    for power in range(powers):
        solved = factor.solve(image)
        product = torch.zeros_like(solved)
        for part in row_blocks():
            product.baddbmm_(solved @ part.mT, part)
            if power == 0:
                norm_squared += torch.linalg.vector_norm(part, dim=(-2, -1)).square()
        image = factor.solve_transposed(product) - image
        error = (torch.linalg.vector_norm(image, dim=(-2, -1)) / OVERLAP) ** (1 / (power + 1))
        if power + 1 < powers and bool((error < enough).all()):
            break
    return torch.where(error < 1, error, torch.inf), norm_squared


def _each(function: Callable[..., tuple[Tensor, ...]], *stacks: Tensor) -> tuple[Tensor, ...]:
    """Apply a batched function, on a GPU one large matrix at a time; without waiting for the device either way."""
    if stacks[0].device.type != "cuda" or stacks[0].shape[-1] <= _LARGEST_BATCHED_ORDER:
        return tuple(function(*stacks))
    results = [function(*members) for members in zip(*stacks, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


@contextlib.contextmanager
def full_precision_products(dtype: torch.dtype) -> Iterator[None]:
    """Keep float32 products from being rounded to TF32 or bfloat16, whatever the process has asked for elsewhere.

    The settings are those of the whole process, through PyTorch's newer interface, which knows what the older one
    (``set_float32_matmul_precision``) has set, but not the other way round.
    """
    before = [backend.fp32_precision for backend in _PRODUCTS]
    if dtype != torch.float32 or all(precision == "ieee" for precision in before):
        yield
        return
    for backend in _PRODUCTS:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(_PRODUCTS, before, strict=True):
            backend.fp32_precision = precision

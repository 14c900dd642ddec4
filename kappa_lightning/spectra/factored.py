"""The rungs that read κ off a factor: Cholesky of the Gram matrix, LU, and QR."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kappa_lightning.spectra.factor import (
    Factor,
    fill_pivots,
    gram_cholesky,
    lu_factor,
    qr_factor,
    relative_backward_error,
    triangular_factor,
)
from kappa_lightning.spectra.lanczos import largest_eigenvalue
from kappa_lightning.spectra.scaling import TallMatrices
from kappa_lightning.spectra.svd import is_rank_deficient, rounding_error
from kappa_lightning.spectra.values import Values

SMALLEST_LANCZOS = 48
"""The block size leaves no room for Lanczos in fewer columns."""


def gram_values(matrices: TallMatrices, rows: int, rtol: float, dtype: torch.dtype, lanczos_from: int) -> Values:
    """Take the values from the Cholesky factor of AᵀA; ``rtol`` of the result is inf where that failed.

    Args:
        matrices: shape (count, m, n).
        rows: how many rows to convert at a time.
        rtol: wanted relative error of κ.
        dtype: precision of the factor; in float32 the measured bound is sharpened by a second reading of A.
        lanczos_from: number of columns from which on Lanczos runs instead of a full decomposition of R.
    """
    gram, upper, found = gram_cholesky(matrices, dtype, rows)
    powers = 2 if dtype == torch.float32 else 1
    factor = triangular_factor(upper, lambda block: block @ gram)
    error, norm_squared = relative_backward_error(_reader(matrices, rows), factor, powers)
    return _read_off_if_close(matrices, factor, error.masked_fill(~found, torch.inf), norm_squared, rtol, lanczos_from)


def lu_values(matrices: TallMatrices, rtol: float, lanczos_from: int) -> Values:
    """Take the values of square matrices from their LU factors; ``rtol`` of the result is inf where that failed.

    Args:
        matrices: shape (count, n, n).
        rtol: wanted relative error of κ.
        lanczos_from: number of columns from which on Lanczos runs instead of a full decomposition.
    """
    factor = lu_factor(matrices)
    error, norm_squared = relative_backward_error(lambda: [factor.matrix], factor, powers=1)
    return _read_off_if_close(matrices, factor, error, norm_squared, rtol, lanczos_from)


def qr_values(matrices: TallMatrices, rows: int, rtol: float, lanczos_from: int) -> Values:
    """Take the values from the R of a float64 QR, which also tells a rank-deficient matrix.

    Args:
        matrices: shape (count, m, n).
        rows: how many rows to convert at a time.
        rtol: wanted relative error of κ.
        lanczos_from: number of columns from which on Lanczos runs instead of a full decomposition of R.
    """
    upper = qr_factor(matrices, rows)
    fill_pivots(upper)
    factor = triangular_factor(upper)
    error, norm_squared = relative_backward_error(_reader(matrices, rows), factor, powers=1)
    values = _read_off(matrices, factor, error, norm_squared, rtol, lanczos_from)
    # σ_min found this way is that of some vector, hence an upper bound: small enough, it settles the rank.
    backward = rounding_error(torch.ones_like(error), matrices.cols) * values.sigma_max
    deficient = is_rank_deficient(values.sigma_min + backward, values.sigma_max, matrices)
    return values.with_rank(deficient)


def _reader(matrices: TallMatrices, rows: int) -> Callable[[], Iterator[Tensor]]:
    return lambda: matrices.row_blocks(torch.float64, rows)


def _read_off_if_close(
    matrices: TallMatrices, factor: Factor, error: Tensor, norm_squared: Tensor, rtol: float, lanczos_from: int
) -> Values:
    """Read the values off, unless the spectrum of no member's factor could show anything."""
    if bool((error < rtol).any()):
        return _read_off(matrices, factor, error, norm_squared, rtol, lanczos_from)
    nothing = torch.full_like(error, torch.inf)
    return Values(nothing, nothing, nothing, nothing, nothing)


def _read_off(
    matrices: TallMatrices, factor: Factor, error: Tensor, norm_squared: Tensor, rtol: float, lanczos_from: int
) -> Values:
    """Find the ends of R's spectrum and bound the error of κ: R against A, Ritz values against R, and rounding."""
    count, n = matrices.count, matrices.cols
    stretch = ((1 + error) / (1 - error)).sqrt()

    if n < max(lanczos_from, SMALLEST_LANCZOS):
        sigma = torch.linalg.svdvals(factor.matrix)
        sigma_max, sigma_min = sigma[..., 0], sigma[..., -1]
        width = torch.ones_like(sigma_max)
    else:
        # Both widths are those of squares, so they may add up to 2·rtol; what the top leaves is for the bottom.
        budget = 1.9 * min(rtol, 0.1)
        device = error.device
        top_share = 0.8 * budget
        largest, largest_upper = largest_eigenvalue(factor.gram, n, count, device=device, tolerance=top_share)
        left = (budget - (largest_upper / largest - 1)).clamp(budget - top_share, top_share).min()
        smallest, smallest_upper = largest_eigenvalue(
            lambda block: factor.solve(factor.solve_transposed(block)),
            n,
            count,
            device=device,
            tolerance=float(left),
            roundoff=lambda top: rounding_error((largest * top).sqrt(), n),
        )
        sigma_max, sigma_min = largest.sqrt(), smallest.rsqrt()
        width = (largest_upper / largest * (smallest_upper / smallest)).sqrt()

    rounding = rounding_error(sigma_max / sigma_min, n)
    attained = stretch * width - 1 + rounding
    # The factor is good and only Lanczos did not settle, as when a hundred singular values crowd at an end.
    crowded = ~(attained <= rtol) & (stretch - 1 + rounding <= rtol)
    if n >= max(lanczos_from, SMALLEST_LANCZOS) and bool(crowded.any()):
        members = crowded.nonzero().squeeze(-1)
        sigma = torch.linalg.svdvals(factor.matrix[members])
        sigma_max = sigma_max.index_put((members,), sigma[..., 0])
        sigma_min = sigma_min.index_put((members,), sigma[..., -1])
        exact = stretch - 1 + rounding_error(sigma_max / sigma_min, n)
        attained = torch.where(crowded, exact, attained)
    return Values(sigma_max, sigma_min, factor.log_volume, norm_squared.sqrt(), attained.nan_to_num(nan=torch.inf))

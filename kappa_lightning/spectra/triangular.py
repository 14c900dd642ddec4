"""The two rungs that read κ off a triangular factor: Cholesky of the Gram matrix, and QR."""

from collections.abc import Callable

import torch
from torch import Tensor

from kappa_lightning.spectra.factor import gram_cholesky, inverse_operator, qr_factor, relative_backward_error
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
    gram, factor, found = gram_cholesky(matrices, dtype, rows)
    powers = 2 if dtype == torch.float32 else 1
    error, norm_squared = relative_backward_error(matrices, factor, rows, powers)
    error = error.masked_fill(~found, torch.inf)
    if not bool((error < rtol).any()):
        # Nothing to gain from the spectrum of such a factor.
        nothing = torch.full_like(error, torch.inf)
        return Values(nothing, nothing, nothing, nothing, nothing)
    values = _read_off(matrices, factor, lambda block: gram @ block, error, rtol, lanczos_from)
    return Values(values.sigma_max, values.sigma_min, values.log_volume, norm_squared.sqrt(), values.rtol)


def qr_values(matrices: TallMatrices, rows: int, rtol: float, lanczos_from: int) -> Values:
    """Take the values from the R of a float64 QR, which also tells a rank-deficient matrix.

    Args:
        matrices: shape (count, m, n).
        rows: how many rows to convert at a time.
        rtol: wanted relative error of κ.
        lanczos_from: number of columns from which on Lanczos runs instead of a full decomposition of R.
    """
    factor = qr_factor(matrices, rows)
    # A zero pivot would stop the solves. Moving it by eps·max|R| is a change of A that is below QR's own rounding.
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    floor = torch.finfo(factor.dtype).eps * factor.abs().amax((-2, -1))
    diagonal.copy_(torch.where(diagonal.abs() < floor[:, None], floor[:, None], diagonal))
    error, norm_squared = relative_backward_error(matrices, factor, rows, powers=1)
    values = _read_off(matrices, factor, lambda block: factor.mT @ (factor @ block), error, rtol, lanczos_from)
    # σ_min found this way is that of some vector, hence an upper bound: small enough, it settles the rank.
    backward = rounding_error(torch.ones_like(error), matrices.cols) * values.sigma_max
    deficient = is_rank_deficient(values.sigma_min + backward, values.sigma_max, matrices)
    return Values(values.sigma_max, values.sigma_min, values.log_volume, norm_squared.sqrt(), values.rtol).with_rank(
        deficient
    )


def _read_off(
    matrices: TallMatrices,
    factor: Tensor,
    gram_operator: Callable[[Tensor], Tensor],
    error: Tensor,
    rtol: float,
    lanczos_from: int,
) -> Values:
    """Find the ends of R's spectrum and bound the error of κ: R against A, Ritz values against R, and rounding.

    The frobenius_norm of the result is that of R.
    """
    count, n = matrices.count, matrices.cols
    log_volume = factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    frobenius_norm = torch.linalg.matrix_norm(factor)
    stretch = ((1 + error) / (1 - error)).sqrt()

    if n < max(lanczos_from, SMALLEST_LANCZOS):
        sigma = torch.linalg.svdvals(factor)
        sigma_max, sigma_min = sigma[..., 0], sigma[..., -1]
        width = torch.ones_like(sigma_max)
    else:
        tolerance = 0.8 * min(rtol, 0.1)
        device = factor.device
        largest, largest_upper = largest_eigenvalue(gram_operator, n, count, device=device, tolerance=tolerance)
        smallest, smallest_upper = largest_eigenvalue(
            inverse_operator(factor),
            n,
            count,
            device=device,
            tolerance=tolerance,
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
        sigma = torch.linalg.svdvals(factor[members])
        sigma_max = sigma_max.index_put((members,), sigma[..., 0])
        sigma_min = sigma_min.index_put((members,), sigma[..., -1])
        exact = stretch - 1 + rounding_error(sigma_max / sigma_min, n)
        attained = torch.where(crowded, exact, attained)
    return Values(sigma_max, sigma_min, log_volume, frobenius_norm, attained.nan_to_num(nan=torch.inf))

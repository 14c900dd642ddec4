"""All singular values in float64: the exact rung, and the judge of numerical rank."""

import math

import torch
from torch import Tensor

from kappa_lightning.spectra.factor import qr_factor
from kappa_lightning.spectra.scaling import TallMatrices
from kappa_lightning.spectra.values import Values

# From here on a QR in front of the bidiagonalisation is cheaper than carrying the long columns through it.
_VERY_TALL = 1.6
_EPS: float = torch.finfo(torch.float64).eps


def svd_values(matrices: TallMatrices, rows: int) -> Values:
    """Take the values from all singular values, whatever they cost; a backward stable QR first when very tall.

    Args:
        matrices: shape (count, m, n).
        rows: how many rows the QR converts at a time.
    """
    if matrices.rows > _VERY_TALL * matrices.cols:
        reduced = qr_factor(matrices, rows)
    else:
        reduced = matrices.scaled(torch.float64)
    sigma = torch.linalg.svdvals(reduced)
    largest, smallest = sigma[..., 0], sigma[..., -1]
    return Values(
        sigma_max=largest,
        sigma_min=smallest,
        log_volume=sigma.log().sum(-1),
        frobenius_norm=torch.linalg.vector_norm(sigma, dim=-1),
        rtol=rounding_error(largest / smallest, matrices.cols),
    ).with_rank(is_rank_deficient(smallest, largest, matrices))


def rounding_error(kappa: Tensor, cols: int) -> Tensor:
    """Bound the relative error of a κ found by orthogonal transformations in float64.

    They are backward stable: the values are those of A + ΔA with ‖ΔA‖₂ ≤ p(n)·eps·‖A‖₂ (Golub and Van Loan, Matrix
    Computations, 4th ed., §8.6), and by Weyl's inequality σ_min then moves by at most p(n)·eps·κ of itself. The
    textbooks' polynomials p are far from sharp; 4√n is used here, which the tests hold against values to 40 digits.
    """
    return 4 * math.sqrt(cols) * _EPS * kappa


def is_rank_deficient(smallest: Tensor, largest: Tensor, matrices: TallMatrices) -> Tensor:
    """Whether σ_min ≤ max(rows, cols)·eps·σ_max, the numerical rank of NumPy's ``matrix_rank``."""
    return smallest <= matrices.rows * _EPS * largest

"""The rungs that take all singular values, or all eigenvalues of the Gram matrix; what rounding does to them."""

import math
from typing import TypeVar

import torch
from torch import Tensor

from kappa_lightning.spectra.factors import gram_matrix, qr_factor
from kappa_lightning.spectra.matrices import TallMatrices
from kappa_lightning.spectra.result import Spectrum, with_rank

# From here on a QR in front of the bidiagonalisation is cheaper than carrying the long columns through it.
# Measured against its neighbors by benchmarks/ablation.py.
_VERY_TALL = 1.6
_EPS: float = torch.finfo(torch.float64).eps

Number = TypeVar("Number", Tensor, float)


def eigen_values(matrices: TallMatrices, rows: int) -> Spectrum:
    """Take the values from all eigenvalues of AᵀA in float64; ``rtol`` of the result is what rounding leaves of it.

    For small matrices nothing is faster: neither a factor nor a block of vectors is worth its overhead. No random block
    is drawn. With G = AᵀA as computed and u the unit roundoff, ‖G − AᵀA‖₂ ≤ γ_m‖A‖_F² for γ_m = mu/(1 − mu), in
    whatever order the sums are taken (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.13); the
    eigenvalues of G come by orthogonal transformations, as in :func:`rounding_error`; and by Weyl's inequality no
    eigenvalue moves by more than both.

    Args:
        matrices: shape (count, m, n).
        rows: how many rows to convert at a time.
    """
    gram = gram_matrix(matrices, torch.float64, rows)
    norm_squared = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    eigenvalues = torch.linalg.eigvalsh(gram, UPLO="U")
    smallest, largest = eigenvalues[..., 0], eigenvalues[..., -1]
    units = matrices.rows * _EPS / 2
    moved = units / (1 - units) * norm_squared + rounding_error(largest, matrices.cols)
    error = ((1 + moved / largest) / (1 - moved / smallest)).sqrt() - 1
    return Spectrum.of_ends(
        sigma_max=largest.sqrt(),
        sigma_min=smallest.clamp(min=0).sqrt(),
        log_volume=eigenvalues.clamp(min=0).log().sum(-1) / 2,
        frobenius_norm=norm_squared.sqrt(),
        rtol=error.where(moved < smallest, torch.inf),
    )


def svd_values(matrices: TallMatrices, rows: int) -> Spectrum:
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
    values = Spectrum.of_ends(
        sigma_max=largest,
        sigma_min=smallest,
        log_volume=sigma.log().sum(-1),
        frobenius_norm=torch.linalg.vector_norm(sigma, dim=-1),
        rtol=rounding_error(largest / smallest, matrices.cols),
    )
    return with_rank(values, is_rank_deficient(smallest, largest, matrices))


def rounding_error(kappa: Number, cols: int) -> Number:
    """Bound the relative error of a κ found by orthogonal transformations in float64.

    They are backward stable: the values are those of A + ΔA with ‖ΔA‖₂ ≤ p(n)·eps·‖A‖₂ (Golub and Van Loan, Matrix
    Computations, 4th ed., §8.6), and by Weyl's inequality σ_min then moves by at most p(n)·eps·κ of itself. The
    textbooks' polynomials p are far from sharp; 4√n is used here, which the tests hold against values to 40 digits.
    """
    return 4 * math.sqrt(cols) * _EPS * kappa


def is_rank_deficient(smallest: Tensor, largest: Tensor, matrices: TallMatrices) -> Tensor:
    """Whether σ_min ≤ max(rows, cols)·eps·σ_max, the numerical rank of NumPy's ``matrix_rank``."""
    return smallest <= matrices.rows * _EPS * largest

"""The rung for matrices of a few hundred columns on a CPU: a float64 factor, and both ends found by deflation.

Their eigenvalues take longer than a factor and some twenty products with sixteen vectors, and block Lanczos spends more
time on its bookkeeping than on the products.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kappa_lightning.spectra.backward_error import compare
from kappa_lightning.spectra.deflation import Deflation, find_top, orthonormal, probe, start
from kappa_lightning.spectra.dense import rounding_error
from kappa_lightning.spectra.factors import (
    Factor,
    gram_cholesky,
    gram_matrix,
    lu_factor,
    mirror_upper,
    triangular_factor,
)
from kappa_lightning.spectra.matrices import TallMatrices
from kappa_lightning.spectra.products import Operator, full_precision_products, gram_product
from kappa_lightning.spectra.random_blocks import BLOCK
from kappa_lightning.spectra.result import Spectrum, nothing_shown, stacked

# Of the wanted error, what the top of the spectrum may use up; the bottom gets the rest.
# Measured against its neighbors by benchmarks/ablation.py.
_LARGEST_SHARE = 0.6
# The bounds are first-order ones.
_LARGEST_RTOL = 0.1
_TOP_SEED = 0x6465_666C
_BOTTOM_SEED = 0x6174_696F
# Of products with AᵀA in float64, relative to ‖A‖₂²: twice γ_n‖A‖_F/‖A‖₂ is below 1e-11 up to 4000 columns of noise.
_ROUNDING = 1e-11
_UNIT_ROUNDOFF = 2.0**-53
_UNIT_ROUNDOFF32 = 2.0**-24


@dataclass(frozen=True, slots=True)
class _End:
    """The largest eigenvalue of an operator: what was found, and what it is not above."""

    ritz: float
    upper: float


def deflated_values(matrices: TallMatrices, rows: int, rtol: float) -> Spectrum:
    """Take the values of each matrix from a float64 factor; ``rtol`` of the result is inf where that failed.

    Args:
        matrices: shape (count, m, n), n ≥ 48.
        rows: how many rows to convert at a time.
        rtol: wanted relative error of κ.
    """
    one = _of_square if matrices.rows == matrices.cols else _of_tall
    return stacked([one(matrices.take(slice(i, i + 1)), rows, rtol) for i in range(matrices.count)])


def _of_tall(matrices: TallMatrices, rows: int, rtol: float) -> Spectrum:
    """From the Cholesky factor of G = AᵀA, whose rounding is bounded beforehand.

    With u the unit roundoff and γ_k = ku/(1 − ku), ‖G − AᵀA‖₂ ≤ γ_m‖A‖_F² and ‖RᵀR − G‖₂ ≤ γ_{n+1} tr G (Higham,
    Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.13 and theorem 10.3), and by Weyl's inequality no
    eigenvalue is further from that of AᵀA than both.
    """
    n = matrices.cols
    gram = mirror_upper(gram_matrix(matrices, torch.float64, rows))[0]
    norm_squared = gram.diagonal().sum().item()
    upper, is_definite = gram_cholesky(gram[None], in_place=False)
    factor = triangular_factor(upper)
    nothing = nothing_shown(factor.log_volume)
    if not is_definite.item():
        return nothing
    in_gram, in_factor = (_gamma(k) * norm_squared for k in (matrices.rows, n + 1))
    rounded = gram.to(torch.float32)
    tolerance = _tolerance(rtol)

    def quick(block: Tensor) -> Tensor:
        return (block.to(torch.float32) @ rounded).to(torch.float64)

    def exact(block: Tensor) -> Tensor:
        return block @ gram

    with full_precision_products(torch.float32):
        close = find_top(quick, n, _LARGEST_SHARE * tolerance, 2)
    found = Deflation.of(close.vectors, exact(close.vectors), _LARGEST_SHARE * tolerance)
    if not found.is_shown(exact, _ROUNDING * found.upper, _TOP_SEED):
        return nothing
    top = _End(found.ritz, (1 + _ROUNDING) * found.upper)
    bottom = _bottom(factor, n, (1 - _LARGEST_SHARE) * tolerance, top, is_sharp=False)
    if bottom is None:
        return nothing
    lowest = 1 / bottom.upper - in_gram - in_factor
    if lowest <= 0:
        return nothing
    width = (top.upper + in_gram) / top.ritz / bottom.ritz / lowest
    # What was found may also lie on the other side of the truth.
    width = max(width, (1 + (in_gram + in_factor) * bottom.ritz) / (1 - in_gram / top.ritz))
    return _spectrum(top, bottom, factor.log_volume, norm_squared, math.sqrt(width), n)


def _of_square(matrices: TallMatrices, rows: int, rtol: float) -> Spectrum:
    """From the LU factors of A, and the top from A itself."""
    n = matrices.cols
    tolerance = _tolerance(rtol)
    rounded = next(matrices.row_blocks(torch.float32, matrices.rows))[0]

    def quick(block: Tensor) -> Tensor:
        return (block.to(torch.float32) @ rounded.mT @ rounded).to(torch.float64)

    def exact(block: Tensor) -> Tensor:
        return gram_product(block[None], matrices.row_blocks(torch.float64, rows))[0]

    with full_precision_products(torch.float32):
        found = find_top(quick, n, _LARGEST_SHARE * tolerance, 2)
        factor = lu_factor(matrices, rows)
        compared = compare(lambda: matrices.row_blocks(torch.float64, rows), factor, also=found.vectors[None])
        error, norm_squared = compared.error.item(), compared.norm_squared.item()
        nothing = nothing_shown(factor.log_volume)
        if not error < rtol:
            return nothing
        found = Deflation.of(found.vectors, compared.image[0], _LARGEST_SHARE * tolerance)
        # Two products after another, each with γ_n‖A‖_F for its error, and the rounding of A and of the block.
        in_float32 = _gamma(n + 2, _UNIT_ROUNDOFF32) * 2 * math.sqrt(norm_squared * 2 * found.upper)
        operator, lost = (quick, in_float32) if found.affords(in_float32) else (exact, _ROUNDING * found.upper)
        if not found.is_shown(operator, lost, _TOP_SEED):
            return nothing
    top = _End(found.ritz, (1 + _ROUNDING) * found.upper)
    bottom = _bottom(factor, n, (1 - _LARGEST_SHARE) * tolerance, top, is_sharp=True)
    if bottom is None:
        return nothing
    width = top.upper / top.ritz * bottom.upper / bottom.ritz / (1 - error)
    return _spectrum(top, bottom, factor.log_volume, norm_squared, math.sqrt(width), n)


def _bottom(factor: Factor, n: int, tolerance: float, top: _End, *, is_sharp: bool) -> _End | None:
    """Find 1/σ_min²; of a square matrix it is so far from the next ones that two steps are mostly enough."""
    inverse: Operator = lambda block: factor.inverse(block[None])[0]  # noqa: E731

    def shown(found: Deflation, first: Tensor | None = None) -> _End | None:
        kappa = math.sqrt(top.ritz * max(found.ritz, 0.0))
        rounding = rounding_error(kappa, n)
        if not found.is_shown(inverse, rounding * found.upper, _BOTTOM_SEED, first):
            return None
        # Once for each of the sixteen vectors and on both sides, if the errors of all have one direction.
        return _End(found.ritz, (1 + 8 * rounding) * found.upper)

    if is_sharp:
        vectors = orthonormal(inverse(orthonormal(inverse(start(n)))))
        images = inverse(torch.cat([vectors, probe(vectors, _BOTTOM_SEED)]))
        found = Deflation.of(vectors, images[:BLOCK], tolerance)
        end = shown(found, images[BLOCK:]) if found.is_close else None
        if end is not None:
            return end
    return shown(find_top(inverse, n, tolerance, 1))


def _tolerance(rtol: float) -> float:
    """What the relative widths of the brackets of σ_max² and 1/σ_min² may add up to: they are those of squares."""
    return 1.9 * min(rtol, _LARGEST_RTOL)


def _gamma(operations: int, unit: float = _UNIT_ROUNDOFF) -> float:
    return operations * unit / (1 - operations * unit)


def _spectrum(top: _End, bottom: _End, log_volume: Tensor, norm_squared: float, stretch: float, n: int) -> Spectrum:
    sigma_max, sigma_min = math.sqrt(top.ritz), 1 / math.sqrt(bottom.ritz)
    values = torch.tensor(
        [sigma_max, sigma_min, math.sqrt(norm_squared)], dtype=torch.float64, device=log_volume.device
    )
    rounding = rounding_error(values[0] / values[1], n)
    return Spectrum.of_ends(values[:1], values[1:2], log_volume, values[2:], (stretch - 1 + rounding)[None])

"""How far the singular values of a factor are from those of the matrix: measured, not estimated."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kappa_lightning.spectra.factors import Factor
from kappa_lightning.spectra.products import gram_product
from kappa_lightning.spectra.random_blocks import OVERLAP, gaussian_block

_PROBE_SEED = 0x6C69_6768


@dataclass(frozen=True, slots=True)
class Comparison:
    """How well R stands for A, and what came with the reading of A.

    Attributes:
        error: f, every σ_i(A)² is σ_i(R)² times a factor in [1 − f, 1 + f]; inf where f is not below 1; shape (count,).
        norm_squared: ‖A‖_F², same shape, accumulated in float64.
        image: AᵀA applied to further vectors, shape (count, few, n).
    """

    error: Tensor
    norm_squared: Tensor
    image: Tensor


def compare(
    row_blocks: Callable[[], Iterable[Tensor]],
    factor: Factor,
    powers: int = 1,
    enough: float = 0.0,
    also: Tensor | None = None,
) -> Comparison:
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
        also: vectors to be multiplied by AᵀA in the same reading, shape (count, few, n), float64.
    """
    norm_squared = torch.zeros_like(factor.log_volume)
    probe = gaussian_block(factor.order, _PROBE_SEED, norm_squared.device).mT.expand(len(norm_squared), -1, -1)
    also = probe[:, :0] if also is None else also

    def summing(parts: Iterable[Tensor]) -> Iterator[Tensor]:
        for part in parts:
            norm_squared.add_(torch.linalg.vector_norm(part, dim=(-2, -1)).square())
            yield part

    product = gram_product(torch.cat([factor.solve(probe), also], dim=-2), summing(row_blocks()))
    product, also_image = product[:, : probe.shape[-2]], product[:, probe.shape[-2] :]
    image = factor.solve_transposed(product) - probe
    error = torch.linalg.vector_norm(image, dim=(-2, -1)) / OVERLAP
    for power in range(2, powers + 1):
        if bool((error < enough).all()):
            break
        image = factor.solve_transposed(gram_product(factor.solve(image), row_blocks())) - image
        error = (torch.linalg.vector_norm(image, dim=(-2, -1)) / OVERLAP) ** (1 / power)
    return Comparison(torch.where(error < 1, error, torch.inf), norm_squared, also_image)

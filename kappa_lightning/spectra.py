"""The spectrum of a matrix: its two ends, their ratio κ, its log-volume and its norm.

Everything is computed from float64 singular values of the matrix scaled by a power of two, so that the result does
not depend on the unit of the weights: ``W`` and ``1e-12 * W`` have the same κ.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

SOLVERS = ("auto", "svd")


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is kept of the singular values σ_1 ≥ … ≥ σ_n of each matrix of a batch, n = min(rows, cols).

    Every field is a float64 tensor of shape (...), the batch shape of the matrix it was computed from.

    Attributes:
        kappa: condition number σ_1 / σ_n; infinite for a matrix that is rank-deficient in float64.
        sigma_max: σ_1, in the unit of the weights.
        sigma_min: σ_n, in the unit of the weights; 0 for a rank-deficient matrix.
        log_volume: Σ ln σ_i over the n singular values, in nats; −∞ for a rank-deficient matrix.
        frobenius_norm: (Σ σ_i²)^½, in the unit of the weights.
        rtol: the relative error of ``kappa`` that is guaranteed; 0 where κ is infinite.
    """

    kappa: Tensor
    sigma_max: Tensor
    sigma_min: Tensor
    log_volume: Tensor
    frobenius_norm: Tensor
    rtol: Tensor

    def __getitem__(self, index: Any) -> Spectrum:
        """The spectrum of one matrix (or a slice) of the batch."""
        return Spectrum(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def spectrum(matrix: Tensor, *, rtol: float = 1e-3, solver: str = "auto") -> Spectrum:
    """The ends of the spectrum, log-volume and norm of each matrix of a batch.

    A matrix counts as rank-deficient, with κ = ∞, when σ_min ≤ max(rows, cols) · ε · σ_max with the ε of float64:
    below that a computed σ_min is rounding error (Golub & Van Loan, Matrix Computations, §5.4.1).

    Args:
        matrix: shape (..., rows, cols), real floating point of any precision, on any device.
        rtol: the relative error of κ that is asked for.
        solver: ``"svd"`` for all singular values in float64, ``"auto"`` for the cheapest that attains ``rtol``.

    Returns:
        A :class:`Spectrum` whose fields have shape (...), on the matrix's device (on the CPU for MPS, which has no
        float64). The matrix is not changed, no gradient is recorded.

    Raises:
        TypeError: if the matrix is not a real floating-point tensor.
        ValueError: if it has NaN or infinite entries, fewer than two dimensions or an empty one, or if an argument
            is out of range.

    Example:
        >>> import torch
        >>> s = spectrum(torch.diag(torch.tensor([3.0, 1.5, 0.5])))
        >>> s.kappa.item(), s.sigma_max.item()
        (6.0, 3.0)
    """
    check_options(solver=solver, rtol=rtol)
    if not matrix.is_floating_point():
        raise TypeError(f"a spectrum needs a real floating-point matrix, got {matrix.dtype}")
    if matrix.ndim < 2 or 0 in matrix.shape[-2:]:
        raise ValueError(f"a spectrum needs shape (..., rows, cols) with rows, cols ≥ 1, got {tuple(matrix.shape)}")
    with torch.no_grad():
        # MPS has no float64, so the arithmetic moves to the CPU there.
        work = (matrix.cpu() if matrix.device.type == "mps" else matrix).to(torch.float64)
        if not bool(work.isfinite().all()):
            raise ValueError("the matrix has NaN or infinite entries")
        return _from_singular_values(work)


def condition_number(matrix: Tensor, *, rtol: float = 1e-3, solver: str = "auto") -> Tensor:
    """κ = σ_max / σ_min of each matrix of a batch; see :func:`spectrum` for arguments and errors.

    Returns:
        A float64 tensor of shape (...).

    Example:
        >>> import torch
        >>> condition_number(torch.eye(4)).item()
        1.0
    """
    return spectrum(matrix, rtol=rtol, solver=solver).kappa


def check_options(*, solver: str, rtol: float) -> None:
    """Raise a ValueError that names the option if ``solver`` or ``rtol`` is out of range."""
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown: use one of {', '.join(map(repr, SOLVERS))}")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol={rtol!r} is not a relative error: give a number between 0 and 1")


def _from_singular_values(work: Tensor) -> Spectrum:
    rows, cols = work.shape[-2:]
    # A power of two scales without rounding, and keeps squares inside the range of float64.
    peak = work.abs().amax(dim=(-2, -1))
    exponent = torch.frexp(peak).exponent
    scaled = torch.ldexp(work, -exponent[..., None, None])
    if rows < cols:
        scaled = scaled.mT
    sigma = torch.linalg.svdvals(scaled)
    high, low = sigma[..., 0], sigma[..., -1]
    epsilon = torch.finfo(torch.float64).eps * max(rows, cols)
    deficient = low <= epsilon * high
    low = low.masked_fill(deficient, 0.0)
    kappa = (high / low).masked_fill(deficient, torch.inf)
    log_volume = sigma.log().sum(-1) + sigma.shape[-1] * exponent * torch.log(torch.tensor(2.0, dtype=torch.float64))
    return Spectrum(
        kappa=kappa,
        sigma_max=torch.ldexp(high, exponent),
        sigma_min=torch.ldexp(low, exponent),
        log_volume=log_volume.masked_fill(deficient, -torch.inf),
        frobenius_norm=torch.ldexp(sigma.square().sum(-1).sqrt(), exponent),
        rtol=(epsilon * kappa).masked_fill(deficient, 0.0),
    )

"""The public functions: a batch of matrices in, their condition numbers and what comes with them out."""

import math

import torch
from torch import Tensor

from kappa_lightning.spectra.ladder import SOLVERS, climb, make_schedule
from kappa_lightning.spectra.matrices import TallMatrices
from kappa_lightning.spectra.result import Spectrum, zero_spectrum


@torch.no_grad()
def spectrum(matrix: Tensor, *, rtol: float = 1e-3, solver: str = "auto", memory_budget: int | None = None) -> Spectrum:
    """Compute condition numbers to a guaranteed relative error, and the values that come with them.

    κ = σ_max / σ_min does not change when a matrix is transposed or multiplied by a number, and neither does what is
    computed: each matrix is worked on in its tall orientation and, where its entries are extreme, divided by a power of
    two.
    ``solver="auto"`` goes from cheap to exact (:mod:`kappa_lightning.spectra.ladder`): a triangular factor, block
    Lanczos at both ends of its spectrum or the matrix's own, a measured bound for the factor
    (:func:`~kappa_lightning.spectra.backward_error.compare`) and one for the ends
    (:func:`~kappa_lightning.spectra.certificate.largest_eigenvalue_interval`, or
    :class:`~kappa_lightning.spectra.deflation.Deflation` for a few hundred columns); a matrix for which they do not add
    up to ``rtol`` goes one rung up. From a float32 factor only the directions are taken; the values are then those of
    the matrix itself in them (:func:`~kappa_lightning.spectra.ritz.extreme_ritz_values`), in float64. The bounds hold
    except with a probability below 1e-9 over the random blocks, which are the same in every call: equal weights give
    equal κ, and no random number generator is touched.

    A complex matrix A + iB has the singular values of the real [[A, −B], [B, A]], where each stands twice (Golub and
    Van Loan, Matrix Computations, §1.3.7), and is worked on in that form.

    The input is neither modified nor kept, and no gradient flows.

    Args:
        matrix: shape (..., rows, cols), any floating dtype, real or complex. What is shown is shown in float64 whatever
            the dtype.
        rtol: wanted relative error of κ.
        solver: ``"auto"``, or ``"svd"`` for all singular values in float64.
        memory_budget: bytes of working memory, by default a quarter of what is free on the matrix's device.

    Returns:
        Tensors of shape (...), float64, on the matrix's device (on the CPU for MPS, which has no float64).

    Raises:
        TypeError: the dtype is not a floating one.
        ValueError: fewer than two dimensions, an empty matrix, an entry that is NaN or infinite, or an argument out
            of range.

    Example:
        >>> import torch
        >>> result = spectrum(torch.diag(torch.tensor([8.0, 4.0, 2.0])))
        >>> result.kappa
        tensor(4., dtype=torch.float64)
        >>> round(result.log_volume.exp().item(), 6)
        64.0
    """
    check_options(solver=solver, rtol=rtol)
    check_memory_budget(memory_budget)
    if not (matrix.is_floating_point() or matrix.is_complex()):
        raise TypeError(f"singular values need a floating dtype, got {matrix.dtype}; convert or dequantize it first")
    if matrix.ndim < 2:
        raise ValueError(f"expected at least 2 dimensions (..., rows, cols), got shape {tuple(matrix.shape)}")
    rows, cols = matrix.shape[-2:]
    if rows == 0 or cols == 0:
        raise ValueError(f"a matrix without entries has no singular values, got shape {tuple(matrix.shape)}")

    if matrix.is_complex():
        return _of_real_form(spectrum(_real_form(matrix), rtol=rtol, solver=solver, memory_budget=memory_budget))

    batch = matrix.shape[:-2]
    stack = matrix.detach().reshape(-1, rows, cols)
    if stack.device.type == "mps":
        stack = stack.cpu()
    if stack.dtype.itemsize == 1:
        # float8 has no arithmetic; bfloat16 holds every float8 number.
        stack = stack.to(torch.bfloat16)
    if stack.shape[0] == 0:
        return zero_spectrum(0, stack.device).reshaped(batch)

    largest = torch.maximum(stack.amax((-2, -1)), -stack.amin((-2, -1))).to(torch.float64)
    magnitudes = largest.tolist()
    for index, magnitude in enumerate(magnitudes):
        if not math.isfinite(magnitude):
            flat = torch.tensor(index, device="cpu")
            position = tuple(int(place) for place in torch.unravel_index(flat, batch)) if batch else ()
            where = f"matrix {position} of the batch" if batch else "the matrix"
            raise ValueError(f"{where} has entries that are NaN or infinite; κ is not defined for it")
    matrices = TallMatrices.of(stack, largest)
    nonzero = [index for index, magnitude in enumerate(magnitudes) if magnitude > 0]
    values = climb(matrices, nonzero, make_schedule(matrices, solver, memory_budget), rtol)
    # κ is that of the scaled values: those of the caller's scale may overflow or lose digits.
    return Spectrum(
        values.kappa,
        matrices.unscale(values.sigma_max),
        matrices.unscale(values.sigma_min),
        matrices.unscale_log_volume(values.log_volume),
        matrices.unscale(values.frobenius_norm),
        values.rtol,
    ).reshaped(batch)


def condition_number(
    matrix: Tensor, *, rtol: float = 1e-3, solver: str = "auto", memory_budget: int | None = None
) -> Tensor:
    """Compute κ = σ_max / σ_min alone; see :func:`spectrum`, whose arguments and errors these are.

    Args:
        matrix: shape (..., rows, cols), any floating dtype, real or complex.
        rtol: wanted relative error of κ.
        solver: ``"auto"`` or ``"svd"``.
        memory_budget: bytes of working memory.

    Returns:
        float64 tensor of shape (...), inf for numerically rank-deficient matrices.

    Example:
        >>> import torch
        >>> condition_number(1e-30 * torch.eye(3).expand(2, 3, 3))
        tensor([1., 1.], dtype=torch.float64)
    """
    return spectrum(matrix, rtol=rtol, solver=solver, memory_budget=memory_budget).kappa


def check_options(*, solver: str, rtol: float) -> None:
    """Raise a ValueError that names the option if ``solver`` or ``rtol`` is out of range."""
    if not 0 < rtol < math.inf:
        raise ValueError(f"rtol={rtol!r} must be positive and finite")
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown: use one of {', '.join(map(repr, SOLVERS))}")


def check_memory_budget(memory_budget: int | None) -> None:
    """Raise a ValueError if there is a budget and it is not a positive number of bytes."""
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")


def _real_form(matrix: Tensor) -> Tensor:
    """[[A, −B], [B, A]] of A + iB: shape (..., 2·rows, 2·cols)."""
    real, imaginary = matrix.real, matrix.imag
    return torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)


def _of_real_form(doubled: Spectrum) -> Spectrum:
    """The spectrum of a complex matrix from that of its real form, which has every singular value twice."""
    return Spectrum(
        kappa=doubled.kappa,
        sigma_max=doubled.sigma_max,
        sigma_min=doubled.sigma_min,
        log_volume=doubled.log_volume / 2,
        frobenius_norm=doubled.frobenius_norm / math.sqrt(2),
        rtol=doubled.rtol,
    )

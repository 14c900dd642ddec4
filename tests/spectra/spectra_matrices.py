"""Matrices with known or hard spectra, and the reference they are compared with."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)


def reference_kappa(matrix: Array) -> float:
    """κ of NumPy's float64 SVD; inf where NumPy's numerical rank is short."""
    sigma = np.linalg.svd(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T, compute_uv=False)
    if sigma[0] == 0 or sigma[-1] <= max(matrix.shape) * EPS * sigma[0]:
        return float("inf")
    return float(sigma[0] / sigma[-1])


def orthogonal(rng: np.random.Generator, rows: int, cols: int) -> Array:
    return np.linalg.qr(rng.standard_normal((rows, cols)))[0]


def with_singular_values(rng: np.random.Generator, rows: int, cols: int, sigma: Array) -> Array:
    """U diag(σ) Vᵀ with random orthonormal U and V; rows ≥ cols."""
    return (orthogonal(rng, rows, cols) * sigma) @ orthogonal(rng, cols, cols).T


def gaussian(rng: np.random.Generator, rows: int, cols: int) -> Array:
    return 0.02 * rng.standard_normal((rows, cols))


def spiky(rng: np.random.Generator, rows: int, cols: int) -> Array:
    """Noise and a few learned directions, the spectrum of a trained layer."""
    spikes = rng.standard_normal((rows, 4)) @ (np.array([1, 2, 4, 8])[:, None] * rng.standard_normal((4, cols)))
    return 0.02 * (rng.standard_normal((rows, cols)) + spikes / 4)


def graded(rng: np.random.Generator, rows: int, cols: int) -> Array:
    return with_singular_values(rng, rows, cols, np.logspace(0, -rng.uniform(1, 9), cols))


def row_scaled(rng: np.random.Generator, rows: int, cols: int) -> Array:
    return np.logspace(0, -rng.uniform(1, 6), rows)[:, None] * rng.standard_normal((rows, cols))


def clustered_smallest(rng: np.random.Generator, rows: int, cols: int) -> Array:
    sigma = np.linspace(2, 1, cols)
    crowd = max(1, cols // 3)
    sigma[-crowd:] = 10 ** -rng.uniform(0, 6) * (1 + 1e-5 * rng.random(crowd))
    return with_singular_values(rng, rows, cols, np.sort(sigma)[::-1])


def clustered_largest(rng: np.random.Generator, rows: int, cols: int) -> Array:
    sigma = rng.uniform(0.01, 0.5, cols)
    sigma[: cols // 2] = 1 + 1e-4 * rng.random(cols // 2)
    return with_singular_values(rng, rows, cols, np.sort(sigma)[::-1])


def repeated(rng: np.random.Generator, rows: int, cols: int) -> Array:
    return with_singular_values(rng, rows, cols, np.sort(rng.choice([3.0, 1.0, 0.01], cols))[::-1])


def all_equal(rng: np.random.Generator, rows: int, cols: int) -> Array:
    return orthogonal(rng, rows, cols)


def one_tiny(rng: np.random.Generator, rows: int, cols: int) -> Array:
    sigma = np.ones(cols)
    sigma[-1] = 10 ** -rng.uniform(3, 12)
    return with_singular_values(rng, rows, cols, sigma)


def one_large(rng: np.random.Generator, rows: int, cols: int) -> Array:
    sigma = np.ones(cols)
    sigma[0] = 10 ** rng.uniform(1, 10)
    return with_singular_values(rng, rows, cols, sigma)


def hidden_in_coordinates(rng: np.random.Generator, rows: int, cols: int) -> Array:
    """Diagonal: the extreme directions are coordinate axes, where a structured start block would have holes."""
    matrix = np.zeros((rows, cols))
    np.fill_diagonal(matrix, rng.permutation(np.concatenate([[1e-4, 30.0], rng.uniform(0.5, 1, cols - 2)])))
    return matrix


def kahan(rng: np.random.Generator, rows: int, cols: int) -> Array:
    """A triangular matrix whose diagonal hides how small its σ_min is (Higham, §8.3)."""
    theta = rng.uniform(1.2, 1.5)
    matrix = np.zeros((rows, cols))
    upper = np.triu(np.full((cols, cols), -np.cos(theta)), 1) + np.eye(cols)
    matrix[:cols] = np.sin(theta) ** np.arange(cols)[:, None] * upper
    return matrix


def rank_deficient(rng: np.random.Generator, rows: int, cols: int) -> Array:
    rank = int(rng.integers(1, cols))
    return rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, cols))


def dead_column(rng: np.random.Generator, rows: int, cols: int) -> Array:
    matrix = rng.standard_normal((rows, cols))
    matrix[:, rng.integers(cols)] = 0
    return matrix


FULL_RANK: dict[str, Callable[[np.random.Generator, int, int], Array]] = {
    f.__name__: f
    for f in (
        gaussian,
        spiky,
        graded,
        row_scaled,
        clustered_smallest,
        clustered_largest,
        repeated,
        all_equal,
        one_tiny,
        one_large,
        hidden_in_coordinates,
        kahan,
    )
}
DEFICIENT = {f.__name__: f for f in (rank_deficient, dead_column)}
FAMILIES = FULL_RANK | DEFICIENT


def relative_error(found: Tensor | float, true: float) -> float:
    return abs(float(found) - true) / true


def as_tensor(matrix: Array, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix)).to(dtype)

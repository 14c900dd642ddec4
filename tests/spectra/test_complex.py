"""Complex matrices against NumPy's singular values of them."""

import math

import numpy as np
import pytest
import torch

from kappa_lightning import condition_number, spectrum


def complex_matrix(*shape, dtype=torch.complex128, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conditioned(size, kappa, dtype=torch.complex128):
    left, right = (torch.linalg.qr(complex_matrix(size, size, seed=seed))[0] for seed in (1, 2))
    sigma = torch.logspace(math.log10(kappa), 0, size, dtype=torch.float64).to(torch.complex128)
    return (left @ torch.diag(sigma) @ right).to(dtype)


@pytest.mark.parametrize("solver", ["auto", "svd"])
@pytest.mark.parametrize("shape", [(5, 5), (40, 7), (7, 40), (1, 6), (6, 1), (1, 1), (300, 200), (2, 3, 8, 6)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_values_are_those_of_numpy(shape, dtype, solver):
    matrix = complex_matrix(*shape, dtype=dtype)
    sigma = np.linalg.svd(matrix.numpy().astype(np.complex128), compute_uv=False)
    result = spectrum(matrix, solver=solver, rtol=1e-6)
    np.testing.assert_allclose(result.kappa, sigma[..., 0] / sigma[..., -1], rtol=2e-6)
    np.testing.assert_allclose(result.sigma_max, sigma[..., 0], rtol=2e-6)
    np.testing.assert_allclose(result.sigma_min, sigma[..., -1], rtol=2e-6)
    np.testing.assert_allclose(result.log_volume, np.log(sigma).sum(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.frobenius_norm, np.sqrt((sigma**2).sum(-1)), rtol=1e-6)
    assert result.kappa.dtype == torch.float64


@pytest.mark.parametrize("kappa", [3.0, 1e3, 1e7])
def test_large_condition_numbers_keep_their_bound(kappa):
    result = spectrum(conditioned(120, kappa))
    assert abs(float(result.kappa) / kappa - 1) <= float(result.rtol) <= 1e-3


def test_singular_complex_matrix_has_infinite_kappa():
    matrix = complex_matrix(8, 5)
    matrix[:, 4] = 1j * matrix[:, 0]
    result = spectrum(matrix)
    assert math.isinf(float(result.kappa))
    assert float(result.sigma_min) == 0.0


def test_complex_matrix_without_imaginary_part_is_the_real_one():
    matrix = torch.randn(30, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected, found = spectrum(matrix, rtol=1e-9), spectrum(matrix.to(torch.complex128), rtol=1e-9)
    for field in ("kappa", "sigma_max", "sigma_min", "log_volume", "frobenius_norm"):
        assert float(getattr(found, field)) == pytest.approx(float(getattr(expected, field)), rel=1e-9)


def test_conjugate_transpose_has_the_same_condition_number():
    matrix = complex_matrix(9, 6)
    assert float(condition_number(matrix.mH)) == pytest.approx(float(condition_number(matrix)), rel=1e-3)


@pytest.mark.parametrize("bad", [complex("nan"), complex(0, math.inf)])
def test_entry_that_is_not_finite_is_refused(bad):
    matrix = complex_matrix(3, 3)
    matrix[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        spectrum(matrix)


def test_empty_complex_matrix_is_refused():
    with pytest.raises(ValueError, match="without entries"):
        spectrum(torch.empty(0, 3, dtype=torch.complex64))

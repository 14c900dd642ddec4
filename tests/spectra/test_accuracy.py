"""κ is never further from a float64 reference than the result says, for friendly and for hostile matrices."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra_matrices import EPS, FAMILIES, as_tensor, reference_kappa, relative_error

from kappa_lightning.spectra import spectrum

# The reference rounds as well: it knows κ to about n·eps·κ.
REFERENCE_SLACK = 20


def assert_within_stated_error(matrix: np.ndarray, result, index=()) -> None:
    true = reference_kappa(matrix)
    kappa, stated = float(result.kappa[index]), float(result.rtol[index])
    edge = 1 / (max(matrix.shape) * EPS)
    if math.isinf(true) or math.isinf(kappa):
        # At the very edge of numerical rank two SVDs may disagree.
        assert math.isinf(true) == math.isinf(kappa) or min(true, kappa) > edge / 4
        return
    assert relative_error(kappa, true) <= stated + REFERENCE_SLACK * EPS * true
    sigma = np.linalg.svd(matrix, compute_uv=False)
    assert relative_error(result.sigma_max[index], sigma[0]) <= stated + 1e-13
    assert relative_error(result.sigma_min[index], sigma[-1]) <= stated + REFERENCE_SLACK * EPS * true
    assert float(result.log_volume[index]) == pytest.approx(
        np.log(sigma).sum(), abs=1e-8 + len(sigma) * stated, rel=1e-9
    )
    assert relative_error(result.frobenius_norm[index], math.hypot(*sigma)) <= 1e-12


@settings(max_examples=700, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    cols=st.integers(2, 40),
    extra=st.sampled_from([0, 0, 1, 7, 60]),
    wide=st.booleans(),
    exponent=st.sampled_from([0, 0, -20, 100, -100, 660, -660]),
    seed=st.integers(0, 2**32 - 1),
)
def test_small_matrices_stay_within_the_stated_error(family, cols, extra, wide, exponent, seed):
    matrix = FAMILIES[family](np.random.default_rng(seed), cols + extra, cols) * 2.0**exponent
    matrix = matrix.T if wide else matrix
    result = spectrum(as_tensor(matrix))
    assert_within_stated_error(matrix, result)
    if reference_kappa(matrix) < 1e9:
        assert result.rtol <= 1e-3


@settings(max_examples=40, deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 2**32 - 1))
def test_many_small_matrices_in_a_batch(family, seed):
    """40 batches of 40 matrices."""
    rng = np.random.default_rng(seed)
    rows, cols = int(rng.integers(2, 50)), int(rng.integers(2, 14))
    tall, narrow = max(rows, cols), min(rows, cols)
    stack = np.stack([FAMILIES[family](rng, tall, narrow) for _ in range(40)])
    result = spectrum(as_tensor(stack).reshape(8, 5, tall, narrow))
    assert result.kappa.shape == (8, 5)
    for index, matrix in enumerate(stack):
        assert_within_stated_error(matrix, result, divmod(index, 5))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("shape", [(450, 450), (640, 460)], ids=str)
def test_large_matrices_stay_within_the_stated_error(family, shape):
    """Sizes at which block Lanczos runs unforced."""
    matrix = FAMILIES[family](np.random.default_rng(sum(shape)), *shape)
    result = spectrum(as_tensor(matrix))
    assert_within_stated_error(matrix, result)
    if reference_kappa(matrix) < 1e9:
        assert result.rtol <= 1e-3


@pytest.mark.parametrize("shape", [(515, 515), (567, 566)], ids=str)
def test_a_matrix_whose_inverse_overflows_is_rank_deficient(shape):
    """The squares of its inverse's entries are beyond float64."""
    matrix = FAMILIES["kahan"](np.random.default_rng(3), *shape)
    assert math.isinf(reference_kappa(matrix))
    result = spectrum(as_tensor(matrix, torch.float32))
    assert (result.kappa, result.sigma_min, result.rtol) == (math.inf, 0, 0)


@pytest.mark.parametrize("rtol", [0.5, 1e-2, 1e-5, 1e-8])
def test_the_wanted_error_is_attained(rtol):
    rng = np.random.default_rng(3)
    for family in ("gaussian", "spiky", "graded", "clustered_smallest"):
        matrix = FAMILIES[family](rng, 500, 470)
        result = spectrum(as_tensor(matrix), rtol=rtol)
        if reference_kappa(matrix) * 1e-13 < rtol:
            assert result.rtol <= rtol
        assert_within_stated_error(matrix, result)


@pytest.mark.parametrize("family", ["gaussian", "graded", "one_tiny", "kahan"])
def test_exact_solver_against_forty_digits(family):
    matrix = FAMILIES[family](np.random.default_rng(11), 14, 12)
    with mpmath.workdps(40):
        sigma = sorted(mpmath.svd_r(mpmath.matrix(matrix.tolist()), compute_uv=False))
        true = float(sigma[-1] / sigma[0])
    result = spectrum(as_tensor(matrix), solver="svd")
    assert relative_error(result.kappa, true) <= float(result.rtol)
    assert relative_error(spectrum(as_tensor(matrix)).kappa, true) <= 1e-3


def test_exact_solver_agrees_with_numpy_at_a_condition_of_1e5():
    rng = np.random.default_rng(5)
    matrix = FAMILIES["graded"](rng, 200, 100)
    matrix = np.float32(matrix).astype(np.float64)
    for stretched in (matrix, matrix.T, np.concatenate([matrix, matrix])):
        result = spectrum(as_tensor(stretched), solver="svd")
        sigma = np.linalg.svd(stretched, compute_uv=False)
        assert relative_error(result.kappa, sigma[0] / sigma[-1]) < 1e-9 * max(1, reference_kappa(stretched) / 1e5)


def test_error_beyond_float64_is_stated_honestly():
    """κ = 1e12 cannot be had to 1e-8 in float64; the result says so instead of claiming it."""
    rng = np.random.default_rng(2)
    sigma = np.ones(60)
    sigma[-1] = 1e-12
    left, right = np.linalg.qr(rng.standard_normal((60, 60)))[0], np.linalg.qr(rng.standard_normal((60, 60)))[0]
    result = spectrum(as_tensor((left * sigma) @ right), rtol=1e-8)
    assert result.rtol > 1e-8
    assert relative_error(result.kappa, 1e12) <= float(result.rtol)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_low_precision_weights_give_the_condition_of_the_stored_numbers(dtype):
    stored = torch.randn(500, 460, generator=torch.Generator().manual_seed(1)).to(dtype)
    true = reference_kappa(stored.double().numpy())
    assert relative_error(spectrum(stored).kappa, true) <= 1e-3
    assert relative_error(spectrum(stored, solver="svd").kappa, true) <= 1e-9

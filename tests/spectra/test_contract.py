"""What a caller may rely on besides accuracy: scale, orientation, shapes, refusals, and no side effects."""

import math

import numpy as np
import pytest
import torch

from kappa_lightning.spectra import Spectrum, condition_number, spectrum

FIELDS = ("kappa", "sigma_max", "sigma_min", "log_volume", "frobenius_norm", "rtol")


def weight(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(40, 30), (470, 470), (600, 30)], ids=str)
@pytest.mark.parametrize("exponent", [-664, -40, -1, 3, 100, 664])
def test_a_power_of_two_changes_no_bit_of_kappa(shape, exponent):
    matrix = weight(*shape, dtype=torch.float64)
    plain, moved = spectrum(matrix), spectrum(matrix * 2.0**exponent)
    assert torch.equal(plain.kappa, moved.kappa)
    assert torch.equal(plain.sigma_max * 2.0**exponent, moved.sigma_max)
    assert torch.equal(plain.sigma_min * 2.0**exponent, moved.sigma_min)
    assert float(moved.log_volume - plain.log_volume) == pytest.approx(min(shape) * exponent * math.log(2), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e-12, 1e-6, 1e6, 1e30, 1e200])
@pytest.mark.parametrize("shape", [(50, 40), (470, 460)], ids=str)
def test_kappa_does_not_depend_on_the_unit(scale, shape):
    matrix = weight(*shape, dtype=torch.float64)
    # A scale that is no power of two rounds the entries anew, which a float32 factor notices in its directions.
    assert float(spectrum(matrix * scale).kappa) == pytest.approx(float(spectrum(matrix).kappa), rel=1e-7)


def test_subnormal_float32_weights_have_a_condition_number():
    integers = torch.randint(-1000, 1000, (60, 50), generator=torch.Generator().manual_seed(0))
    tiny = (integers.double() * 2.0**-149).float()
    result = spectrum(tiny)
    assert torch.equal(result.kappa, spectrum(integers.double()).kappa)
    assert 0 < result.sigma_max < 1e-37


@pytest.mark.parametrize("shape", [(40, 30), (500, 460), (900, 20)], ids=str)
def test_orientation_does_not_matter(shape):
    matrix = weight(*shape)
    for transposed in (matrix.mT, matrix.mT.contiguous()):
        upright, lying = spectrum(matrix), spectrum(transposed)
        for field in FIELDS:
            torch.testing.assert_close(getattr(upright, field), getattr(lying, field), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (1, 3000)], ids=str)
def test_a_vector_is_perfectly_conditioned(shape):
    result = spectrum(weight(*shape))
    assert result.kappa == 1
    assert result.sigma_max == result.sigma_min
    assert float(result.log_volume) == pytest.approx(math.log(result.sigma_max))


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (30, 20), (500, 500)], ids=str)
def test_a_zero_matrix_is_infinitely_ill_conditioned(shape):
    result = spectrum(torch.zeros(shape))
    assert (result.kappa, result.sigma_max, result.sigma_min) == (math.inf, 0, 0)
    assert (result.log_volume, result.frobenius_norm, result.rtol) == (-math.inf, 0, 0)


@pytest.mark.parametrize("size", [30, 500])
@pytest.mark.parametrize("solver", ["auto", "svd"])
def test_a_rank_deficient_matrix_is_infinitely_ill_conditioned(size, solver):
    matrix = weight(size, size)
    matrix[:, 3] = matrix[:, 7]
    result = spectrum(matrix, solver=solver)
    assert (result.kappa, result.sigma_min, result.log_volume, result.rtol) == (math.inf, 0, -math.inf, 0)
    assert float(result.sigma_max) == pytest.approx(np.linalg.norm(matrix.double().numpy(), 2), rel=1e-3)


def test_every_batch_shape_and_dtype_comes_back_as_float64():
    for batch in ((), (3,), (2, 1, 2), (0,), (2, 0)):
        result = spectrum(torch.ones(*batch, 6, 1, dtype=torch.bfloat16))
        assert isinstance(result, Spectrum)
        for field in FIELDS:
            assert getattr(result, field).shape == batch
            assert getattr(result, field).dtype == torch.float64


def test_a_batch_gives_what_a_loop_gives_to_the_bit():
    stack = torch.stack([weight(470, 450, seed) for seed in range(3)] + [torch.eye(470, 450)])
    batch = spectrum(stack)
    for index, matrix in enumerate(stack):
        alone = spectrum(matrix)
        for field in FIELDS:
            assert torch.equal(getattr(batch, field)[index], getattr(alone, field))


def test_zero_members_do_not_disturb_the_others():
    stack = torch.stack([weight(30, 20), torch.zeros(30, 20), weight(30, 20, 1)])
    kappa = condition_number(stack)
    assert kappa[1] == math.inf
    torch.testing.assert_close(kappa[0], condition_number(stack[0]))
    torch.testing.assert_close(kappa[2], condition_number(stack[2]))


def test_strided_and_expanded_inputs_are_read_as_they_look():
    matrix = weight(60, 40)
    torch.testing.assert_close(condition_number(matrix[::2, ::2]), condition_number(matrix[::2, ::2].contiguous()))
    assert torch.equal(condition_number(matrix.expand(3, -1, -1)), condition_number(matrix).expand(3))


@pytest.mark.parametrize("shape", [(30, 20), (480, 460)], ids=str)
def test_equal_weights_give_equal_kappa_and_no_random_state_moves(shape):
    matrix = weight(*shape)
    torch.manual_seed(1)
    first = spectrum(matrix)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = spectrum(matrix)
    assert torch.equal(torch.get_rng_state(), before)
    for field in FIELDS:
        assert torch.equal(getattr(first, field), getattr(second, field))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(30, 20), (480, 460)], ids=str)
def test_the_weight_is_left_alone_and_no_graph_is_built(shape, dtype):
    matrix = weight(*shape, dtype=dtype).requires_grad_()
    copy = matrix.detach().clone()
    result = spectrum(matrix)
    assert torch.equal(matrix.detach(), copy)
    assert matrix.grad is None
    assert not any(getattr(result, field).requires_grad for field in FIELDS)


def test_condition_number_is_the_kappa_of_the_spectrum():
    matrix = weight(50, 50)
    assert torch.equal(condition_number(matrix, solver="svd"), spectrum(matrix, solver="svd").kappa)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_entry_is_refused_with_the_first_matrix_that_has_one(value):
    stack = torch.ones(2, 3, 4, 5)
    stack[1, 1, 2, 2] = value
    stack[1, 2, 0, 0] = value
    with pytest.raises(ValueError, match=r"matrix \(1, 1\) of the batch"):
        spectrum(stack)
    with pytest.raises(ValueError, match="NaN or infinite"):
        spectrum(stack[1, 1])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_a_dtype_without_real_fractions_is_refused_by_name(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        spectrum(torch.ones(3, 3, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_what_is_no_matrix_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError, match=r"shape \("):
        spectrum(torch.ones(shape))


@pytest.mark.parametrize("rtol", [0.0, -1e-3, math.inf, math.nan])
def test_an_impossible_rtol_is_refused(rtol):
    with pytest.raises(ValueError, match=rf"rtol={rtol!r} must be positive and finite"):
        spectrum(torch.eye(3), rtol=rtol)


def test_an_unknown_solver_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"solver='qr' is unknown: use one of 'auto', 'svd'"):
        spectrum(torch.eye(3), solver="qr")


def test_a_budget_without_bytes_is_refused():
    with pytest.raises(ValueError, match="memory_budget must be a positive number of bytes, got 0"):
        spectrum(torch.eye(3), memory_budget=0)


def test_default_device_and_dtype_of_the_process_change_nothing():
    square = torch.randn(500, 500)
    cases = [torch.randn(5, 5), torch.randn(60, 13), square, square[:, :460], torch.randn(2, 3, 4, 4)]
    before = [spectrum(case) for case in cases]
    with torch.device("meta"):
        assert [spectrum(case) for case in cases] == before
        with pytest.raises(ValueError, match=r"matrix \(1, 0\) of the batch has entries that are NaN"):
            spectrum(torch.tensor([[[[1.0]]], [[[float("nan")]]]], device="cpu"))
    torch.set_default_dtype(torch.float64)
    try:
        assert [spectrum(case) for case in cases] == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_spectra_are_equal_if_all_their_values_are():
    matrices = torch.stack([torch.eye(3), 2 * torch.eye(3)])
    first, second = spectrum(matrices), spectrum(matrices.clone())
    assert first == second
    assert first[0] == second[0]
    assert first[0] != first[1]
    assert first != first[:1]
    assert first != "a spectrum"
    with pytest.raises(TypeError, match="unhashable"):
        hash(first)

"""Entropies against closed forms, SciPy and estimates from samples."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.nn import functional

from kappa_lightning import spectrum
from kappa_lightning.information import (
    contraction,
    entropy_deficit,
    gaussian_output_entropy,
    isotropic_output_entropy,
    log_slope_leaky_relu,
    log_slope_sigmoid,
    log_slope_tanh,
)


def covariance_of(size, seed=0):
    root = np.random.default_rng(seed).standard_normal((size, size))
    return torch.tensor(root @ root.T + 0.1 * np.eye(size))


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (1, 5), (1, 1)])
def test_entropy_of_a_full_row_rank_output_is_scipys(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    covariance = covariance_of(shape[1])
    entropy = gaussian_output_entropy(weight, covariance)
    reference = stats.multivariate_normal(cov=(weight @ covariance @ weight.T).numpy()).entropy()
    assert entropy.rank == shape[0]
    assert entropy.nats == pytest.approx(reference, rel=1e-9)


def test_entropy_is_the_mean_of_minus_log_density_over_samples():
    weight, covariance = torch.randn(3, 5, dtype=torch.float64), covariance_of(5)
    output = (weight @ covariance @ weight.T).numpy()
    samples = np.random.default_rng(1).multivariate_normal(np.zeros(5), covariance.numpy(), 20_000) @ weight.numpy().T
    surprise = -stats.multivariate_normal(cov=output).logpdf(samples)
    error = surprise.std() / math.sqrt(len(samples))
    assert abs(surprise.mean() - gaussian_output_entropy(weight, covariance).nats) < 4 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_taken_as_they_are(dtype):
    weight = torch.randn(4, 6).to(dtype)
    assert gaussian_output_entropy(weight) == gaussian_output_entropy(weight.double())


def test_entropy_of_a_tall_matrix_is_that_of_coordinates_on_its_image():
    weight, covariance = torch.randn(7, 3, dtype=torch.float64), covariance_of(3)
    basis, _ = torch.linalg.qr(weight)
    coordinates = gaussian_output_entropy(basis.T @ weight, covariance)
    entropy = gaussian_output_entropy(weight, covariance)
    assert entropy.rank == 3
    assert entropy.nats == pytest.approx(coordinates.nats, rel=1e-9)


def test_rank_deficient_matrices_have_the_entropy_of_their_image():
    left, right = np.linalg.qr(np.random.default_rng(0).standard_normal((2, 6, 6)))[0]
    weight = torch.tensor(left * [3.0, 2.0, 0.5, 0, 0, 0] @ right.T)
    entropy = gaussian_output_entropy(weight)
    assert entropy.rank == 3
    assert entropy.nats == pytest.approx(1.5 * math.log(2 * math.pi * math.e) + math.log(3.0), rel=1e-9)
    assert gaussian_output_entropy(torch.zeros(4, 2)) == (0, 0)


def test_a_covariance_that_leaves_directions_out_lowers_the_rank():
    direction = torch.tensor([[1.0], [2.0], [2.0]], dtype=torch.float64)
    entropy = gaussian_output_entropy(torch.eye(3), direction @ direction.T)
    assert entropy.rank == 1
    assert entropy.nats == pytest.approx(stats.norm(scale=3).entropy(), rel=1e-9)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_log_volume_of_a_spectrum_gives_the_entropy_under_isotropic_inputs(shape):
    weight = torch.randn(shape)
    log_volume = float(spectrum(weight).log_volume)
    found = isotropic_output_entropy(log_volume, min(shape), scale=0.3)
    assert found == pytest.approx(gaussian_output_entropy(weight, 0.09 * torch.eye(shape[1])).nats, rel=1e-4)


def test_deficit_is_how_far_the_entropy_stays_below_that_of_equal_singular_values():
    weight = torch.randn(5, 8, dtype=torch.float64)
    result = spectrum(weight, solver="svd")
    norm = float(result.frobenius_norm)
    equal = norm / math.sqrt(5) * torch.linalg.qr(torch.randn(8, 5, dtype=torch.float64))[0].T
    best, own = gaussian_output_entropy(equal), gaussian_output_entropy(weight)
    deficit = entropy_deficit(float(result.log_volume), norm, 5)
    assert 5 * deficit == pytest.approx(best.nats - own.nats, rel=1e-9)
    assert 0 < deficit < math.log(float(result.kappa))


def test_deficit_is_zero_only_for_equal_singular_values_and_never_negative():
    for rank in range(1, 40):
        log_volume, norm = rank * math.log(0.1), 0.1 * math.sqrt(rank)
        assert 0 <= entropy_deficit(log_volume, norm, rank) < 1e-15
    # To second order in the spread of ln σ the deficit is its variance.
    logs = 1e-3 * np.random.default_rng(0).standard_normal(50)
    found = entropy_deficit(logs.sum(), np.sqrt(np.exp(2 * logs).sum()), 50)
    assert found == pytest.approx(logs.var(), rel=1e-2)


def test_deficit_of_a_rank_deficient_matrix_is_infinite_at_full_rank_and_finite_on_its_image():
    assert entropy_deficit(-math.inf, 3.0, 4) == math.inf
    assert entropy_deficit(-math.inf, 0.0, 4) == math.inf
    assert entropy_deficit(0.0, math.sqrt(2), 2) == pytest.approx(0, abs=1e-15)


LOG_SLOPES = {
    "tanh": (log_slope_tanh, torch.tanh),
    "sigmoid": (log_slope_sigmoid, torch.sigmoid),
    "leaky_relu": (log_slope_leaky_relu(0.2), lambda y: functional.leaky_relu(y, 0.2)),
}


@pytest.mark.parametrize("name", LOG_SLOPES)
def test_log_slope_is_that_of_autograd_and_survives_saturation(name):
    log_slope, function = LOG_SLOPES[name]
    y = torch.linspace(-15, 15, 301, dtype=torch.float64).roll(1).requires_grad_()
    function(y).sum().backward()
    assert torch.allclose(log_slope(y.detach()).exp(), y.grad, rtol=1e-6, atol=1e-12)
    assert log_slope(torch.tensor([-500.0, 500.0], dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("name", LOG_SLOPES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_contraction_is_the_integral_over_the_gaussian(name, scale):
    log_slope, _ = LOG_SLOPES[name]

    def integrand(z):
        return float(log_slope(torch.tensor(scale * z, dtype=torch.float64))) * stats.norm.pdf(z)

    reference = sum(integrate.quad(integrand, *ends, limit=200)[0] for ends in ((-12, -1e-12), (1e-12, 12)))
    found = contraction(log_slope, torch.tensor([scale]))
    assert found == pytest.approx(reference, rel=1e-4)
    assert found < 0


def test_contraction_of_tanh_is_the_entropy_lost_as_counted_from_samples():
    y = np.random.default_rng(0).standard_normal(400_000) * 0.8
    lost = stats.differential_entropy(np.tanh(y)) - stats.differential_entropy(y)
    assert contraction(log_slope_tanh, torch.tensor([0.8])) == pytest.approx(lost, abs=5e-3)


def test_contraction_of_dependent_outputs_is_a_sum_over_their_marginals():
    # h(tanh(y)) of a correlated pair, from its density p(f⁻¹(u)) / f'(f⁻¹(u)) at samples.
    covariance = np.array([[1.0, 0.6], [0.6, 0.5]])
    y = np.random.default_rng(2).multivariate_normal([0, 0], covariance, 100_000)
    density = stats.multivariate_normal(cov=covariance)
    surprise = -(density.logpdf(y) - np.log(1 - np.tanh(y) ** 2).sum(1))
    error = surprise.std() / math.sqrt(len(y))
    change = contraction(log_slope_tanh, torch.tensor([1.0, math.sqrt(0.5)]))
    assert abs(surprise.mean() - (density.entropy() + change)) < 4 * error


@pytest.mark.parametrize("slope", [1.0, 0.5, 1e-3])
def test_leaky_relu_costs_half_its_log_slope_a_dimension_at_any_scale(slope):
    change = contraction(log_slope_leaky_relu(slope), torch.tensor([0.1, 2.0, 7.0, 50.0]))
    assert change == pytest.approx(4 * math.log(slope) / 2, rel=1e-9)


def test_nonlinearity_on_a_line_in_the_plane_takes_entropy_as_the_area_formula_says():
    # y = (z, 2z): a curve of arc-length element √(f'(z)² + 4 f'(2z)²) dz against √5 dz before.
    z = np.random.default_rng(4).standard_normal(200_000)
    slopes = np.stack([1 - np.tanh(z) ** 2, 2 * (1 - np.tanh(2 * z) ** 2)])
    change = np.log(np.linalg.norm(slopes, axis=0) / math.sqrt(5))
    assert change.max() <= 1e-12
    assert change.mean() != pytest.approx(contraction(log_slope_tanh, torch.tensor([1.0, 2.0])), abs=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_output_entropy(torch.ones(2, 2, 2)), r"\(2, 2, 2\): give one matrix"),
        (lambda: gaussian_output_entropy(torch.ones(0, 2)), "give one matrix"),
        (lambda: gaussian_output_entropy(torch.tensor([[math.nan]])), "NaN"),
        (lambda: gaussian_output_entropy(torch.ones(2, 3), torch.eye(2)), "inputs of 3 dimensions"),
        (lambda: gaussian_output_entropy(torch.ones(2, 2), torch.tensor([[1.0, 2], [0, 1]])), "symmetric"),
        (lambda: gaussian_output_entropy(torch.ones(2, 2), torch.diag(torch.tensor([1.0, -1]))), "eigenvalue -1"),
        (lambda: isotropic_output_entropy(0.0, -1), "rank=-1"),
        (lambda: isotropic_output_entropy(0.0, 1, scale=0.0), "scale=0.0"),
        (lambda: entropy_deficit(0.0, 1.0, 0), "rank=0"),
        (lambda: contraction(log_slope_tanh, torch.tensor([0.0])), "positive"),
        (lambda: contraction(log_slope_tanh, torch.tensor(1.0)), r"shape \(dim,\)"),
        (lambda: contraction(lambda y: torch.full_like(y, math.log(1.5)), torch.ones(1)), "reaches 1.5"),
        (lambda: log_slope_leaky_relu(0.0), "ReLU's output has no density"),
    ],
)
def test_bad_input_is_an_error_that_says_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()

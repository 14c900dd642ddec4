"""The criteria against NumPy, SciPy and simulations of random matrices."""

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import integrate, linalg, special
from torch import nn

from kappa_lightning import KappaProfile
from kappa_lightning.selection import CRITERIA, criterion_of, expected_log_kappa, per_matrix, register_criterion

SIGMA = [5.0, 3.0, 2.0, 0.5]


def profile_of(experts="mean", **tensors):
    parameters = {name: nn.Parameter(torch.as_tensor(tensor, dtype=torch.float64)) for name, tensor in tensors.items()}
    return KappaProfile.from_model(nn.ParameterDict(parameters), progress=False, solver="svd", experts=experts)


def matrix_of(sigma, rows, cols, seed=0):
    """A matrix with these singular values between random rotations."""
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.standard_normal((rows, rows)))[0][:, : len(sigma)]
    right = np.linalg.qr(generator.standard_normal((cols, cols)))[0][:, : len(sigma)]
    return left * np.asarray(sigma) @ right.T


def score(name, tensor, experts="mean"):
    (row,) = profile_of(experts, tensor=tensor)
    return criterion_of(name)(row)


def deficit(sigma):
    sigma = np.asarray(sigma)
    return math.log(np.sqrt((sigma**2).mean())) - np.log(sigma).mean()


REFERENCES = {
    "kappa": lambda sigma, shape: max(sigma) / min(sigma),
    "excess_kappa": lambda sigma, shape: math.log(max(sigma) / min(sigma)) - expected_log_kappa(*shape),
    "entropy_deficit": lambda sigma, shape: deficit(sigma),
    "stable_rank": lambda sigma, shape: max(sigma) ** 2 / sum(value**2 for value in sigma),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("shape", [(4, 4), (4, 9), (9, 4)])
def test_criterion_is_that_of_the_singular_values(name, shape):
    assert score(name, matrix_of(SIGMA, *shape)) == pytest.approx(REFERENCES[name](SIGMA, shape), rel=1e-9)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("experts", "combine"), [("mean", np.mean), ("median", np.median), ("max", np.max)])
def test_criterion_combines_over_experts_as_the_profile_says(name, experts, combine):
    spectra = [SIGMA, [1.0, 1.0, 1.0, 0.9], [9.0, 1.0, 1.0, 0.01]]
    stack = np.stack([matrix_of(sigma, 4, 6, seed) for seed, sigma in enumerate(spectra)])
    expected = combine([REFERENCES[name](sigma, (4, 6)) for sigma in spectra])
    assert score(name, stack, experts) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["kappa", "excess_kappa", "entropy_deficit", "stable_rank"])
def test_scale_and_transposition_change_no_score(name):
    matrix = matrix_of(SIGMA, 4, 9)
    assert score(name, 1e-20 * matrix.T) == pytest.approx(score(name, matrix), rel=1e-9)


def test_a_conv_kernel_is_scored_as_the_matrix_that_acts_on_its_inputs():
    kernel = torch.randn(6, 2, 3, 3)
    (row,) = [row for row in KappaProfile.from_model(conv_of(kernel), progress=False) if row.name == "weight"]
    sigma = np.linalg.svd(kernel.double().flatten(1).numpy(), compute_uv=False)
    for name, reference in REFERENCES.items():
        assert criterion_of(name)(row) == pytest.approx(reference(sigma, (6, 18)), rel=1e-3)


def conv_of(kernel):
    conv = nn.Conv2d(2, 6, 3)
    conv.weight.data = kernel
    return conv


def test_equal_singular_values_have_no_deficit_and_every_other_spectrum_has_one():
    assert score("entropy_deficit", matrix_of([2.0] * 5, 5, 8)) == pytest.approx(0, abs=1e-12)
    generator = np.random.default_rng(3)
    for _ in range(50):
        sigma = np.exp(generator.standard_normal(6))
        assert 0 < deficit(sigma) < math.log(sigma.max() / sigma.min())
        assert score("entropy_deficit", matrix_of(sigma, 6, 6)) == pytest.approx(deficit(sigma), rel=1e-9)


def test_a_single_row_is_perfectly_round():
    row = np.array([[3.0, 4.0]])
    stack = np.concatenate([row, row])[:, None]
    assert [score(name, stack) for name in REFERENCES] == pytest.approx([1, 0, 0, 1])


@pytest.mark.parametrize("name", ["kappa", "excess_kappa", "entropy_deficit"])
def test_rank_deficient_and_zero_matrices_score_infinity(name):
    assert score(name, np.outer([1.0, 2.0], [3.0, 4.0])) == math.inf
    assert score(name, np.zeros((2, 2))) == math.inf


def test_stable_rank_of_a_rank_one_matrix_is_the_lowest_and_a_zero_matrix_is_behind_it():
    assert score("stable_rank", np.outer([1.0, 2.0], [3.0, 4.0])) == pytest.approx(1)
    assert score("stable_rank", np.zeros((2, 2))) == math.inf


def test_random_is_the_hash_of_seed_and_name():
    (row,) = profile_of(weight=np.eye(2))
    for seed in (0, 7, -1):
        digest = hashlib.sha256(f"{seed}:weight".encode()).hexdigest()
        assert criterion_of("random", seed)(row) == int(digest[:12], 16) / 16**12


def test_random_is_uniform_over_names_and_independent_over_seeds():
    rows = list(profile_of(**{f"layer_{index}": np.eye(2) for index in range(1000)}))
    draws = np.array([[criterion_of("random", seed)(row) for row in rows] for seed in range(3)])
    counts = np.array([np.histogram(draw, 10, (0, 1))[0] for draw in draws])
    # 180 standard-normal squares, near enough: mean 27 in all, 99.99 % below 61.
    assert (((counts - 100) ** 2) / 100).sum() < 61
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.15


# What a random matrix is expected to have


NODES = np.polynomial.legendre.leggauss(60)


def survival(t, excess):
    """P(n·λ_min > t) for n → ∞ with cols − rows = excess, a Fredholm determinant (Forrester 2006)."""
    x, weights = (NODES[0] + 1) / 2, np.sqrt(NODES[1] / 2)
    kernel = np.sqrt(t) * special.jv(excess, 2 * np.sqrt(t * np.outer(x, x)))
    return np.linalg.det(np.eye(60) - weights[:, None] * kernel * weights)


def hard_edge_mean(excess):
    """lim E[ln(n·λ_min)] by integrating the survival function over ln t."""
    above = integrate.quad(lambda u: survival(math.exp(u), excess), 0, math.log(2 * (excess + 8) ** 2), limit=200)[0]
    return above - integrate.quad(lambda u: 1 - survival(math.exp(u), excess), -50, 0, limit=200)[0]


def test_reference_has_the_two_closed_forms_that_are_known():
    for t in (0.1, 1.0, 5.0):
        assert survival(t, 0) == pytest.approx(math.exp(-t / 2 - math.sqrt(t)), rel=1e-9)
        assert survival(t, 1) == pytest.approx(math.exp(-t / 2), rel=1e-9)
    assert hard_edge_mean(1) == pytest.approx(math.log(2) - np.euler_gamma, abs=1e-7)


@pytest.mark.parametrize("excess", [0, 1, 2, 3, 5, 10, 25])
def test_expectation_of_large_nearly_square_matrices_is_the_hard_edge_limit(excess):
    rows = 100_000
    # Here λ_max is 4n but for n^(-2/3).
    expected = (math.log(4 * rows) - (hard_edge_mean(excess) - math.log(rows))) / 2
    assert expected_log_kappa(rows, rows + excess) == pytest.approx(expected, abs=2e-3)


def test_expectation_of_large_matrices_is_edelmans_and_marchenko_pasturs():
    assert expected_log_kappa(10**6, 10**6) == pytest.approx(math.log(10**6) + 1.537, abs=1e-3)
    for beta in (0.25, 0.5, 0.9):
        limit = math.log((1 + math.sqrt(beta)) / (1 - math.sqrt(beta)))
        assert expected_log_kappa(round(beta * 10**7), 10**7) == pytest.approx(limit, abs=2e-3)


def simulated(rows, cols, count):
    """ln κ of Gaussian matrices through their bidiagonal form of χ variables (Dumitriu and Edelman 2002)."""
    generator = np.random.default_rng(rows * 1000 + cols)
    found = []
    for _ in range(count):
        diagonal = generator.chisquare(cols - np.arange(rows))
        below = generator.chisquare(np.arange(rows - 1, 0, -1))
        gram = diagonal + np.concatenate([[0.0], below])
        coupling = np.sqrt(diagonal[:-1] * below)
        eigenvalues = linalg.eigvalsh_tridiagonal(gram, coupling)
        found.append(0.5 * math.log(eigenvalues[-1] / eigenvalues[0]))
    return np.mean(found), np.std(found) / math.sqrt(count)


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ((2, 2), 0.03), ((2, 3), 0.03), ((2, 8), 0.03), ((3, 3), 0.01), ((3, 4), 0.01), ((4, 16), 0.01),
        ((8, 11), 0.01), ((32, 32), 0.01), ((32, 36), 0.01), ((64, 72), 0.01), ((64, 256), 0.01),
    ],
)  # fmt: skip
def test_expectation_is_that_of_simulations_within_the_error_it_states(shape, error):
    mean, standard_error = simulated(*shape, count=4000)
    assert abs(expected_log_kappa(*shape) - mean) < error + 4 * standard_error


def test_simulation_has_the_law_of_gaussian_matrices():
    generator = np.random.default_rng(0)
    found = [math.log(np.linalg.cond(generator.standard_normal((5, 7)))) for _ in range(4000)]
    mean, standard_error = simulated(5, 7, 4000)
    assert abs(np.mean(found) - mean) < 4 * math.hypot(standard_error, np.std(found) / math.sqrt(4000))


def test_expectation_takes_either_orientation_and_refuses_an_empty_matrix():
    assert expected_log_kappa(40, 7) == expected_log_kappa(7, 40)
    assert expected_log_kappa(1, 40) == 0
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        expected_log_kappa(0, 3)


# Names


@pytest.mark.parametrize("name", ["", "a:b", "reversed:kappa"])
def test_criterion_cannot_have_a_name_that_no_argument_could_mean(name):
    with pytest.raises(ValueError, match="without a colon"):
        register_criterion(name)


def test_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="'kappa' already"):
        register_criterion("kappa")


def test_registered_criterion_is_found_and_reversed(monkeypatch):
    monkeypatch.setattr("kappa_lightning.selection.criteria.CRITERIA", dict(CRITERIA))

    @register_criterion("norm")
    @per_matrix
    def norm(matrix):
        return matrix.frobenius_norm

    (row,) = profile_of("max", weight=np.stack([3 * np.eye(2), 5 * np.eye(2)]))
    assert criterion_of("norm")(row) == norm(row) == pytest.approx(5 * math.sqrt(2))
    assert criterion_of("reversed:norm")(row) == -norm(row)


@pytest.mark.parametrize("name", ["-kappa", "reversed:", "reversed:reversed:kappa", "reversed: kappa", "Kappa"])
def test_unknown_spelling_is_an_error_that_shows_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown: use one of 'kappa'.*'random'.*, or 'reversed:' and one of them"):
        criterion_of(name)


@pytest.mark.parametrize("seed", [1.5, "1", True, None])
def test_seed_that_is_no_int_is_a_type_error(seed):
    with pytest.raises(TypeError, match="seed="):
        criterion_of("random", seed)

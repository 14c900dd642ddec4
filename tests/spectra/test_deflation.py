"""The proof by deflation: what it shows is true, and it shows nothing where it cannot."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra_matrices import as_tensor, gaussian, orthogonal, reference_kappa, relative_error, spiky

from kappa_lightning.spectra import few_columns, spectrum
from kappa_lightning.spectra.deflation import Deflation, find_top
from kappa_lightning.spectra.ladder import Schedule, take_rung
from kappa_lightning.spectra.matrices import TallMatrices

SEED = 5


def symmetric(rng: np.random.Generator, eigenvalues: np.ndarray) -> torch.Tensor:
    basis = orthogonal(rng, len(eigenvalues), len(eigenvalues))
    return as_tensor(basis * eigenvalues @ basis.T)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(48, 120),
    decay=st.floats(0.2, 1.0),
    crowd=st.integers(0, 40),
    noise=st.sampled_from([0.0, 1e-6, 1e-3, 1e-1]),
    tolerance=st.sampled_from([1e-4, 1e-3, 1e-2]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_shown_is_above_every_eigenvalue(size, decay, crowd, noise, tolerance, seed):
    rng = np.random.default_rng(seed)
    eigenvalues = np.sort(rng.random(size) * decay)
    eigenvalues[-1 - crowd :] = 1 - 1e-3 * rng.random(crowd + 1)
    matrix = symmetric(rng, eigenvalues)
    found = find_top(lambda block: block @ matrix, size, tolerance, 1)
    # A block that is worse than what is found of itself.
    vectors = torch.linalg.qr((found.vectors + noise * as_tensor(rng.standard_normal((16, size)))).mT).Q.mT
    block = Deflation.of(vectors, vectors @ matrix, tolerance)
    assert block.ritz <= eigenvalues.max() * (1 + 1e-12)
    if block.is_shown(lambda block: block @ matrix, 1e-12, SEED):
        assert block.upper >= eigenvalues.max() * (1 - 1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), noise=st.floats(1e-3, 0.3))
def test_rest_of_the_spectrum_may_reach_just_what_is_allowed(seed, noise):
    """With the rest moved to c nothing lies above τ; with it a little higher, and E where it hurts, something does."""
    rng = np.random.default_rng(seed)
    basis = as_tensor(orthogonal(rng, 40, 40))
    inner = torch.diag(torch.linspace(0.5, 1, 16, dtype=torch.float64))
    coupling = torch.zeros(16, 24, dtype=torch.float64)
    coupling[-1, -1] = noise * 0.05
    image = torch.cat([inner, coupling], dim=1) @ basis
    found = Deflation.of(basis[:16], image, 1e-2)

    def largest(rest: float) -> float:
        whole = torch.block_diag(inner, rest * torch.eye(24, dtype=torch.float64))
        whole[:16, 16:], whole[16:, :16] = coupling, coupling.mT
        return float(torch.linalg.eigvalsh(whole)[-1])

    assert largest(found.allowed) == pytest.approx(found.upper, rel=1e-9)
    assert largest(found.allowed + 1e-3) > found.upper


def test_an_eigenvalue_that_the_block_has_missed_is_noticed():
    eigenvalues = torch.linspace(0.1, 1, 64, dtype=torch.float64)
    matrix, axes = torch.diag(eigenvalues), torch.eye(64, dtype=torch.float64)
    with_the_largest, without_it = axes[-16:].contiguous(), axes[-17:-1].contiguous()
    for vectors, shown in ((with_the_largest, True), (without_it, False)):
        block = Deflation.of(vectors, vectors @ matrix, 1e-3)
        assert block.is_shown(lambda block: block @ matrix, 1e-12, SEED) is shown


def test_rounding_of_the_operator_is_counted():
    eigenvalues = torch.linspace(0.1, 1, 64, dtype=torch.float64)
    matrix, vectors = torch.diag(eigenvalues), torch.eye(64, dtype=torch.float64)[-16:].contiguous()
    block = Deflation.of(vectors, vectors @ matrix, 1e-3)
    for error, shown in ((1e-6, True), (1.0, False)):
        assert block.affords(error) is shown
        assert block.is_shown(lambda block: block @ matrix, error, SEED) is shown


@pytest.mark.parametrize("decades", [40, 300])
def test_a_spectrum_over_many_decades_is_shown_without_overflow(decades):
    eigenvalues = torch.logspace(0, -decades, 64, dtype=torch.float64)
    matrix, axes = torch.diag(eigenvalues), torch.eye(64, dtype=torch.float64)
    for vectors, shown in ((axes[:16].contiguous(), True), (axes[1:17].contiguous(), False)):
        block = Deflation.of(vectors, vectors @ matrix, 1e-3)
        assert block.is_shown(lambda block: block @ matrix, 0.0, SEED) is shown
    assert find_top(lambda block: block @ matrix, 64, 1e-3, 1).ritz == pytest.approx(1.0)


def test_a_block_with_numbers_that_are_none_shows_nothing():
    vectors = torch.eye(64, dtype=torch.float64)[:16].contiguous()
    block = Deflation.of(vectors, vectors * torch.nan, 1e-3)
    assert not block.is_shown(lambda block: block, 1e-12, SEED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", [gaussian, spiky])
@pytest.mark.parametrize("shape", [(400, 400), (900, 460)])
def test_weights_of_a_few_hundred_columns_are_settled_on_the_first_rung(shape, family, dtype):
    matrix = as_tensor(family(np.random.default_rng(3), *shape), dtype)
    stack = TallMatrices.of(matrix[None], matrix.abs().amax()[None].double())
    values = take_rung("deflate64", stack, Schedule(("deflate64",), 1, 512, 448), rtol=1e-3)
    true = reference_kappa(matrix.double().numpy())
    assert values.rtol <= 1e-3
    assert relative_error(values.kappa, true) <= float(values.rtol)
    assert values.log_volume.item() == pytest.approx(float(torch.linalg.svdvals(matrix.double()).log().sum()), abs=1e-6)
    assert values.frobenius_norm.item() == pytest.approx(float(matrix.double().norm()), rel=1e-12)


@pytest.mark.parametrize("shape", [(400, 400), (900, 460)])
def test_a_wrong_block_is_handed_to_the_next_rung(shape, monkeypatch):
    """A search that finds the wrong end costs time and nothing else."""
    original = few_columns.find_top
    matrix = as_tensor(spiky(np.random.default_rng(3), *shape))
    monkeypatch.setattr(few_columns, "find_top", lambda o, n, t, p: dropped_largest(o, original(o, n, t, p), t))
    values = spectrum(matrix)
    assert values.rtol <= 1e-3
    assert relative_error(values.kappa, reference_kappa(matrix.numpy())) <= 1e-3


def dropped_largest(operator, found: Deflation, tolerance: float) -> Deflation:
    """The block without its largest direction."""
    projected = operator(found.vectors) @ found.vectors.mT
    basis = torch.linalg.eigh(projected).eigenvectors
    vectors = basis[:, :-1].mT @ found.vectors
    return Deflation.of(vectors, operator(vectors), tolerance)

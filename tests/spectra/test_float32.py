"""What float32 contributes, a factor and a Lanczos run, is measured in float64 and refused where it is not enough."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra_matrices import FAMILIES, as_tensor, reference_kappa, relative_error, with_singular_values

from kappa_lightning.spectra import ladder, rungs, spectrum
from kappa_lightning.spectra.backward_error import compare
from kappa_lightning.spectra.factors import gram_cholesky, gram_matrix, lu_factor, triangular_factor
from kappa_lightning.spectra.ladder import Schedule, climb, take_rung
from kappa_lightning.spectra.lanczos import LargestEigenvalue, largest_eigenvalue, quick_run
from kappa_lightning.spectra.matrices import TallMatrices
from kappa_lightning.spectra.random_blocks import gaussian_block
from kappa_lightning.spectra.recurrence import Recurrence, RecurrenceProbe
from kappa_lightning.spectra.ritz import extreme_ritz_values
from kappa_lightning.spectra.rotation import Rotation, dominant_rotation
from kappa_lightning.spectra.rungs import rounding_error

CPU = torch.device("cpu")


def tall(stack: torch.Tensor) -> TallMatrices:
    return TallMatrices.of(stack, stack.abs().amax((-2, -1)).double())


def plan(*rungs: str) -> Schedule:
    return Schedule(rungs, members=64, rows=50, lanczos_from=0)


def learned(rows: int, cols: int, strength: float) -> torch.Tensor:
    """Noise and four directions that are ``strength`` times longer."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((rows, cols)) / np.sqrt(rows)
    left, right = (np.linalg.qr(rng.standard_normal((size, 4)))[0] for size in (rows, cols))
    return as_tensor(noise + strength * (left * [1, 0.7, 0.4, 0.2]) @ right.T)


@pytest.fixture
def rungs_taken(monkeypatch):
    taken = []

    def spy(rung, matrices, *rest):
        values = take_rung(rung, matrices, *rest)
        taken.append((rung, float(values.rtol.max())))
        return values

    monkeypatch.setattr(ladder, "take_rung", spy)
    # Matrices small enough for a test would not come to float32 by themselves.
    monkeypatch.setattr(ladder, "_EIGEN_BELOW", 0)
    monkeypatch.setattr(ladder, "_DEFLATE_BELOW", 0)
    return taken


@pytest.mark.parametrize("shape", [(700, 480), (480, 700)], ids=str)
def test_a_learned_weight_is_settled_in_float32(shape, rungs_taken):
    """κ is 3,000, whose square times the rounding of float32 is 1: the four long directions must be set apart."""
    matrix = learned(700, 480, 500.0).reshape(700, 480)
    matrix = matrix if shape == (700, 480) else matrix.mT
    result = spectrum(matrix)
    assert [rung for rung, _ in rungs_taken] == ["gram32"]
    true = reference_kappa(matrix.numpy())
    assert true > 2000
    assert relative_error(result.kappa, true) <= float(result.rtol) <= 1e-3
    sigma = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert float(result.log_volume) == pytest.approx(np.log(sigma).sum(), abs=1e-3)


@pytest.mark.parametrize("profile", ["even", "graded", "one_small", "noise"])
@pytest.mark.parametrize("kappa", [5, 30, 100, 300])
def test_no_less_accurate_than_float32_singular_values(kappa, profile):
    """PEFT's selector takes these; what they miss κ by is at times less than float32 resolves, by luck."""
    rng = np.random.default_rng(kappa)
    rows, cols = 640, 460
    sigma = {
        "even": np.linspace(1, 1 / kappa, cols),
        "graded": np.geomspace(1, 1 / kappa, cols),
        "one_small": np.append(np.linspace(1, 0.5, cols - 1), 1 / kappa),
    }
    if profile == "noise":
        matrix = rng.standard_normal((round(cols * ((kappa + 1) / (kappa - 1)) ** 2), cols))
    else:
        matrix = with_singular_values(rng, rows, cols, sigma[profile])
    stored = as_tensor(matrix, torch.float32)
    true = reference_kappa(stored.double().numpy())
    single = torch.linalg.svdvals(stored)
    allowed = max(relative_error(single[0] / single[-1], true), torch.finfo(torch.float32).eps)
    assert relative_error(spectrum(stored).kappa, true) <= allowed


@pytest.mark.parametrize("error", [1e-4, 1e-3])
def test_ritz_values_of_the_matrix_are_off_by_the_square_of_the_error(error):
    """And lie inside its spectrum; what the subspaces came from need not be right."""
    rng = np.random.default_rng(3)
    matrix = with_singular_values(rng, 90, 60, np.linspace(2, 0.1, 60))
    _, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    tilted = as_tensor(right + error * rng.standard_normal((60, 60)) / np.sqrt(60))[None]
    blocks = [as_tensor(matrix[:50])[None], as_tensor(matrix[50:])[None]]
    largest, smallest = extreme_ritz_values(lambda: blocks, 3 * tilted[:, :8], tilted[:, -8:] / 7)
    assert 0 <= 1 - float(largest) / sigma[0] <= error**2
    assert 0 <= float(smallest) / sigma[-1] - 1 <= 400 * error**2
    broken = tilted[:, -8:].clone()
    broken[..., 0] = np.nan
    assert extreme_ritz_values(lambda: blocks, tilted[:, :8], broken)[1].isnan()


def test_without_the_rotation_float32_shows_nothing_for_it(monkeypatch):
    matrices = tall(learned(700, 480, 500.0)[None])
    axes = torch.eye(480, dtype=torch.float64)[None, :16]
    original = rungs.dominant_rotation
    monkeypatch.setattr(
        rungs, "dominant_rotation", lambda *given: (Rotation.onto_first_axes(axes), original(*given)[1])
    )
    assert not take_rung("gram32", matrices, plan("gram32"), 1e-3).rtol <= 1e-3


@pytest.mark.parametrize("family", ["graded", "clustered_smallest", "one_tiny", "rank_deficient", "kahan"])
def test_a_matrix_beyond_float32_is_handed_over(family, rungs_taken):
    """Small singular values in no few directions, which no rotation sets apart."""
    matrix = FAMILIES[family](np.random.default_rng(7), 640, 460)
    true = reference_kappa(matrix)
    assert true > 1e4
    result = spectrum(as_tensor(matrix))
    assert rungs_taken[0] == ("gram32", np.inf)
    assert len(rungs_taken) > 1
    assert result.kappa == true if np.isinf(true) else relative_error(result.kappa, true) <= float(result.rtol) <= 1e-3


def test_a_wrong_float32_factor_is_refused(monkeypatch):
    matrices = tall(learned(300, 200, 50.0)[None])
    assert take_rung("gram32", matrices, plan("gram32"), 1e-3).rtol <= 1e-3

    def spoilt(gram, in_place):
        upper, found = gram_cholesky(gram, in_place)
        upper[:, 120, 150] += 0.05 * upper[:, 120, 120]
        return upper, found

    monkeypatch.setattr(rungs, "gram_cholesky", spoilt)
    assert not take_rung("gram32", matrices, plan("gram32"), 1e-3).rtol <= 1e-3
    values = climb(matrices, [0], plan("gram32", "qr64", "svd"), 1e-3)
    true = reference_kappa(learned(300, 200, 50.0).numpy())
    assert relative_error(values.sigma_max / values.sigma_min, true) <= float(values.rtol) <= 1e-3


@pytest.mark.parametrize("family", ["gaussian", "spiky", "row_scaled", "dead_column"])
def test_a_rotation_is_orthogonal_and_is_undone(family):
    matrices = tall(as_tensor(np.stack([FAMILIES[family](np.random.default_rng(s), 90, 60) for s in range(2)])))
    rotation, _ = dominant_rotation(matrices, 50, 5e-4)
    block = matrices.scaled(torch.float64)
    rotated = rotation.of_rows(block)
    torch.testing.assert_close(rotation.back(rotated), block, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.linalg.svdvals(rotated), torch.linalg.svdvals(block), rtol=0, atol=1e-13)


def test_a_rotation_puts_the_largest_directions_first():
    matrices = tall(learned(300, 200, 50.0)[None])
    scaled = matrices.scaled(torch.float64)
    sigma = torch.linalg.svdvals(scaled)[0]
    lengths = torch.linalg.vector_norm(dominant_rotation(matrices, 100, 5e-4)[0].of_rows(scaled), dim=-2)[0]
    torch.testing.assert_close(lengths[:4], sigma[:4], rtol=1e-3, atol=0)
    assert lengths[16:].max() < sigma[4]


def bracket_of_the_rotation(matrices: TallMatrices) -> LargestEigenvalue:
    scaled = matrices.scaled(torch.float64)
    _, run = dominant_rotation(matrices, 100, 5e-4)
    assert run is not None
    return run.measured(run.probe.vectors @ scaled.mT @ scaled)


def test_directions_that_stand_out_are_bracketed_without_the_factor():
    """σ_max² of the matrix itself; in a crowd three steps show nothing, and say so."""
    matrices = tall(torch.cat([learned(300, 200, 50.0)[None], learned(300, 200, 80.0)[None]]))
    sigma = torch.linalg.svdvals(matrices.scaled(torch.float64))[:, 0]
    found = bracket_of_the_rotation(matrices)
    assert bool((found.lower <= sigma**2).all())
    assert bool((sigma**2 <= found.upper).all())
    assert bool(found.settled(5e-4).all())
    crowded = tall(as_tensor(FAMILIES["gaussian"](np.random.default_rng(1), 300, 200))[None])
    assert dominant_rotation(crowded, 100, 5e-4)[1] is None


def test_a_wrong_bracket_of_the_top_is_refused(monkeypatch):
    """The float32 run that gives the rotation is measured before anything is read off it."""
    from kappa_lightning.spectra import rotation as module

    inner = module.gram_product
    monkeypatch.setattr(module, "gram_product", lambda block, parts: inner(block, parts) * 0.95)
    matrices = tall(learned(300, 200, 50.0)[None])
    largest = float(torch.linalg.matrix_norm(matrices.scaled(torch.float64), 2) ** 2)
    assert float(bracket_of_the_rotation(matrices).upper) >= largest
    values = take_rung("gram32", matrices, plan("gram32"), 1e-3)
    true = reference_kappa(learned(300, 200, 50.0).numpy())
    assert relative_error(values.sigma_max / values.sigma_min, true) <= float(values.rtol) <= 1e-3


def test_the_run_behind_the_rotation_starts_from_a_block_of_its_own():
    """What is certified with a start block must not have been made with it."""
    matrices = tall(learned(300, 200, 50.0)[None])
    _, rotating = dominant_rotation(matrices, 100, 5e-4)
    certified = largest_eigenvalue(lambda block: block, 200, 1, device=CPU, tolerance=1e-3)
    overlaps = torch.linalg.svdvals(rotating.probe.recurrence.basis[0, :16].double() @ certified.basis[0, :16].mT)
    assert overlaps.max() < 0.8


def test_a_crowd_at_the_bottom_below_directions_that_stand_out():
    """σ_max comes from the bracket on A, σ_min from all singular values of the factor."""
    sigma = np.concatenate([[300.0, 200.0, 90.0], np.linspace(3, 2, 57), np.full(140, 1.0) + 1e-5 * np.arange(140)])
    matrix = with_singular_values(np.random.default_rng(5), 300, 200, sigma)
    values = take_rung("gram32", tall(as_tensor(matrix)[None]), plan("gram32"), 1e-3)
    assert relative_error(values.sigma_max / values.sigma_min, reference_kappa(matrix)) <= float(values.rtol) <= 1e-3


@pytest.mark.parametrize("shape", [(700, 480), (500, 470), (480, 900)], ids=str)
@pytest.mark.parametrize("strength", [3.0, 20.0, 400.0])
def test_large_matrices_with_directions_that_stand_out(shape, strength):
    matrix = learned(*shape, strength)
    result = spectrum(matrix)
    assert relative_error(result.kappa, reference_kappa(matrix.numpy())) <= float(result.rtol) <= 1e-3


@pytest.mark.parametrize("end", ["bounds_max", "bounds_min"])
def test_a_bracket_that_does_not_hold_what_was_found_shows_nothing(monkeypatch, end):
    matrices = tall(learned(300, 200, 50.0)[None])
    inner = rungs._ends_by_lanczos

    def spoilt(*arguments):
        ends = inner(*arguments)
        low, high = getattr(ends, end)
        factor = 0.9 if end == "bounds_max" else 1.1
        return replace(ends, **{end: (factor * low, factor * high)})

    monkeypatch.setattr(rungs, "_ends_by_lanczos", spoilt)
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: matrix.new_zeros(len(matrix), 200))
    assert not take_rung("gram32", matrices, plan("gram32"), 1e-3).rtol <= 1e-3


def test_measured_bound_of_a_rotated_factor_holds():
    matrices = tall(learned(300, 200, 50.0)[None])
    rotation, _ = dominant_rotation(matrices, 100, 5e-4)
    upper, _ = gram_cholesky(gram_matrix(matrices, torch.float32, 100, rotation), in_place=True)
    factor = triangular_factor(upper)
    scaled = matrices.scaled(torch.float64)
    quotient = torch.linalg.solve_triangular(upper.double(), rotation.of_rows(scaled), upper=True, left=False)
    true = torch.linalg.matrix_norm(quotient.mT @ quotient - torch.eye(200), 2)
    for powers in (1, 2):
        bound = compare(lambda: [scaled], factor.rotated_back(rotation), powers).error
        assert float(true) <= float(bound) <= 100 * float(true)


def recurrence(operator, size: int, steps: int):
    """Block Lanczos in float64, without a thought for speed: basis rows, T and B_k."""
    start, _ = torch.linalg.qr(gaussian_block(size, 5, CPU))
    basis, last = start, None
    for _ in range(steps):
        projected = basis.mT @ operator(basis)
        block, last = torch.linalg.qr(operator(basis[:, -16:]) - basis @ projected[:, -16:])
        block, rest = torch.linalg.qr(block - basis @ (basis.mT @ block))
        last = rest @ last
        basis = torch.cat([basis, block], dim=1)
    return basis.mT[None], projected[None], last[None]


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_measured_error_of_a_recurrence_bounds_the_true_one(noise):
    size = 200
    eigenvalues = torch.linspace(0.01, 1, size, dtype=torch.float64)[:, None]
    basis, tridiagonal, coupling = recurrence(lambda block: eigenvalues * block, size, 4)
    basis = basis + noise * torch.randn(basis.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probe = RecurrenceProbe.of(Recurrence(basis, tridiagonal, coupling, torch.zeros(1, dtype=torch.bool)))
    bound, skew = probe.errors(probe.vectors * eigenvalues.mT)
    q = basis[0].mT
    error = eigenvalues * q[:, :64] - q[:, :64] @ tridiagonal[0]
    error[:, -16:] -= q[:, 64:] @ coupling[0]
    true = float(torch.linalg.matrix_norm(error, 2))
    assert true <= float(bound) + 1e-14
    assert float(bound) <= 60 * true + 1e-13
    assert float(torch.linalg.matrix_norm(q.mT @ q - torch.eye(80), 2)) <= float(skew) + 1e-14


@pytest.mark.parametrize("tilt", [1e-6, 1e-2])
def test_measured_skew_bounds_the_true_one_where_the_recurrence_is_exact(tilt):
    """M = I and T = I have no error whatever Q is, so that nothing but QᵀQ − I can show."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(200, 80, generator=generator, dtype=torch.float64)).Q.mT[None]
    basis = basis + tilt * torch.randn(basis.shape, generator=generator, dtype=torch.float64)
    identity, nothing = torch.eye(64, dtype=torch.float64)[None], torch.zeros(1, 16, 16, dtype=torch.float64)
    probe = RecurrenceProbe.of(Recurrence(basis, identity, nothing, torch.zeros(1, dtype=torch.bool)))
    _, skew = probe.errors(probe.vectors)
    true = float(torch.linalg.matrix_norm(basis[0] @ basis[0].mT - torch.eye(80), 2))
    assert tilt < true <= float(skew) <= 60 * true


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(48, 200),
    decay=st.floats(0, 8),
    crowd=st.integers(0, 40),
    error=st.sampled_from([0.0, 1e-6, 1e-4, 1e-2]),
    seed=st.integers(0, 2**32 - 1),
)
def test_bracket_of_a_float32_run_holds_the_eigenvalue_of_the_exact_operator(size, decay, crowd, error, seed):
    """Even if the float32 operator is another one."""
    rng = np.random.default_rng(seed)
    eigenvalues = np.logspace(0, -decay, size)
    eigenvalues[: crowd + 1] = 1 + 1e-5 * rng.random(crowd + 1)
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    exact = as_tensor((basis * eigenvalues) @ basis.T)[None]
    wrong = (exact + error * torch.diag(as_tensor(rng.standard_normal(size)))).float()
    found = largest_eigenvalue(
        lambda block: block @ wrong, size, 1, device=CPU, tolerance=1e-3, exact=lambda block: block @ exact
    )
    assert float(found.lower) <= eigenvalues.max() * (1 + 1e-12)
    assert found.lower <= found.ritz <= found.upper
    assert float(found.upper) >= eigenvalues.max() * (1 - 1e-12)
    if error >= 1e-2:
        assert not found.upper <= 1.001 * found.lower


def runs_of(monkeypatch: pytest.MonkeyPatch, disturbance: float) -> list[bool]:
    """Whether each Lanczos run was in float32; those that were see an operator that is wrong by a factor."""
    runs = []

    def spy(operator, *arguments, **options):
        runs.append(options.get("exact") is not None)
        if runs[-1]:
            inner, operator = operator, lambda block: disturbance * inner(block)
        return largest_eigenvalue(operator, *arguments, **options)

    def quick_spy(operator, *arguments, **options):
        runs.append(True)
        return quick_run(lambda block: disturbance * operator(block), *arguments, **options)

    monkeypatch.setattr(rungs, "largest_eigenvalue", spy)
    monkeypatch.setattr(rungs, "quick_run", quick_spy)
    return runs


@pytest.mark.parametrize("rung", ["lu64", "qr64"])
def test_a_float32_run_that_is_wrong_is_followed_by_one_in_float64(monkeypatch, rung):
    matrices = tall(learned(480, 480, 50.0)[None])
    runs = runs_of(monkeypatch, 1.05)
    values = take_rung(rung, matrices, plan(rung), 1e-3)
    assert runs == [True, False, False]
    true = reference_kappa(matrices.entries[0].numpy())
    assert relative_error(values.sigma_max / values.sigma_min, true) <= float(values.rtol) <= 1e-3


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_error_of_an_lu_factor_counts_whether_or_not_the_top_is_known_without_it(spread):
    """κ = 1e10, where hardly anything but that error is left. A crowd at the top is what Lanczos cannot settle."""
    sigma = np.concatenate([np.linspace(1, 1 - spread, 200), np.linspace(0.4, 0.3, 55), [1e-10]])
    matrix = with_singular_values(np.random.default_rng(0), 256, 256, sigma)
    matrices = tall(as_tensor(matrix)[None])
    error = float(compare(lambda: matrices.row_blocks(torch.float64, 64), lu_factor(matrices, 64)).error)
    assert 1e-4 < error < 5e-4
    values = take_rung("lu64", matrices, plan("lu64"), 1e-3)
    shown, rounding = float(values.rtol), float(rounding_error(torch.tensor(1e10), 256))
    assert relative_error(values.sigma_max / values.sigma_min, reference_kappa(matrix)) <= shown
    # From all singular values of the factor, both of whose ends are then known. Counted twice, the error would make
    # more than two of it; how far below it stays depends on how a machine rounds.
    assert (1 - error) ** -0.5 - 1 + rounding <= shown <= 1.2 * (error + rounding)


def test_error_of_an_lu_factor_counts_once_where_the_top_stands_out():
    sigma = np.concatenate([[1.0], np.linspace(0.1, 0.05, 254), [10**-10.2]])
    matrices = tall(as_tensor(with_singular_values(np.random.default_rng(6), 256, 256, sigma))[None])
    error = float(compare(lambda: matrices.row_blocks(torch.float64, 64), lu_factor(matrices, 64)).error)
    shown = float(take_rung("lu64", matrices, plan("lu64"), 1e-3).rtol)
    rounding = float(rounding_error(torch.tensor(10**10.2), 256))
    assert (1 - error) ** -0.5 - 1 + rounding <= shown <= 0.6 * error + rounding + 1e-4


def test_one_float32_run_is_enough_for_the_top_of_a_square(monkeypatch):
    matrices = tall(learned(480, 480, 50.0)[None])
    runs = runs_of(monkeypatch, 1.0)
    assert take_rung("lu64", matrices, plan("lu64"), 1e-3).rtol <= 1e-3
    assert runs == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 2.0**-13, 2.0**12])
def test_float32_blocks_are_the_float64_ones_rounded(dtype, scale):
    stack = (scale * torch.randn(2, 70, 50, generator=torch.Generator().manual_seed(0))).to(dtype)
    matrices = tall(stack)
    for narrow, wide in zip(
        matrices.row_blocks(torch.float32, 30), matrices.row_blocks(torch.float64, 30), strict=True
    ):
        assert torch.equal(narrow, wide.float())

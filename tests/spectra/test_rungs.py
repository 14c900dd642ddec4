"""Every rung of the ladder on its own: what it shows is true, and it shows nothing where it cannot."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra_matrices import EPS, FAMILIES, FULL_RANK, as_tensor, reference_kappa, relative_error

from kappa_lightning.spectra.backward_error import compare
from kappa_lightning.spectra.certificate import RitzPairs, bracket_prospect, largest_eigenvalue_interval
from kappa_lightning.spectra.factors import (
    gram_cholesky,
    gram_matrix,
    lu_factor,
    qr_factor,
    triangular_factor,
)
from kappa_lightning.spectra.ladder import Schedule, choose_rungs, climb, make_schedule, take_rung
from kappa_lightning.spectra.lanczos import largest_eigenvalue, orthonormalize
from kappa_lightning.spectra.matrices import TallMatrices
from kappa_lightning.spectra.random_blocks import Start, gaussian_block
from kappa_lightning.spectra.recurrence import Recurrence

CPU = torch.device("cpu")


def tall(stack: torch.Tensor) -> TallMatrices:
    return TallMatrices.of(stack, stack.abs().amax((-2, -1)).double())


def plan(*rungs: str, members: int = 64, rows: int = 50, lanczos_from: int = 0) -> Schedule:
    return Schedule(rungs, members, rows, lanczos_from)


@pytest.mark.parametrize("rung", ["deflate64", "gram32", "gram64", "lu64", "qr64", "svd"])
@settings(max_examples=120, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    cols=st.integers(48, 100),
    extra=st.sampled_from([0, 1, 40]),
    lanczos=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_rung_never_shows_more_than_is_true(rung, family, cols, extra, lanczos, seed):
    matrix = FAMILIES[family](np.random.default_rng(seed), cols + (0 if rung == "lu64" else extra), cols)
    values = take_rung(rung, tall(as_tensor(matrix)[None]), plan(rung, lanczos_from=0 if lanczos else 1000), rtol=1e-3)
    true = reference_kappa(matrix)
    shown = float(values.rtol)
    if rung != "svd" and not shown <= 1e-3:
        return
    if values.sigma_min == 0 or np.isinf(true):
        assert true > 0.1 / (max(matrix.shape) * EPS)
        return
    assert relative_error(values.sigma_max / values.sigma_min, true) <= shown + 20 * EPS * true


@pytest.mark.parametrize(
    ("rung", "reach"),
    [("deflate64", 1e6), ("gram32", 100.0), ("gram64", 1e5), ("lu64", 1e8), ("qr64", 1e8), ("svd", 1e9)],
)
def test_a_rung_reaches_the_condition_it_is_meant_for(rung, reach):
    """Otherwise the ladder would be right, and slow."""
    rng = np.random.default_rng(8)
    sigma = np.linspace(1, 0.5, 300)
    sigma[-1] = 1 / reach
    left, right = (np.linalg.qr(rng.standard_normal((300, 300)))[0] for _ in range(2))
    values = take_rung(rung, tall(as_tensor((left * sigma) @ right)[None]), plan(rung), rtol=1e-3)
    assert values.rtol <= 1e-3
    assert relative_error(values.sigma_max / values.sigma_min, reach) <= float(values.rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", sorted(FULL_RANK))
def test_measured_backward_error_bounds_the_true_one(family, dtype):
    matrix = as_tensor(FULL_RANK[family](np.random.default_rng(4), 90, 60))
    matrices = tall(matrix[None])
    factor, found = gram_cholesky(gram_matrix(matrices, dtype, 32), in_place=True)
    if not bool(found):
        return
    (scaled,) = matrices.scaled(torch.float64)
    also = scaled[None, :3]
    compared = compare(lambda: matrices.row_blocks(torch.float64, 32), triangular_factor(factor), also=also)
    sharper = compare(lambda: matrices.row_blocks(torch.float64, 32), triangular_factor(factor), powers=2).error
    quotient = scaled @ torch.linalg.inv(factor[0].double())
    true = torch.linalg.matrix_norm(quotient.mT @ quotient - torch.eye(60), 2)
    if true < 0.1:
        assert true <= compared.error + 1e-9
        assert true <= sharper + 1e-9
    assert compared.norm_squared.sqrt() == pytest.approx(float(torch.linalg.norm(scaled)), rel=1e-13)
    torch.testing.assert_close(compared.image, also @ scaled.mT @ scaled)


def test_a_wrong_factor_is_found_out():
    """The bound is a measurement: it does not trust the factorization that it judges."""
    matrices = tall(torch.randn(1, 200, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    factor = qr_factor(matrices, 64)
    assert compare(lambda: matrices.row_blocks(torch.float64, 64), triangular_factor(factor)).error < 1e-10
    factor[0, 70, 80] += 1e-3 * factor[0, 70, 70].abs()
    assert compare(lambda: matrices.row_blocks(torch.float64, 64), triangular_factor(factor)).error > 1e-4


def test_a_pivot_that_grew_is_found_out():
    """Wilkinson's matrix: partial pivoting doubles an entry in every step, and 100 steps leave no digit."""
    matrix = torch.eye(100, dtype=torch.float64) - torch.ones(100, 100, dtype=torch.float64).tril(-1)
    matrix[:, -1] = 1
    matrix += 1e-3 * torch.randn(100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril()
    matrices = tall(matrix[None])
    bound = compare(lambda: matrices.row_blocks(torch.float64, 64), lu_factor(matrices, 64)).error
    found = take_rung("lu64", matrices, plan("lu64"), rtol=1e-3)
    true = reference_kappa(matrix.numpy())
    assert not found.rtol <= 1e-3 or relative_error(found.sigma_max / found.sigma_min, true) <= float(found.rtol)
    assert bound > 1e-14


def test_chunked_qr_is_the_qr_of_the_whole():
    matrix = torch.randn(2, 500, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = tall(matrix)
    factor = qr_factor(matrices, 70)
    scaled = matrices.scaled(torch.float64)
    torch.testing.assert_close(factor.mT @ factor, scaled.mT @ scaled)


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(48, 200),
    decay=st.floats(0, 8),
    crowd=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_lanczos_bracket_holds_the_largest_eigenvalue(size, decay, crowd, seed):
    rng = np.random.default_rng(seed)
    eigenvalues = np.logspace(0, -decay, size)
    eigenvalues[: crowd + 1] = 1 + 1e-5 * rng.random(crowd + 1)
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    matrix = as_tensor((basis * eigenvalues) @ basis.T)[None]
    found = largest_eigenvalue(lambda block: block @ matrix, size, 1, device=CPU, tolerance=1e-3)
    assert float(found.lower) <= eigenvalues.max() * (1 + 1e-12)
    assert found.lower <= found.ritz <= found.upper
    assert float(found.upper) >= eigenvalues.max() * (1 - 1e-12)


def test_bracket_stays_open_while_lanczos_has_seen_too_little():
    """One step into a flat spectrum nothing above the Ritz value can be excluded yet."""
    size = 400
    eigenvalues = torch.linspace(0.1, 1, size, dtype=torch.float64)
    start = Start.random(size, 0, CPU)
    image = eigenvalues[:, None] * start.block
    diagonal = start.block.mT @ image
    _, coupling = torch.linalg.qr(image - start.block @ diagonal)
    pairs = RitzPairs.of(diagonal[None])
    lower, upper = largest_eigenvalue_interval(pairs, coupling[None], start, 1e-3, torch.zeros_like)
    assert lower < 1
    assert upper >= 1


def bracket_by_the_book(tridiagonal, coupling, start, tolerance, roundoff):
    """The upper end as the docstring has it, a point at a time, relative to the largest Ritz value."""
    theta = np.linalg.eigvalsh(tridiagonal)[-1]
    steps = len(tridiagonal) // 16
    reach = np.linalg.norm(start.triangle, 2)
    growth = 1 + 0.7 * start.overlap / reach
    gaps = tolerance / 16 * growth ** np.arange(np.ceil(np.log(64 / tolerance) / np.log(growth)) + 1)
    excluded = []
    for gap in gaps:
        inverse = np.linalg.inv((1 + gap) * np.eye(len(tridiagonal)) - tridiagonal / theta)
        seen = np.linalg.norm(coupling / theta @ inverse[-16:, :16] @ start.triangle.numpy())
        spread = min(np.linalg.norm(inverse[:, :16] @ start.triangle.numpy()), reach / gap)
        excluded.append(seen + (gap * (growth - 1) + roundoff) * spread < start.overlap)
    tail = np.linalg.norm(coupling / theta) / gaps[-1] * (1 + gaps[-1]) ** (1 - steps) + roundoff / gaps[-1]
    if not excluded[-1] or tail * reach >= start.overlap:
        return np.inf
    return 1 + gaps[max((i + 1 for i, out in enumerate(excluded) if not out), default=0)]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("roundoff", [0.0, 1e-3, 0.02])
@pytest.mark.parametrize("narrow", [1.0, 10.0, 100.0])
def test_upper_end_is_where_the_start_block_would_have_seen_too_little(steps, roundoff, narrow):
    """With an R of any size: a small one makes the grid coarse, and the Neumann series past it the last word."""
    rng = np.random.default_rng(steps)
    start = Start.random(300, 0, CPU)
    start = Start(start.block, start.triangle / narrow, start.overlap)
    diagonal = rng.standard_normal((16 * steps, 16 * steps))
    tridiagonal = diagonal @ diagonal.T / (16 * steps)
    for row in range(steps):
        for col in range(steps):
            if abs(row - col) > 1:
                tridiagonal[16 * row : 16 * row + 16, 16 * col : 16 * col + 16] = 0
    ends = []
    for scale in np.logspace(-6, 6, 49):
        coupling = scale * np.triu(rng.standard_normal((16, 16)))
        pairs = RitzPairs.of(as_tensor(tridiagonal)[None])
        lower, upper = largest_eigenvalue_interval(
            pairs, as_tensor(coupling)[None], start, 1e-2, lambda top: torch.full_like(top, roundoff)
        )
        ends.append(float(upper / lower))
        assert ends[-1] == pytest.approx(bracket_by_the_book(tridiagonal, coupling, start, 1e-2, roundoff), rel=1e-9), (
            scale
        )
    assert max(ends) == np.inf


def test_what_precision_takes_from_the_overlap():
    start = Start.random(100, 1, CPU)
    assert start.rounded(torch.float32).overlap == pytest.approx(
        0.6 - 2 * 2**-23 * float(torch.linalg.matrix_norm(start.triangle)), rel=1e-12
    )
    lost = (start.block.float().double() - start.block) @ start.triangle
    assert torch.linalg.matrix_norm(lost, 2) <= start.overlap - start.rounded(torch.float32).overlap
    assert start.of_length(1.21).overlap == pytest.approx(0.6 / 1.1)
    torch.testing.assert_close(start.block @ start.triangle, gaussian_block(100, 1, CPU))


def test_cheap_question_before_the_bracket_puts_off_an_answer_by_a_step_at_most():
    """And it keeps up with the Ritz value."""
    size, tolerance = 300, 1e-2
    eigenvalues = torch.linspace(0.1, 1, size, dtype=torch.float64)
    start = Start.random(size, 0, CPU)
    basis = start.block
    top = torch.zeros(1, dtype=torch.float64)
    answers = []
    for _ in range(16):
        image = eigenvalues[:, None] * basis
        tridiagonal = basis.mT @ image
        block, coupling = torch.linalg.qr(image[:, -16:] - basis @ tridiagonal[:, -16:])
        recurrence = Recurrence(basis.mT[None], tridiagonal[None], coupling[None], torch.zeros(1, dtype=torch.bool))
        pairs = RitzPairs.of(recurrence.tridiagonal)
        lower, upper = largest_eigenvalue_interval(pairs, recurrence.coupling, start, tolerance, torch.zeros_like)
        h, top = bracket_prospect(recurrence, start, tolerance, top)
        answers.append((bool(h < start.overlap), bool(upper <= (1 + tolerance) * lower)))
        assert lower / (1 + tolerance) <= top <= lower * (1 + 1e-12)
        basis, _ = torch.linalg.qr(torch.cat([basis, block], 1))
    assert (False, False) in answers
    assert (True, True) in answers
    assert answers.count((False, True)) <= 1
    assert answers[-1] == (True, True)


@pytest.mark.parametrize("may_ask", [True, False])
@pytest.mark.parametrize("rank", [16, 5])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_a_block_is_orthonormal_with_two_passes_or_three(may_ask, rank, dtype, close):
    """Three are what a GPU takes, where the host does not ask; also for a block in which directions have ended."""
    generator = torch.Generator().manual_seed(4)
    spanned = torch.linalg.qr(torch.randn(2, 90, 32, generator=generator, dtype=torch.float64)).Q.mT.to(dtype)
    image = torch.randn(2, 16, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        2, rank, 90, generator=generator, dtype=torch.float64
    )
    image = image + 1e-4 * close * torch.randn(image.shape, generator=generator, dtype=torch.float64)
    image = (image - image @ spanned.mT.double() @ spanned.double()).to(dtype)
    block, coupling = orthonormalize(image, spanned, may_ask)
    identity = torch.eye(16, dtype=dtype).expand(2, -1, -1)
    torch.testing.assert_close(block @ block.mT, identity, rtol=0, atol=close)
    assert (block @ spanned.mT).abs().max() < close
    torch.testing.assert_close(coupling.mT @ block, image, rtol=0, atol=100 * close)


@pytest.mark.parametrize("size", [48, 64, 130])
def test_lanczos_on_the_identity_ends_at_once(size):
    found = largest_eigenvalue(lambda block: 3 * block, size, 2, device=CPU, tolerance=1e-4)
    torch.testing.assert_close(found.lower, torch.full((2,), 3.0, dtype=torch.float64))
    assert bool((found.upper <= found.lower * 1.0001).all())


def test_batches_of_easy_and_hard_members_meet_only_the_rungs_they_need():
    rng = np.random.default_rng(0)
    names = ["gaussian", "one_tiny", "rank_deficient", "all_equal", "graded", "kahan"]
    stack = np.stack([FAMILIES[name](rng, 80, 60) for name in names])
    values = climb(tall(as_tensor(stack)), range(6), plan("gram32", "gram64", "qr64", "svd", members=4), 1e-3)
    for index, matrix in enumerate(stack):
        true = reference_kappa(matrix)
        found = float(values.sigma_max[index] / values.sigma_min[index])
        assert found == true if np.isinf(true) else relative_error(found, true) <= max(1e-3, values.rtol[index])


def test_members_taken_together_give_what_they_give_alone():
    """The batched path, which a CPU does not take by itself for large matrices."""
    rng = np.random.default_rng(1)
    stack = as_tensor(np.stack([FAMILIES[name](rng, 130, 100) for name in sorted(FULL_RANK)]))
    matrices = tall(stack)
    everyone = range(len(stack))
    together = climb(matrices, everyone, plan("gram64", "qr64", "svd", members=5), 1e-3)
    alone = climb(matrices, everyone, plan("gram64", "qr64", "svd", members=1), 1e-3)
    torch.testing.assert_close(together.sigma_max, alone.sigma_max, rtol=2e-4, atol=0)
    torch.testing.assert_close(together.log_volume, alone.log_volume)


def test_memory_budget_sets_members_and_rows():
    stack = torch.zeros(50, 300, 20)
    matrices = TallMatrices.of(stack, torch.ones(50, dtype=torch.float64))
    large = make_schedule(matrices, "auto", 1 << 30)
    small = make_schedule(matrices, "auto", 2 << 20)
    tiny = make_schedule(matrices, "auto", 1)
    assert large.members > small.members >= tiny.members == 1
    assert small.members * 300 * 20 * 8 <= 2 << 20
    assert tiny.rows <= large.rows


def test_budget_decides_how_many_chunks_are_worked(monkeypatch):
    from kappa_lightning.spectra import ladder, spectrum

    sizes = []
    inner = ladder.take_rung

    def spy(rung, matrices, *rest):
        sizes.append(matrices.count)
        return inner(rung, matrices, *rest)

    monkeypatch.setattr(ladder, "take_rung", spy)
    stack = torch.randn(24, 30, 30, generator=torch.Generator().manual_seed(0))
    whole = spectrum(stack, memory_budget=1 << 30)
    assert sizes == [24]
    sizes.clear()
    chunked = spectrum(stack, memory_budget=1 << 20)
    assert len(sizes) > 1
    assert sum(sizes) == 24
    torch.testing.assert_close(whole.kappa, chunked.kappa)


@pytest.mark.parametrize(
    ("rows", "cols", "first"),
    [
        (31, 31, "svd"), (62, 31, "eig64"), (32, 32, "eig64"), (447, 447, "eig64"), (448, 448, "deflate64"),
        (767, 767, "deflate64"), (768, 768, "lu64"), (448, 447, "eig64"), (449, 448, "deflate64"), (769, 768, "gram32"),
        (9000, 300, "eig64"), (9000, 500, "deflate64"),
    ],
)  # fmt: skip
def test_small_matrices_of_a_cpu_start_with_eigenvalues_then_with_deflation(rows, cols, first):
    rungs = choose_rungs(CPU, rows, cols)
    assert (rungs[0], rungs[-1]) == (first, "svd")


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("shape", [(60, 60), (300, 40)], ids=str)
def test_eigenvalues_of_the_gram_matrix_keep_what_their_rounding_bound_promises(family, shape):
    """Not only up to the wanted error: the bound itself is held against values to many digits."""
    matrix = FAMILIES[family](np.random.default_rng(5), *shape)
    values = take_rung("eig64", tall(as_tensor(matrix[None])), plan("eig64"), 1e-3)
    true, shown = reference_kappa(matrix), float(values.rtol)
    if np.isfinite(shown):
        assert relative_error(float(values.kappa), true) <= shown
        assert float(values.log_volume) == pytest.approx(
            np.log(np.linalg.svd(matrix, compute_uv=False)).sum(), abs=1e-3
        )
    if true < 1e3:
        assert shown < 1e-3
    if true > 1e8:
        assert not np.isfinite(shown)


@pytest.mark.parametrize(
    ("capability", "first"), [((9, 0), "gram64"), ((8, 0), "gram64"), ((8, 9), "gram32"), ((12, 0), "gram32")]
)
def test_cards_with_slow_float64_start_in_float32(monkeypatch, capability, first):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rungs = choose_rungs(torch.device("cuda"), 4096, 4096)
    assert rungs[0] == first
    assert rungs[-1] == "svd"


def test_new_precision_settings_are_kept_away_and_put_back():
    """PyTorch's older interface raises an error once the newer one was used."""
    matrices = tall(torch.randn(1, 200, 64, generator=torch.Generator().manual_seed(0)))
    plain = gram_matrix(matrices, torch.float32, 64).triu()
    products = torch.backends.mkldnn.matmul
    before, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        lowered = gram_matrix(matrices, torch.float32, 64).triu()
        assert products.fp32_precision == "bf16"
    finally:
        products.fp32_precision = before
    assert torch.equal(plain, lowered)


def test_float32_products_ignore_a_lowered_matmul_precision_and_restore_it():
    matrices = tall(torch.randn(1, 200, 64, generator=torch.Generator().manual_seed(0)))
    before = torch.get_float32_matmul_precision()
    plain = gram_matrix(matrices, torch.float32, 64).triu()
    try:
        torch.set_float32_matmul_precision("medium")
        lowered = gram_matrix(matrices, torch.float32, 64).triu()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(plain, lowered)

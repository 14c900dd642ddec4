"""The rungs that read κ off a factor: Cholesky of the Gram matrix, LU, QR."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kappa_lightning.spectra.backward_error import compare
from kappa_lightning.spectra.dense import is_rank_deficient, rounding_error
from kappa_lightning.spectra.factors import (
    Factor,
    fill_pivots,
    gram_cholesky,
    gram_matrix,
    lu_factor,
    mirror_upper,
    qr_factor,
    triangular_factor,
)
from kappa_lightning.spectra.lanczos import LargestEigenvalue, QuickRun, largest_eigenvalue, quick_run
from kappa_lightning.spectra.matrices import TallMatrices
from kappa_lightning.spectra.products import Operator, full_precision_products, gram_product
from kappa_lightning.spectra.recurrence import PROBE_SEED
from kappa_lightning.spectra.result import Spectrum, nothing_shown, with_rank
from kappa_lightning.spectra.ritz import PROBED, extreme_ritz_values
from kappa_lightning.spectra.rotation import dominant_rotation

SMALLEST_LANCZOS = 48
"""The block size leaves no room for Lanczos in fewer columns."""

# Of the wanted error, what a factor may use up; the rest is for Lanczos.
# Measured against its neighbors by benchmarks/ablation.py.
_FACTOR_SHARE = 0.6
# Below this share a sharper bound would cost more time than the steps of Lanczos that it saves.
# Measured against its neighbors by benchmarks/ablation.py.
_GOOD_FACTOR = 0.45
# Of what the factor leaves (all, where there is none yet), what the top of the spectrum may use up; the bottom gets the
# rest.
# Measured against its neighbors by benchmarks/ablation.py.
_TOP_SHARE = 0.9
# The width, as a share of rtol, at which a bracket of σ_max² that came for nothing is taken.
# Measured against its neighbors by benchmarks/ablation.py.
_EASY_TOP = 0.5
# The bounds are first-order ones.
_LARGEST_RTOL = 0.1
# κ of R may be above κ of A by the factor's error, and was by less than a fifth of its bound; counted for the width of
# the brackets only, which are tighter for it.
_REFINED_SHARE = 0.2
_BOTTOM_PROBE_SEED = 0x626F_7474

# Right singular vectors of R near its largest and its smallest singular value ↦ σ_max and σ_min of A from these.
Refinement = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class _Ends:
    """The ends of the spectrum of R, each of shape (count,), and right singular vectors near them, as rows.

    Attributes:
        sigma_max: the best estimate of R's largest singular value.
        sigma_min: that of its smallest.
        bounds_max: R's largest singular value lies between these.
        bounds_min: its smallest.
        top: shape (count, some, n).
        bottom: same shape.
    """

    sigma_max: Tensor
    sigma_min: Tensor
    bounds_max: tuple[Tensor, Tensor]
    bounds_min: tuple[Tensor, Tensor]
    top: Tensor
    bottom: Tensor


def gram_values(matrices: TallMatrices, rows: int, rtol: float, dtype: torch.dtype, lanczos_from: int) -> Spectrum:
    """Take the values from the Cholesky factor of AᵀA; ``rtol`` of the result is inf where that failed.

    Args:
        matrices: shape (count, m, n).
        rows: how many rows to convert at a time.
        rtol: wanted relative error of κ.
        dtype: precision of the factor; in float32 the dominant directions are set apart first, σ_max is read off A
            itself where one of them stands out, and the measured bound is sharpened by a second reading of A if it
            has to be.
        lanczos_from: number of columns from which on Lanczos runs instead of a full decomposition of R.
    """
    reader = _reader(matrices, rows)
    refine: Refinement | None = None
    top: LargestEigenvalue | None = None
    if dtype == torch.float32 and matrices.cols >= SMALLEST_LANCZOS:
        tolerance = _EASY_TOP * min(rtol, _LARGEST_RTOL)
        # As many bytes at a time as in float64.
        with full_precision_products(dtype):
            rotation, run = dominant_rotation(matrices, 2 * rows, tolerance)
        upper, found = gram_cholesky(gram_matrix(matrices, dtype, 2 * rows, rotation), in_place=True)
        factor = triangular_factor(upper)
        compared = compare(
            reader,
            factor.rotated_back(rotation),
            powers=2,
            enough=_GOOD_FACTOR * rtol,
            also=None if run is None else run.probe.vectors,
        )
        top = None if run is None else run.if_settled(compared.image)
        above = None if top is None else top.ritz_vectors(PROBED)
        refine = lambda largest, smallest: extreme_ritz_values(  # noqa: E731
            reader, rotation.back(largest) if above is None else above, rotation.back(smallest)
        )
    else:
        gram = gram_matrix(matrices, dtype, rows)
        upper, found = gram_cholesky(gram, in_place=False)
        factor = triangular_factor(upper, mirror_upper(gram).to(torch.float64))
        compared = compare(reader, factor)
        if dtype == torch.float32:
            refine = partial(extreme_ritz_values, reader)
    error = compared.error.masked_fill(~found, torch.inf)
    return _read_off_if_close(matrices, factor, error, compared.norm_squared, rtol, lanczos_from, refine, top)


def lu_values(matrices: TallMatrices, rows: int, rtol: float, lanczos_from: int) -> Spectrum:
    """Take the values of square matrices from their LU factors; ``rtol`` of the result is inf where that failed.

    Args:
        matrices: shape (count, n, n).
        rows: how many rows to convert at a time.
        rtol: wanted relative error of κ.
        lanczos_from: number of columns from which on Lanczos runs instead of a full decomposition.
    """
    # On A itself, before there is a factor: the reading of A that judges the factor then measures this run as well.
    run = _quick_top(matrices, rows, rtol) if matrices.cols >= max(lanczos_from, SMALLEST_LANCZOS) else None
    factor = lu_factor(matrices, rows)
    compared = compare(_reader(matrices, rows), factor, also=None if run is None else run.probe.vectors)
    top = None if run is None else run.if_settled(compared.image)
    return _read_off_if_close(matrices, factor, compared.error, compared.norm_squared, rtol, lanczos_from, top=top)


def _quick_top(matrices: TallMatrices, rows: int, rtol: float) -> QuickRun:
    """Run Lanczos on AᵀA in float32, as if the factor to come left all of the error to the ends."""
    with full_precision_products(torch.float32):
        (rounded,) = matrices.row_blocks(torch.float32, matrices.rows)
        # As many bytes at a time as in float64: what is still in a cache can be read twice.
        parts = torch.split(rounded, 2 * rows, dim=-2)
        return quick_run(
            lambda block: gram_product(block, parts),
            matrices.cols,
            matrices.count,
            device=rounded.device,
            tolerance=_TOP_SHARE * _budget(min(rtol, _LARGEST_RTOL)),
        )


def qr_values(matrices: TallMatrices, rows: int, rtol: float, lanczos_from: int) -> Spectrum:
    """Take the values from the R of a float64 QR, which also tells a rank-deficient matrix.

    Args:
        matrices: shape (count, m, n).
        rows: how many rows to convert at a time.
        rtol: wanted relative error of κ.
        lanczos_from: number of columns from which on Lanczos runs instead of a full decomposition of R.
    """
    upper = qr_factor(matrices, rows)
    fill_pivots(upper)
    factor = triangular_factor(upper)
    compared = compare(_reader(matrices, rows), factor)
    values = _read_off(matrices, factor, compared.error, compared.norm_squared, rtol, lanczos_from)
    # σ_min found this way is that of some vector, hence an upper bound: small enough, it settles the rank.
    backward = rounding_error(torch.ones_like(values.sigma_max), matrices.cols) * values.sigma_max
    deficient = is_rank_deficient(values.sigma_min + backward, values.sigma_max, matrices)
    return with_rank(values, deficient)


def _reader(matrices: TallMatrices, rows: int) -> Callable[[], Iterator[Tensor]]:
    return lambda: matrices.row_blocks(torch.float64, rows)


def _read_off_if_close(
    matrices: TallMatrices,
    factor: Factor,
    error: Tensor,
    norm_squared: Tensor,
    rtol: float,
    lanczos_from: int,
    refine: Refinement | None = None,
    top: LargestEigenvalue | None = None,
) -> Spectrum:
    """Read the values off, unless the spectrum of no member's factor could show anything."""
    if bool((error < _FACTOR_SHARE * rtol).any()):
        return _read_off(matrices, factor, error, norm_squared, rtol, lanczos_from, refine, top)
    return nothing_shown(error)


def _read_off(
    matrices: TallMatrices,
    factor: Factor,
    error: Tensor,
    norm_squared: Tensor,
    rtol: float,
    lanczos_from: int,
    refine: Refinement | None = None,
    top: LargestEigenvalue | None = None,
) -> Spectrum:
    """Find the ends of R's spectrum and bound the error of κ: R against A, Ritz values against R, and rounding.

    ``refine`` takes the values themselves from A. They are then Ritz values of A, which lie inside its spectrum, so
    that κ is at least their ratio, and at most what the far ends of R's brackets leave open. ``top`` is a bracket of
    A's own σ_max², which R need not stand for then.
    """
    n = matrices.cols
    by_lanczos = n >= max(lanczos_from, SMALLEST_LANCZOS)
    refined = refine is not None
    if by_lanczos:
        ends = _ends_by_lanczos(factor, error, n, rtol, refined, top)
    else:
        ends, top = _ends_of_dense(factor, refined), None
    stretch = (1 - error).rsqrt() if top is not None else ((1 + error) / (1 - error)).sqrt()
    sigma_max, sigma_min = ends.sigma_max, ends.sigma_min
    near_max, near_min = ends.bounds_max[0], ends.bounds_min[1]
    if refine is not None:
        near_max, near_min = sigma_max, sigma_min = refine(ends.top, ends.bottom)

    rounding = rounding_error(sigma_max / sigma_min, n)
    attained = stretch * (ends.bounds_max[1] / near_max) * (near_min / ends.bounds_min[0]) - 1 + rounding
    # What is found inside A's spectrum must lie inside the brackets, or one of the two is wrong.
    outside = (near_max > (1 + 1e-9) * stretch * ends.bounds_max[1]) | (
        near_min < (1 - 1e-9) / stretch * ends.bounds_min[0]
    )
    attained = attained.masked_fill(outside, torch.inf)
    # The factor is good and only Lanczos did not settle, as when a hundred singular values crowd at an end.
    crowded = ~(attained <= rtol) & (stretch - 1 + rounding <= rtol)
    if by_lanczos and bool(crowded.any()):
        members = crowded.nonzero().squeeze(-1)
        sigma = torch.linalg.svdvals(factor.dense()[members])
        largest, smallest = sigma[..., 0], sigma[..., -1]
        if refine is None:
            sigma_max = sigma_max.index_put((members,), largest)
            sigma_min = sigma_min.index_put((members,), smallest)
        above = largest
        if top is not None:  # then R's own is not A's, but bounds it
            above = torch.minimum(ends.bounds_max[1][members], largest * (1 + error[members]).sqrt())
        width = (above / sigma_max[members]) * (sigma_min[members] / smallest)
        exact = stretch[members] * width - 1 + rounding_error(largest / smallest, n)
        attained = attained.index_put((members,), exact)
    return Spectrum.of_ends(
        sigma_max, sigma_min, factor.log_volume, norm_squared.sqrt(), attained.nan_to_num(nan=torch.inf)
    )


def _ends_of_dense(factor: Factor, refined: bool) -> _Ends:
    if refined:
        _, sigma, vectors = torch.linalg.svd(factor.dense())
    else:
        sigma = torch.linalg.svdvals(factor.dense())
        vectors = sigma.new_empty(len(sigma), 0, sigma.shape[-1])
    largest, smallest = sigma[..., 0], sigma[..., -1]
    bounds = (largest, largest), (smallest, smallest)
    return _Ends(largest, smallest, *bounds, vectors[..., :PROBED, :], vectors[..., -PROBED:, :])


def _ends_by_lanczos(
    factor: Factor, error: Tensor, n: int, rtol: float, refined: bool, top: LargestEigenvalue | None
) -> _Ends:
    # What the top leaves is for the bottom.
    wanted = min(rtol, _LARGEST_RTOL)
    usable = float(error.masked_fill(error >= _FACTOR_SHARE * wanted, 0.0).max())
    # The factor's error counts at each end that is its own: half of it, in terms of σ.
    own_ends = 2 if top is None else 1
    budget = _budget(wanted - usable * (own_ends / 2 + _REFINED_SHARE * refined))
    top_share = _TOP_SHARE * budget
    if top is None:
        gram32 = None if factor.gram32 is None else factor.gram32()
        largest = _largest(factor.gram, gram32, error, n, top_share, torch.zeros_like)
    else:
        largest = top
    directions = largest.ritz_vectors(PROBED) if refined else largest.basis[:, :0]
    left = (budget - (largest.upper / largest.lower - 1)).clamp(min=budget - top_share).min()
    smallest = _largest(
        factor.inverse,
        factor.inverse32,
        error,
        n,
        float(left),
        lambda top: rounding_error((largest.ritz * top).sqrt(), n),
        # What is left depends on how well the top was measured, so that this run is measured with another block.
        probe_seed=_BOTTOM_PROBE_SEED,
    )
    # One more step of inverse iteration takes away most of what Lanczos has left between neighbors at this end.
    bottom = factor.inverse(smallest.ritz_vectors(PROBED)) if refined else smallest.basis[:, :0]
    return _Ends(
        largest.ritz.sqrt(),
        smallest.ritz.rsqrt(),
        (largest.lower.sqrt(), largest.upper.sqrt()),
        (smallest.upper.rsqrt(), smallest.lower.rsqrt()),
        directions,
        bottom,
    )


def _budget(error_of_kappa: float) -> float:
    """What the relative widths of the brackets of σ_max² and 1/σ_min² may add up to: they are those of squares."""
    return 1.9 * error_of_kappa


def _largest(
    operator: Operator,
    operator32: Operator | None,
    like: Tensor,
    size: int,
    tolerance: float,
    roundoff: Callable[[Tensor], Tensor],
    probe_seed: int = PROBE_SEED,
) -> LargestEigenvalue:
    """Bracket the largest eigenvalue from a float32 run if there may be one and it settles, or from one in float64."""
    run = partial(largest_eigenvalue, size=size, batch=len(like), device=like.device, tolerance=tolerance)
    if operator32 is not None:
        with full_precision_products(torch.float32):
            found = run(operator32, roundoff=roundoff, exact=operator, probe_seed=probe_seed)
        if bool(found.settled(tolerance).all()):
            return found
    return run(operator, roundoff=roundoff)

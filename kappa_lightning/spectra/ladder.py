"""The choice of method: a ladder from cheap to exact, climbed only by the matrices that need it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kappa_lightning.spectra.dense import eigen_values, svd_values
from kappa_lightning.spectra.few_columns import deflated_values
from kappa_lightning.spectra.matrices import TallMatrices
from kappa_lightning.spectra.memory import bytes_of_one, fit
from kappa_lightning.spectra.result import Spectrum, write, zero_spectrum
from kappa_lightning.spectra.rungs import gram_values, lu_values, qr_values

SOLVERS = ("auto", "svd")
# Data-centre cards whose float64 products run on tensor cores or at half the float32 rate: V100, A100, H100/H200, B200.
_FAST_FLOAT64 = frozenset({(7, 0), (8, 0), (9, 0), (10, 0)})
# The number of columns from which on two Lanczos runs beat all singular values of a triangle. On a CPU it was
# measured; a GPU's dense decompositions are slower by far next to its products.
# Measured against its neighbors by benchmarks/ablation.py.
_LANCZOS_FROM = {"cpu": 448}
_LANCZOS_FROM_ELSEWHERE = 128
# The columns between which a CPU takes the eigenvalues of a Gram matrix, of a square one up to _LANCZOS_FROM.
# Measured against its neighbors by benchmarks/ablation.py.
_EIGEN_FROM = 32
_EIGEN_BELOW = 640
# The columns between which a CPU takes a factor and deflates both ends of its spectrum.
# Measured against its neighbors by benchmarks/ablation.py.
_DEFLATE_FROM = 448
_DEFLATE_BELOW = 768


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a stack of matrices of one shape is worked through.

    Attributes:
        rungs: names of the methods, in the order in which they are tried.
        members: how many matrices are worked on at once.
        rows: how many rows of each are converted to the working precision at once.
        lanczos_from: the number of columns from which on the ends of a triangle's spectrum are found by Lanczos.
    """

    rungs: tuple[str, ...]
    members: int
    rows: int
    lanczos_from: int


def choose_rungs(device: torch.device, rows: int, cols: int) -> tuple[str, ...]:
    """Choose the ladder for matrices with rows ≥ cols.

    * ``gram32``: Cholesky of the float32 Gram matrix, in coordinates that set the 16 dominant directions apart. Reaches
      a κ of 100, and far more where a few learned directions stand out. Takes half the time of ``gram64`` on a CPU;
      on a GPU only where float64 is slow (a consumer's has 1/64 of its float32 speed).
    * ``gram64``: the same in float64. Reaches 1e5.
    * ``deflate64``: Cholesky of the float64 Gram matrix, or LU of a square one, and both ends of the spectrum by
      deflation; for a few hundred columns on a CPU. Reaches 1e3, of square matrices 1e6.
    * ``eig64``: all eigenvalues of the float64 Gram matrix, for small matrices on a CPU. Reaches 1e4 and more, with no
      need to measure an error.
    * ``lu64``: LU in float64, for square matrices on a CPU. Reaches 1e8.
    * ``qr64``: Householder QR in float64. Reaches 1e8, and matrices that are numerically rank-deficient.
    * ``svd``: all singular values in float64. Everything.

    The figures are what the tests show at rtol = 1e-3, not limits: what counts is the error measured for each matrix.
    The smallest matrices on a CPU go to ``svd`` at once unless they are long, since there is nothing to save.
    """
    if device.type == "cuda":
        slow = torch.cuda.get_device_capability(device) not in _FAST_FLOAT64
        return ("gram32", "gram64", "qr64", "svd") if slow else ("gram64", "qr64", "svd")
    if cols < _EIGEN_FROM and rows < 2 * cols:
        return ("svd",)
    first = ("deflate64",) if _DEFLATE_FROM <= cols < _DEFLATE_BELOW else ()
    if cols < _LANCZOS_FROM["cpu"]:
        return (*first, "eig64", "svd")
    if rows == cols:
        return (*first, "lu64", "qr64", "svd")
    return (*first, "gram32" if cols >= _EIGEN_BELOW else "eig64", "gram64", "qr64", "svd")


def make_schedule(matrices: TallMatrices, solver: str, memory_budget: int | None) -> Schedule:
    """Choose rungs, and fit the work into ``memory_budget`` bytes (default: a quarter of the free memory)."""
    device, m, n = matrices.entries.device, matrices.rows, matrices.cols
    rungs = ("svd",) if solver == "svd" else choose_rungs(device, m, n)
    lanczos_from = _LANCZOS_FROM.get(device.type, _LANCZOS_FROM_ELSEWHERE)
    dense = rungs == ("svd",) or n < lanczos_from
    members, rows = fit(device, m, n, dense=dense, memory_budget=memory_budget)
    return Schedule(rungs, members, rows, lanczos_from)


def working_bytes(rows: int, cols: int) -> int:
    """What :func:`~kappa_lightning.spectrum` needs on a CPU for one matrix at full speed, beside the matrix."""
    m, n = max(rows, cols), min(rows, cols)
    return bytes_of_one(m, n, dense=n < _LANCZOS_FROM["cpu"])


def climb(matrices: TallMatrices, members: Sequence[int], schedule: Schedule, rtol: float) -> Spectrum:
    """Work the given members up the ladder; the others get the values of a zero matrix.

    The host waits for a GPU once a rung, to learn which members go on, and within a chunk a number of times that does
    not depend on the number of members: after the factorization, each time its error is measured, when a run of Lanczos
    starts, after those of its steps that may be enough, and to ask whether any of them failed to settle.
    """
    values = zero_spectrum(matrices.count, matrices.entries.device)
    pending = list(members)
    for rung in schedule.rungs:
        for first in range(0, len(pending), schedule.members):
            chunk = pending[first : first + schedule.members]
            # Neighbors are taken as a view; picking them by index would copy them.
            run = chunk[-1] - chunk[0] + 1 == len(chunk)
            where = slice(chunk[0], chunk[-1] + 1) if run else torch.tensor(chunk, device=matrices.entries.device)
            write(values, where, take_rung(rung, matrices.take(where), schedule, rtol))
        good = (values.rtol <= rtol).tolist()
        pending = [member for member in pending if not good[member]]
        if not pending:
            break
    return values


def take_rung(rung: str, matrices: TallMatrices, schedule: Schedule, rtol: float) -> Spectrum:
    """Apply one rung by name; the result's rtol is what it has shown, and may be above the wanted one or inf."""
    if rung == "gram32":
        return gram_values(matrices, schedule.rows, rtol, torch.float32, schedule.lanczos_from)
    if rung == "gram64":
        return gram_values(matrices, schedule.rows, rtol, torch.float64, schedule.lanczos_from)
    if rung == "lu64":
        return lu_values(matrices, schedule.rows, rtol, schedule.lanczos_from)
    if rung == "qr64":
        return qr_values(matrices, schedule.rows, rtol, schedule.lanczos_from)
    if rung == "deflate64":
        return deflated_values(matrices, schedule.rows, rtol)
    if rung == "eig64":
        return eigen_values(matrices, schedule.rows)
    return svd_values(matrices, schedule.rows)

"""The choice of method: a ladder from cheap to exact, climbed only by the matrices that need it."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kappa_lightning.spectra.factored import gram_values, lu_values, qr_values
from kappa_lightning.spectra.lanczos import BASIS_COLUMNS
from kappa_lightning.spectra.scaling import TallMatrices
from kappa_lightning.spectra.svd import svd_values
from kappa_lightning.spectra.values import Values

_MEMORY = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")
SOLVERS = ("auto", "svd")
# Data-centre cards whose float64 products run on tensor cores or at half the float32 rate: V100, A100, H100/H200, B200.
_FAST_FLOAT64 = frozenset({(7, 0), (8, 0), (9, 0), (10, 0)})
# The number of columns from which on two Lanczos runs beat all singular values of a triangle. On a CPU it was
# measured; a GPU's dense decompositions are slower by far next to its products.
_LANCZOS_FROM = {"cpu": 448}
_LANCZOS_FROM_ELSEWHERE = 128
# Rows that are converted at a time: so few that a CPU allocates little, so many that the products are efficient.
_ROWS = {"cpu": 512}
_ROWS_ELSEWHERE = 4096
_FEWEST_ROWS = 128


@dataclass(frozen=True, slots=True)
class Plan:
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
    * ``lu64``: LU in float64, for square matrices on a CPU. Reaches 1e8.
    * ``qr64``: Householder QR in float64. Reaches 1e8, and matrices that are numerically rank-deficient.
    * ``svd``: all singular values in float64. Everything.

    The figures are what the tests show at rtol = 1e-3, not limits: what counts is the error measured for each matrix.
    Small matrices on a CPU go to ``svd`` at once unless they are long, since there is nothing to save.
    """
    if device.type == "cuda":
        slow = torch.cuda.get_device_capability(device) not in _FAST_FLOAT64
        return ("gram32", "gram64", "qr64", "svd") if slow else ("gram64", "qr64", "svd")
    if cols < _LANCZOS_FROM["cpu"] and rows < 2 * cols:
        return ("svd",)
    if rows == cols:
        return ("lu64", "qr64", "svd")
    return ("gram32", "gram64", "qr64", "svd") if cols >= _LANCZOS_FROM["cpu"] else ("gram64", "qr64", "svd")


def make_plan(matrices: TallMatrices, solver: str, memory_budget: int | None) -> Plan:
    """Choose rungs, and fit the work into ``memory_budget`` bytes (default: a quarter of the free memory).

    A CPU works on one matrix at a time once it is large enough for Lanczos: a batch would save nothing there, and so
    each matrix can stop on its own and gives the same bits alone and in a batch. A budget too small for one matrix
    gets one.
    """
    device, m, n = matrices.entries.device, matrices.rows, matrices.cols
    rungs = ("svd",) if solver == "svd" else choose_rungs(device, m, n)
    budget = free_memory(device) // 4 if memory_budget is None else memory_budget
    lanczos_from = _LANCZOS_FROM.get(device.type, _LANCZOS_FROM_ELSEWHERE)
    rows = min(m, _ROWS.get(device.type, _ROWS_ELSEWHERE))
    if budget < _bytes_of_one(rows, n):
        rows = min(rows, max(_FEWEST_ROWS, (budget - _bytes_of_one(0, n)) // (16 * n)))
    one = _bytes_of_one(rows, n)
    if rungs == ("svd",) or n < lanczos_from:
        one = max(one, 16 * m * n)
        return Plan(rungs, max(1, budget // one), rows, lanczos_from)
    return Plan(rungs, 1 if device.type == "cpu" else max(1, budget // one), rows, lanczos_from)


def working_bytes(rows: int, cols: int) -> int:
    """What :func:`~kappa_lightning.spectrum` needs on a CPU for one matrix at full speed, beside the matrix."""
    m, n = max(rows, cols), min(rows, cols)
    return _bytes_of_one(m if n < _LANCZOS_FROM["cpu"] else min(m, _ROWS["cpu"]), n)


def _bytes_of_one(rows: int, cols: int) -> int:
    return 8 * (6 * cols * cols + cols * BASIS_COLUMNS) + 16 * rows * cols


def free_memory(device: torch.device) -> int:
    """Bytes free on a device: the driver's figure and PyTorch's cache on CUDA, what Linux could free up on a CPU."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        for line in _MEMORY.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(min(int(line.split()[1]) << 10, _left_to_container()))
        # Without the pages that hold files, which a kernel gives away when they are needed.
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 4 << 30


def _left_to_container() -> float:
    """Bytes up to the limit of the control group, if there is one."""
    try:
        limit, used = ((_CONTAINER / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        return math.inf if limit.strip() == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return math.inf


def climb(matrices: TallMatrices, members: Sequence[int], plan: Plan, rtol: float) -> Values:
    """Work the given members up the ladder; the others get the values of a zero matrix.

    The host waits for a GPU once a rung, to learn which members go on, and within a chunk a number of times that does
    not depend on the number of members: after the factorization, each time its error is measured, when a run of Lanczos
    starts, after those of its steps that may be enough, and to ask whether any of them failed to settle.
    """
    values = Values.empty(matrices.count, matrices.entries.device)
    pending = list(members)
    for rung in plan.rungs:
        for first in range(0, len(pending), plan.members):
            chunk = pending[first : first + plan.members]
            # Neighbors are taken as a view; picking them by index would copy them.
            run = chunk[-1] - chunk[0] + 1 == len(chunk)
            where = slice(chunk[0], chunk[-1] + 1) if run else torch.tensor(chunk, device=matrices.entries.device)
            values.write(where, take_rung(rung, matrices.take(where), plan, rtol))
        good = (values.rtol <= rtol).tolist()
        pending = [member for member in pending if not good[member]]
        if not pending:
            break
    return values


def take_rung(rung: str, matrices: TallMatrices, plan: Plan, rtol: float) -> Values:
    """Apply one rung by name; the result's rtol is what it has shown, and may be above the wanted one or inf."""
    if rung == "gram32":
        return gram_values(matrices, plan.rows, rtol, torch.float32, plan.lanczos_from)
    if rung == "gram64":
        return gram_values(matrices, plan.rows, rtol, torch.float64, plan.lanczos_from)
    if rung == "lu64":
        return lu_values(matrices, plan.rows, rtol, plan.lanczos_from)
    if rung == "qr64":
        return qr_values(matrices, plan.rows, rtol, plan.lanczos_from)
    return svd_values(matrices, plan.rows)

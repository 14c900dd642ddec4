"""How much memory there is, and how much of a stack of matrices is worked on at a time within it."""

import math
import os
from pathlib import Path

import torch

from kappa_lightning.spectra.lanczos import BASIS_COLUMNS

_MEMORY = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")
# Rows that are converted at a time: so few that a CPU allocates little, so many that the products are efficient.
# Measured against its neighbors by benchmarks/ablation.py.
_ROWS = {"cpu": 512}
_ROWS_ELSEWHERE = 4096
_FEWEST_ROWS = 128


def fit(device: torch.device, rows: int, cols: int, *, dense: bool, memory_budget: int | None) -> tuple[int, int]:
    """How many matrices, and how many rows of each, are worked on at once within a budget.

    A CPU works on one matrix at a time once it is large enough for Lanczos: a batch would save nothing there, and so
    each matrix can stop on its own and gives the same bits alone and in a batch. A budget too small for one matrix
    gets one.

    Args:
        device: where.
        rows: of the tall matrices.
        cols: of the tall matrices.
        dense: whether all singular values may be computed of all rows at once.
        memory_budget: in bytes; by default a quarter of the free memory.

    Returns:
        The number of matrices and the number of rows, each at least 1.
    """
    budget = free_memory(device) // 4 if memory_budget is None else memory_budget
    chunk = min(rows, _ROWS.get(device.type, _ROWS_ELSEWHERE))
    if budget < _bytes_of_one(chunk, cols):
        chunk = min(chunk, max(_FEWEST_ROWS, (budget - _bytes_of_one(0, cols)) // (16 * cols)))
    one = _bytes_of_one(chunk, cols)
    if dense:
        return max(1, budget // max(one, 16 * rows * cols)), chunk
    return 1 if device.type == "cpu" else max(1, budget // one), chunk


def bytes_of_one(rows: int, cols: int, *, dense: bool) -> int:
    """What a CPU needs for one tall matrix at full speed, beside the matrix; ``dense`` as in :func:`fit`."""
    return _bytes_of_one(rows if dense else min(rows, _ROWS["cpu"]), cols)


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

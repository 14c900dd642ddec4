"""What a profile is computed with."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kappa_lightning.spectra import check_memory_budget, check_options

EXPERTS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "max": max,
}
"""How the κ of the matrices of a stack, such as fused experts, combine into the tensor's."""


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """How condition numbers are computed and combined; stored as plain Python values, whatever numbers are given.

    Attributes:
        solver: see :func:`~kappa_lightning.spectrum`.
        rtol: the relative error of κ that is asked for; see :func:`~kappa_lightning.spectrum`.
        experts: how the κ of fused experts combine into the tensor's: ``"mean"``, ``"median"`` or ``"max"``.
        memory_budget: bytes of working memory, by default a quarter of what is free on a CPU and half on a GPU; how
            many matrices are worked on at a time follows from it. One tensor is always worked on, whatever it needs.

    Raises:
        TypeError: if a number is none.
        ValueError: if one of them is out of range; the message names it.

    Example:
        >>> ProfileSettings(rtol=1e-4).of_rows
        {'solver': 'auto', 'rtol': 0.0001, 'experts': 'mean'}
    """

    solver: str = "auto"
    rtol: float = 1e-3
    experts: str = "mean"
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rtol, bool | str):
            raise TypeError(f"rtol={self.rtol!r} must be a number")
        object.__setattr__(self, "rtol", float(self.rtol))
        if self.memory_budget is not None:
            object.__setattr__(self, "memory_budget", operator.index(self.memory_budget))
        check_options(solver=self.solver, rtol=self.rtol)
        check_memory_budget(self.memory_budget)
        if self.experts not in EXPERTS:
            raise ValueError(f"experts={self.experts!r} is unknown: use one of {', '.join(map(repr, EXPERTS))}")

    @property
    def of_rows(self) -> dict[str, Any]:
        """What the rows depend on, as plain values: everything but the memory."""
        return {"solver": self.solver, "rtol": self.rtol, "experts": self.experts}

"""What a profile is computed with."""

from __future__ import annotations

import operator
import reprlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kappa_lightning.parts import GATE_UP, split_into_parts
from kappa_lightning.spectra import check_memory_budget, check_options
from kappa_lightning.weights import Weight

EXPERTS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "max": max,
}
"""How the κ of the matrices of a stack, such as fused experts, combine into the tensor's."""

EACH = "each"
"""In place of one of these: each matrix of a stack, or each attention head, has a row of its own."""

HEADS = ("whole", EACH)


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """How condition numbers are computed and combined; stored as plain Python values, whatever numbers are given.

    Attributes:
        solver: see :func:`~kappa_lightning.spectrum`.
        rtol: the relative error of κ that is asked for; see :func:`~kappa_lightning.spectrum`.
        experts: how the κ of fused experts combine into the tensor's: ``"mean"``, ``"median"`` or ``"max"``; with
            ``"each"`` every expert has a row of its own, ``<tensor>[<expert>]``.
        gate_up: whether, with ``experts="each"``, gate and up of a fused ``gate_up_proj`` are one row or two:
            ``"together"`` or ``"apart"``.
        heads: with ``"each"`` every attention head of a projection has a row of its own, ``<tensor>[head <number>]``.
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
    gate_up: str = "together"
    heads: str = "whole"

    def __post_init__(self) -> None:
        if isinstance(self.rtol, bool | str):
            raise TypeError(f"rtol={self.rtol!r} must be a number")
        object.__setattr__(self, "rtol", float(self.rtol))
        if self.memory_budget is not None:
            object.__setattr__(self, "memory_budget", operator.index(self.memory_budget))
        check_options(solver=self.solver, rtol=self.rtol)
        check_memory_budget(self.memory_budget)
        for argument, choices in (("experts", (*EXPERTS, EACH)), ("gate_up", GATE_UP), ("heads", HEADS)):
            chosen = getattr(self, argument)
            if chosen not in choices:
                raise ValueError(f"{argument}={chosen!r} is unknown: use one of {', '.join(map(repr, choices))}")
        if self.gate_up == "apart" and self.experts != EACH:
            raise ValueError(f'gate_up="apart" needs experts="each", and experts is {self.experts!r}')

    @property
    def of_rows(self) -> dict[str, Any]:
        """What the rows depend on, as plain values: everything but the memory."""
        plain = {"solver": self.solver, "rtol": self.rtol, "experts": self.experts}
        # Left out where they say nothing new, so that files read as those of versions that did not know them.
        chosen = {key: getattr(self, key) for key, usual in _PARTS.items() if getattr(self, key) != usual}
        return plain | chosen

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> ProfileSettings:
        """The inverse of :attr:`of_rows`, also of one from a damaged file; further entries are passed over.

        Raises:
            ValueError: if one has the wrong type or is out of range.
        """
        named = {key: state[key] for key in ("solver", "experts")}
        named |= {key: state.get(key, usual) for key, usual in _PARTS.items()}
        for key, value in named.items():
            if not isinstance(value, str):
                raise ValueError(f"{key}={reprlib.repr(value)} is no name")
        try:
            return cls(rtol=state["rtol"], **named)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"rtol={reprlib.repr(state['rtol'])} is no number") from error

    @property
    def combine(self) -> str:
        """How the figures of a stack that stays whole combine, a key of :data:`EXPERTS`."""
        return "mean" if self.experts == EACH else self.experts

    def split(self, weights: Sequence[Weight], module: nn.Module | None = None) -> list[Weight]:
        """The weights that have a row, of which those with parts are replaced by their parts where that is asked for.

        Args:
            weights: what was found in a model or a checkpoint.
            module: the model, which alone knows its heads.

        Raises:
            ValueError: if ``heads="each"`` is asked of a checkpoint, or none are found in a model.
        """
        experts, heads = self.experts == EACH, self.heads == EACH
        if not experts and not heads:
            return list(weights)
        if heads and module is None:
            raise ValueError('heads="each" needs the model, since a checkpoint does not say how many heads it has')
        return split_into_parts(weights, module, experts=experts, gate_up=self.gate_up, heads=heads)


_PARTS = {"gate_up": "together", "heads": "whole"}

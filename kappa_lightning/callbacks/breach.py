"""The least retention that a run may have, and what happens when a probe falls below it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from kappa_lightning.evaluation import Measurement

OnBreach = Literal["stop", "warn", "raise"]
JudgedBy = Literal["retention", "retention_low"]


@dataclass(frozen=True, slots=True)
class Limit:
    """What may not fall below what, and what follows.

    Attributes:
        min_retention: in (0, 1], or ``None`` for no limit.
        on_breach: what happens.
        judged_by: the figure that is looked at.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> Limit(0.9).breached({"forgetting/old/retention": 0.8}, ["old"])
        {'old': 0.8}
    """

    min_retention: float | None = None
    on_breach: OnBreach = "stop"
    judged_by: JudgedBy = "retention"

    def __post_init__(self) -> None:
        if self.min_retention is not None:
            given: Any = self.min_retention
            if isinstance(given, bool) or not isinstance(given, Real) or not 0 < float(given) <= 1:
                raise ValueError(f"min_retention={self.min_retention!r} must be in (0, 1], 1 being all")
            object.__setattr__(self, "min_retention", float(given))
        for name, known in (("on_breach", get_args(OnBreach)), ("judged_by", get_args(JudgedBy))):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, known))}")

    def require_intervals(self, base: Mapping[str, Measurement]) -> None:
        """Make sure that each probe has what is looked at.

        Raises:
            ValueError: if an interval is, and a probe has none.
        """
        for name, measurement in base.items():
            if self.judged_by == "retention_low" and (measurement.items is None or len(measurement.items) < 2):
                raise ValueError(
                    f'judged_by="retention_low" needs an interval, and the probe {name!r} has no items to draw from '
                    "(its metric keeps neither sums nor lists, or there is a single batch that cannot be split): "
                    'judge by "retention", or use another metric'
                )

    def breached(self, record: Mapping[str, Any], probes: Iterable[str]) -> dict[str, float]:
        """The probes that fell below, each with the figure that is looked at."""
        if self.min_retention is None:
            return {}
        judged = {name: record.get(f"forgetting/{name}/{self.judged_by}", -math.inf) for name in probes}
        return {name: value for name, value in judged.items() if value < self.min_retention}

    def judge(self, trainer: pl.Trainer, record: Mapping[str, Any], probes: Iterable[str], when: str) -> None:
        """Stop the training, warn or raise if a probe fell below.

        Args:
            trainer: whose training it is.
            record: the figures under their tags.
            probes: the names.
            when: in words, for the message.

        Raises:
            RuntimeError: with ``on_breach="raise"``.
        """
        lost = self.breached(record, probes)
        if not lost:
            return
        figures = ", ".join(f"{name} {retention:.4f}" for name, retention in lost.items())
        message = f"{self.judged_by} fell below min_retention={self.min_retention:g} {when}: {figures}"
        if self.on_breach == "raise":
            raise RuntimeError(message)
        if self.on_breach == "warn":
            rank_zero_warn(message)
        else:
            rank_zero_info(f"ForgettingEval stops the training: {message}")
            trainer.should_stop = True

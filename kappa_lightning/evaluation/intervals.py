"""How far a retention can be told from the items that were measured: a paired bootstrap."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from kappa_lightning.evaluation.items import MOST_ITEMS, Items
from kappa_lightning.probes.metrics import TokenAgreement, TokenPerplexity

Array = NDArray[np.float64]

_DRAWS_BY_COMPUTE = 100
"""Where a metric has no closed form over draws, so that an evaluation stays below a second of this."""


def retention(before: float, now: float, higher_is_better: bool) -> float:
    """The share of a capability that is left; NaN where the ratio does not exist.

    Example:
        >>> retention(0.8, 0.6, True), retention(20.0, 25.0, False)
        (0.7499999999999999, 0.8)
    """
    numerator, denominator = (now, before) if higher_is_better else (before, now)
    return numerator / denominator if denominator else math.nan


def retention_interval(
    metric: Metric, before: Items, now: Items, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """The percentile interval of the retention when the items are drawn again, the same ones before and now.

    A paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, §13.3): what an item lost is compared
    with what it had, so that the difference between easy and hard items does not widen the interval. It tells how the
    figure would vary with other items, not with other training runs.

    Args:
        metric: computes the figure from its states; left as it is.
        before: what each item added to the states at the baseline.
        now: the same, now.
        level: the share of the resamples within the interval.
        resamples: how many.
        seed: of the draws.

    Returns:
        Its lower and upper end; ``None`` with fewer than two items, other items than before, or where most resamples
        have no ratio.

    Example:
        >>> from kappa_lightning.probes.metrics import MeanCorrect
        >>> ones, half = (Items(["a", "b"], {"mean_value": v, "weight": torch.ones(2)}) for v in
        ...     (torch.ones(2), torch.full((2,), 0.5)))
        >>> retention_interval(MeanCorrect(), ones, half)
        (0.5, 0.5)
    """
    if len(before) < 2 or before.keys != now.keys or before.states.keys() != now.states.keys():
        return None
    lists = {name for name, default in metric._defaults.items() if isinstance(default, list)}
    if not lists:
        before, now = _in_blocks(before), _in_blocks(now)
    count = len(before)
    numbers = np.random.default_rng(seed)
    draws = [numbers.integers(count, size=count) for _ in range(resamples)]
    if not _is_closed(metric):
        # Its own compute() runs for each draw.
        draws = draws[:_DRAWS_BY_COMPUTE]
    figures = [_figures(metric, items, draws, lists) for items in (before, now)]
    higher = bool(metric.higher_is_better)
    ratios = np.array([retention(b, n, higher) for b, n in zip(*figures, strict=True)])
    finite = ratios[np.isfinite(ratios)]
    if 2 * len(finite) <= len(draws):
        return None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _in_blocks(items: Items) -> Items:
    if len(items) <= MOST_ITEMS:
        return items
    bounds = np.linspace(0, len(items), MOST_ITEMS + 1).astype(int)
    block = torch.from_numpy(np.repeat(np.arange(MOST_ITEMS), np.diff(bounds)))
    states = {
        name: torch.zeros(MOST_ITEMS, *value.shape[1:], dtype=value.dtype).index_add_(0, block, value)
        for name, value in items.states.items()
    }
    return Items([items.keys[start] for start in bounds[:-1]], states)


def _figures(metric: Metric, items: Items, draws: list[Any], lists: set[str]) -> list[float]:
    """The metric of each draw."""
    if lists:
        scratch = _alone(metric)
        return [_compute(scratch, {n: [v[draw]] for n, v in items.states.items()}, metric) for draw in draws]
    counts = np.stack([np.bincount(draw, minlength=len(items)) for draw in draws]).astype(np.float64)
    sums = {name: np.tensordot(counts, value.numpy(), axes=(1, 0)) for name, value in items.states.items()}
    closed = _closed_form(metric, sums)
    if closed is not None:
        return [float(value) for value in closed]
    scratch = _alone(metric)
    return [
        _compute(scratch, {n: torch.from_numpy(np.atleast_1d(v[k])).reshape(items.states[n].shape[1:])
                           for n, v in sums.items()}, metric)
        for k in range(len(draws))
    ]  # fmt: skip


def _alone(metric: Metric) -> Metric:
    """A copy that computes from its own states, which are those of all processes already."""
    scratch = deepcopy(metric).cpu()
    scratch.sync_on_compute = False
    return scratch


def _is_closed(metric: Metric) -> bool:
    mean = isinstance(metric, MeanMetric) and type(metric).compute is MeanMetric.compute
    return mean or type(metric) in (TokenPerplexity, TokenAgreement)


def _closed_form(metric: Metric, sums: dict[str, Array]) -> Array | None:
    with np.errstate(all="ignore"):
        if isinstance(metric, MeanMetric) and type(metric).compute is MeanMetric.compute:
            return sums["mean_value"] / sums["weight"]
        if type(metric) is TokenPerplexity:
            return np.exp(sums["nats"] / sums["tokens"])
        if type(metric) is TokenAgreement:
            return np.exp(-sums["nats"] / sums["tokens"])
    return None


def _compute(scratch: Metric, states: dict[str, Any], metric: Metric) -> float:
    scratch.reset()
    for name, value in states.items():
        default = metric._defaults[name]
        if isinstance(value, Tensor) and isinstance(default, Tensor):
            value = value.to(default.dtype)
        setattr(scratch, name, value)
    scratch._update_count = 1
    return float(scratch.compute())

"""The figures of a probe: what is left of its baseline, against chance, and with how much uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchmetrics.text import Perplexity

from kappa_lightning.evaluation import Items, Measurement, retention, retention_interval
from kappa_lightning.probes import Probe
from kappa_lightning.probes.metrics import TokenPerplexity


def figures_of(name: str, probe: Probe, before: float, items: Items | None, now: Measurement) -> dict[str, float]:
    """What is logged of a probe, under its tags.

    Args:
        name: the probe's.
        probe: tells the direction, the metric's name and the chance level.
        before: the metric at the baseline.
        items: those of the baseline, if there are.
        now: the metric, and its items.
    """
    left = retention(before, now.value, probe.higher_is_better)
    figures = {probe.name: now.value, "retention": left, "forgetting": 1 - left}
    if items is not None and now.items is not None:
        interval = retention_interval(probe.metric, items, now.items)
        if interval is not None:
            figures["retention_low"], figures["retention_high"] = interval
    if probe.chance is not None:
        room = before - probe.chance
        figures["above_chance"] = (now.value - probe.chance) / room if room else math.nan
    if isinstance(probe.metric, TokenPerplexity | Perplexity):
        lost = now.value > 0 and before > 0
        figures["nats"] = math.log(now.value) - math.log(before) if lost else math.nan
    return {f"forgetting/{name}/{figure}": value for figure, value in figures.items()}


def retention_charts(names: Sequence[str]) -> dict[str, list[Any]]:
    """How TensorBoard's custom scalars group the tags of probes: all together, and each with its interval."""
    tags = [f"forgetting/{name}/retention" for name in names]
    charts: dict[str, list[Any]] = {"retention": ["Multiline", ["forgetting/retention", *tags]]}
    for name, tag in zip(names, tags, strict=True):
        charts[f"retention of {name}"] = ["Margin", [tag, f"{tag}_low", f"{tag}_high"]]
    return charts


def require_ratios(probes: Mapping[str, Probe], values: Mapping[str, float]) -> None:
    """Make sure that the baseline is something that can be lost.

    Raises:
        ValueError: if a baseline is not above 0, or no better than chance.
    """
    for name, value in values.items():
        probe = probes[name]
        if value <= 0:
            raise ValueError(
                f"the probe {name!r} has {probe.name}={value:g} before the first step, and retention "
                "is a ratio to that: use a capability that the model has, and a metric that is above 0 for it"
            )
        chance = probe.chance
        if chance is not None and (value <= chance if probe.higher_is_better else value >= chance):
            raise ValueError(
                f"the probe {name!r} has {probe.name}={value:g} before the first step, no better than chance "
                f"({chance:g}), so there is nothing that could be forgotten: use a capability that the model has, "
                "check the probe's data and labels, or give another chance=… (None: not known)"
            )

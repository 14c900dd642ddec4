"""Figures of drift: how far κ has moved, by tensor and by role."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kappa_lightning.weights.roles import depth_and_role


def quantiles_by_role(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The tenth, fiftieth and ninetieth percentile over each role, under ``<prefix>/by_role/<role>/p10`` and so on.

    Example:
        >>> quantiles_by_role({"h.0.a.weight": 1.0, "h.1.a.weight": 3.0}, "kappa")["kappa/by_role/h.*.a.weight/p50"]
        2.0
    """
    roles: dict[str, list[float]] = {}
    for name, value in values.items():
        roles.setdefault(depth_and_role(name)[1], []).append(value)
    return {
        f"{prefix}/by_role/{role}/p{percent}": _quantile(found, percent / 100)
        for role, found in roles.items()
        if len(found) > 1
        for percent in (10, 50, 90)
    }


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    # Infinite κ has no distance.
    return low if low == high else low + (place - math.floor(place)) * (high - low)


def drift_charts(label: str, tags: Collection[str]) -> dict[str, list[Any]]:
    """How TensorBoard's custom scalars group the tags of a monitor."""
    several = ("/max", "/min")
    tensors = [tag for tag in tags if tag.startswith("kappa_drift/") and not tag.endswith(several)]
    tensors = [tag for tag in tensors if "/by_role/" not in tag]
    roles = [tag.removesuffix("/p50") for tag in tags if tag.startswith("kappa_drift") and tag.endswith("/p50")]
    charts: dict[str, list[Any]] = {
        "drift of the tensors": ["Multiline", tensors],
        "median κ": ["Multiline", [f"kappa{label}/median"]],
    }
    for role in roles:
        charts[f"drift of {role.rpartition('/by_role/')[2]}"] = [
            "Margin",
            [f"{role}/p50", f"{role}/p10", f"{role}/p90"],
        ]
    return charts


def drift(before: float, now: float) -> float:
    """log10(κ now / κ before); 0 if both are infinite, ±∞ if one is.

    Example:
        >>> drift(10.0, 1000.0), drift(float("inf"), float("inf")), drift(float("inf"), 10.0)
        (2.0, 0.0, -inf)
    """
    if math.isinf(before) or math.isinf(now):
        return 0.0 if before == now else math.copysign(math.inf, now - before)
    return math.log10(now / before)

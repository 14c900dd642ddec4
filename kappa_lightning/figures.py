"""Pictures of condition numbers and of how they drift."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

_NAMED = 5  # More labels than this overlap at the size at which TensorBoard shows a picture.


def drift_figure(baseline: Mapping[str, float], history: Sequence[Mapping[str, Any]]) -> Figure:
    """κ against its value at fit start, and the drift of every tensor over the epochs.

    Infinite κ is left out of the picture.

    Args:
        baseline: κ of each tensor at fit start.
        history: the records of :class:`~kappa_lightning.KappaMonitor`, the latest last.

    Returns:
        A figure with two panels, not attached to pyplot. The tensors that drifted furthest are named.
    """
    latest = history[-1]["kappa"]
    names = [name for name in latest if math.isfinite(baseline[name]) and math.isfinite(latest[name])]
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    scatter, lines = figure.subplots(1, 2, width_ratios=(1, 1.5))
    scatter.set(xlabel="κ at fit start", ylabel="κ now", xscale="log", yscale="log")
    scatter.set_title(f"{len(names)} tensors, epoch {history[-1]['epoch']}", fontsize=10)
    lines.set(xlabel="epoch", ylabel="drift: log₁₀(κ now / κ at fit start)")
    lines.axhline(0, color="0.8", linewidth=1, zorder=0)
    if not names:
        return figure
    start, now = np.array([baseline[n] for n in names]), np.array([latest[n] for n in names])
    low, high = min(start.min(), now.min()), max(start.max(), now.max())
    norm = LogNorm(vmin=max(low, 1.0) * 0.999, vmax=high * 1.001)
    colours = colormaps["viridis"](norm(start))
    scatter.plot([low, high], [low, high], color="0.8", linewidth=1, zorder=0)
    scatter.scatter(start, now, c=colours, s=18)

    furthest = sorted(names, key=lambda name: -abs(math.log10(latest[name] / baseline[name])))[:_NAMED]
    for name, colour in zip(names, colours, strict=True):
        known = [r for r in history if math.isfinite(r["kappa"].get(name, math.inf))]
        values = [math.log10(r["kappa"][name] / baseline[name]) for r in known]
        label = name if name in furthest else None
        style = {"linewidth": 1.8, "marker": "o", "markersize": 3} if label else {"linewidth": 0.8, "alpha": 0.5}
        lines.plot([r["epoch"] for r in known], values, color=colour, label=label, **style)
    lines.xaxis.get_major_locator().set_params(integer=True)
    lines.legend(fontsize=7, loc="upper left", title="furthest from fit start", title_fontsize=7)
    return figure

"""Pictures of a run, drawn for the width at which TensorBoard shows them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kappa_lightning.weights.roles import depth_and_role

# TensorBoard shows a card at about 400 pixels: wider pictures are scaled down, and their letters with them.
_WIDTH, _DPI = 5.0, 110
_NAMED = 5


def story_figure(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    losses: Sequence[tuple[int, float]],
    min_retention: float | None = None,
) -> Figure:
    """What was kept and what was learned: the retention of each probe over the steps, and the training loss below.

    Args:
        histories: for each probe the records of its :class:`~kappa_lightning.ForgettingEval`.
        losses: (global step, loss) pairs of the new task.
        min_retention: drawn as a line.

    Returns:
        A figure that is not attached to pyplot. Bands are the 95 % intervals where there are any.
    """
    figure = Figure(figsize=(_WIDTH, 5.2), dpi=_DPI, layout="constrained")
    kept, learned = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
    kept.axhline(1, color="0.8", linewidth=1, zorder=0)
    if min_retention is not None:
        kept.axhline(min_retention, color="0.4", linewidth=1, linestyle="--", zorder=0)
        kept.annotate(
            "least allowed", (0.0, min_retention), xycoords=("axes fraction", "data"), xytext=(4, -11),
            textcoords="offset points", fontsize=9, color="0.4",
        )  # fmt: skip
    for place, (name, records) in enumerate(histories.items()):
        color = colormaps["tab10"](place % 10)
        tag = f"forgetting/{name}/retention"
        steps = [record["step"] for record in records]
        values = [record[tag] for record in records]
        kept.plot(steps, values, color=color, marker="o", markersize=4, label=f"{name}  {values[-1]:.3f}")
        banded = [record for record in records if f"{tag}_low" in record]
        if banded:
            ends = [[record[f"{tag}_{end}"] for record in banded] for end in ("low", "high")]
            kept.fill_between([record["step"] for record in banded], *ends, color=color, alpha=0.18, linewidth=0)
    kept.set_ylabel("retention (1 = all)", fontsize=10)
    _legend(kept, len(histories))
    learned.set_ylabel("training loss", fontsize=10)
    learned.set_xlabel("optimizer steps", fontsize=10)
    if losses:
        learned.plot(*zip(*losses, strict=True), color="0.25", linewidth=1.5, marker="o" if len(losses) < 4 else None)
    learned.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (kept, learned):
        _tidy(axes)
    return figure


def drift_lines(baseline: Mapping[str, float], history: Sequence[Mapping[str, Any]]) -> Figure:
    """The drift log10(κ now / κ at fit start) of each tensor over the steps; those that drifted furthest are named.

    Infinite κ is left out.
    """
    latest = history[-1]["kappa"]
    names = [name for name in latest if math.isfinite(baseline[name]) and math.isfinite(latest[name])]
    figure = Figure(figsize=(_WIDTH, 5.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="0.8", linewidth=1, zorder=0)
    furthest = sorted(names, key=lambda name: -abs(math.log10(latest[name] / baseline[name])))[:_NAMED]
    for name in sorted(names, key=lambda name: name in furthest):
        known = [record for record in history if math.isfinite(record["kappa"].get(name, math.inf))]
        values = [math.log10(record["kappa"][name] / baseline[name]) for record in known]
        steps = [record["step"] for record in known]
        if name in furthest:
            color = colormaps["tab10"](furthest.index(name))
            label = f"{_shortened(name)}  {values[-1]:+.2f}"
            axes.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=4, label=label)
        else:
            axes.plot(steps, values, color="0.7", linewidth=0.8)
    axes.set_xlabel("optimizer steps", fontsize=10)
    axes.set_ylabel("drift: log₁₀(κ now / κ at fit start)", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if furthest:
        _legend(axes, 1, title="furthest from fit start" if len(names) > len(furthest) else None)
    _tidy(axes)
    return figure


def drift_map(baseline: Mapping[str, float], kappas: Mapping[str, float]) -> Figure:
    """The drift log10(κ now / κ at fit start) by layer and role; the median where several tensors share both.

    What is infinite now or at fit start is left out.
    """
    cells: dict[tuple[str, int | None], list[float]] = {}
    for name, kappa in kappas.items():
        depth, role = depth_and_role(name)
        drift = (
            math.log10(kappa / baseline[name]) if math.isfinite(kappa) and math.isfinite(baseline[name]) else math.nan
        )
        cells.setdefault((role.removesuffix(".weight"), depth), []).append(drift)
    roles = list(dict.fromkeys(role for role, _ in cells))
    depths = sorted({depth for _, depth in cells}, key=lambda depth: -1 if depth is None else depth)
    grid = np.full((len(roles), len(depths)), np.nan)
    for (role, depth), drifts in cells.items():
        known = [drift for drift in drifts if math.isfinite(drift)]
        if known:
            grid[roles.index(role), depths.index(depth)] = float(np.median(known))
    largest = float(np.nanmax(np.abs(grid))) if np.isfinite(grid).any() else 0.0
    figure = Figure(figsize=(_WIDTH, 1.6 + 0.3 * len(roles)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.93")
    bound = max(largest, 1e-6)
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    axes.set_yticks(range(len(roles)), [_shortened(role, 26) for role in roles], fontsize=9)
    ticks = list(range(0, len(depths), max(1, len(depths) // 8)))
    axes.set_xticks(ticks, ["–" if depths[tick] is None else str(depths[tick]) for tick in ticks], fontsize=9)
    axes.set_xlabel("layer", fontsize=10)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("log₁₀(κ now / κ at start)", fontsize=9)
    bar.ax.tick_params(labelsize=9)
    return figure


def expert_strips(strips: Mapping[str, Mapping[int, float]], trained: Collection[tuple[str, int]] = ()) -> Figure:
    """κ of each expert: a strip for each layer, the strips of one projection below each other.

    Args:
        strips: for each tensor of a layer's experts the κ of each by its number.
        trained: the strip and the number of each expert that trains, which gets a dot.

    Returns:
        A figure that is not attached to pyplot. An infinite κ is left gray.
    """
    panels: dict[str, list[tuple[int | None, str]]] = {}
    for name in strips:
        depth, role = depth_and_role(name)
        panels.setdefault(role.removesuffix(".weight"), []).append((depth, name))
    logs = {name: {at: math.log10(k) for at, k in s.items() if math.isfinite(k)} for name, s in strips.items()}
    finite = [value for values in logs.values() for value in values.values()]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    heights = [0.35 + 0.11 * len(panel) for panel in panels.values()]
    figure = Figure(figsize=(_WIDTH, 0.9 + sum(heights) + 0.25 * len(panels)), dpi=_DPI, layout="constrained")
    every: Any = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (role, panel) in zip(every, panels.items(), strict=True):
        panel.sort(key=lambda entry: -1 if entry[0] is None else entry[0])
        count = 1 + max(at for _, name in panel for at in strips[name])
        grid = np.full((len(panel), count), np.nan)
        for row, (_, name) in enumerate(panel):
            for at, value in logs[name].items():
                grid[row, at] = value
        axes.set_facecolor("0.85")
        image = axes.imshow(grid, cmap="viridis", vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
        dots = [(at, row) for row, (_, name) in enumerate(panel) for at in strips[name] if (name, at) in trained]
        if dots:
            axes.scatter(*zip(*dots, strict=True), s=9, c="white", edgecolors="black", linewidths=0.6)
        ticks = list(range(0, len(panel), max(1, len(panel) // 6)))
        axes.set_yticks(ticks, ["–" if panel[tick][0] is None else str(panel[tick][0]) for tick in ticks], fontsize=8)
        axes.set_ylabel("layer", fontsize=9)
        axes.set_title(_shortened(role), fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8)
    every[-1].set_xlabel("expert" + (" (a dot: it trains)" if trained else ""), fontsize=10)
    bar = figure.colorbar(image, ax=list(every), pad=0.02)
    bar.set_label("log₁₀ κ", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _shortened(name: str, length: int = 44) -> str:
    """The end of a name, which tells more than its beginning."""
    name = name.removesuffix(".weight")
    return name if len(name) <= length else "…" + name[-length + 1 :]


def _legend(axes: Axes, count: int, title: str | None = None) -> None:
    axes.legend(
        fontsize=9, title=title, title_fontsize=9, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0),
        ncols=2 if count > 1 else 1,
    )  # fmt: skip


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)

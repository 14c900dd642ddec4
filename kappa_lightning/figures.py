"""Pictures of condition numbers and how they drift, and of signals and sensitivities."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from kappa_lightning.profile import KappaProfile
from kappa_lightning.text import counted, printable
from kappa_lightning.weights.roles import depth_and_role

if TYPE_CHECKING:
    from kappa_lightning.sensitivity import SensitivityProfile

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
    figure = Figure(figsize=(11, 4.8), dpi=110, layout="constrained")
    scatter, lines = figure.subplots(1, 2, width_ratios=(1, 1.5))
    scatter.set(xlabel="κ at fit start", ylabel="κ now", xscale="log", yscale="log")
    scatter.set_title(f"{counted(len(names), 'tensor')}, epoch {history[-1]['epoch']}", fontsize=10)
    lines.set(xlabel="epoch", ylabel="drift: log₁₀(κ now / κ at fit start)")
    lines.axhline(0, color="0.8", linewidth=1, zorder=0)
    if not names:
        return figure
    start, now = np.array([baseline[n] for n in names]), np.array([latest[n] for n in names])
    ends = [min(start.min(), now.min()), max(start.max(), now.max())]
    scatter.plot(ends, ends, color="0.8", linewidth=1, zorder=0)

    furthest = sorted(names, key=lambda name: -abs(math.log10(latest[name] / baseline[name])))[:_NAMED]
    colors = {name: colormaps["tab10"](place) for place, name in enumerate(furthest)}
    scatter.scatter(start, now, s=[22 if n in colors else 14 for n in names], c=[colors.get(n, "0.6") for n in names])
    for name in names:
        known = [r for r in history if math.isfinite(r["kappa"].get(name, math.inf))]
        values = [math.log10(r["kappa"][name] / baseline[name]) for r in known]
        named = name in colors
        color = colors.get(name, "0.6")
        style: dict[str, Any] = (
            {"linewidth": 1.8, "marker": "o", "markersize": 3, "zorder": 3} if named else {"linewidth": 0.8}
        )
        lines.plot([r["epoch"] for r in known], values, color=color, label=_literal(name) if named else None, **style)
    lines.xaxis.get_major_locator().set_params(integer=True)
    title = "furthest from fit start" if len(names) > len(furthest) else None
    figure.legend(fontsize=7, loc="outside lower center", ncols=2, title=title, title_fontsize=7, frameon=False)
    return figure


def profile_figure(profile: KappaProfile, selected: Collection[str] = (), *, title: str = "") -> Figure:
    """Layer depth by tensor role, colored by log10 κ, with a dot on what trains.

    Several tensors of one role in one layer (separate experts) share a cell, colored by their median κ; the dot
    shows if any of them trains. An infinite κ is hatched.

    Args:
        profile: the condition numbers.
        selected: the names that train.
        title: written above.

    Returns:
        A figure that is not attached to pyplot; its height grows with the number of roles, its width with the depth.
    """
    return _layers_by_role({row.name: row.kappa for row in profile}, selected, title=title, label="log₁₀ κ")


def sensitivity_figure(profile: SensitivityProfile, selected: Collection[str] = (), *, title: str = "") -> Figure:
    """Layer depth by tensor role, colored by log10 of b²/(c·n), with a dot on what trains.

    Several tensors of one role in one layer share a cell, colored by their median. A tensor without a signal, or that
    the reference does not reach, is left white.

    Args:
        profile: signals and sensitivities.
        selected: the names that train.
        title: written above.

    Returns:
        A figure that is not attached to pyplot.
    """
    values = {row.name: profile.value(row.name) for row in profile}
    return _layers_by_role(values, selected, title=title, label="log₁₀ b²/(c·n)")


def signal_figure(profile: SensitivityProfile, selected: Collection[str] = (), *, title: str = "") -> Figure:
    """Signal against sensitivity, both per parameter, one point a tensor, colored by what it is.

    Filled points train, hollow ones do not. Along each gray line b²/(c·n) is the same: what lies above one is worth
    more for what it costs. A second legend says both.

    Args:
        profile: signals and sensitivities; what has no signal or no sensitivity is left out.
        selected: the names that train.
        title: written above.

    Returns:
        A figure that is not attached to pyplot.
    """
    rows = [row for row in profile if row.signal > 0 and row.sensitivity > 0]
    chosen = set(selected)
    figure = Figure(figsize=(7.2, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="sensitivity c/n", ylabel="signal b/n")
    axes.set_title(_literal(title), fontsize=9)
    if not rows:
        return figure
    roles = list(dict.fromkeys(depth_and_role(row.name)[1] for row in rows))
    colors: list[Line2D] = []
    for place, role in enumerate(roles):
        here = [row for row in rows if depth_and_role(row.name)[1] == role]
        x = [row.sensitivity / row.num_parameters for row in here]
        y = [row.signal / row.num_parameters for row in here]
        color = colormaps["tab20"](place % 20)
        faces = [color if row.name in chosen else "none" for row in here]
        axes.scatter(x, y, s=20, facecolors=faces, edgecolors=[color], linewidths=1.0)
        # A square, since whether the first point of a role is filled says nothing of the role.
        square: dict[str, Any] = {"linestyle": "", "marker": "s", "markersize": 4.5, "color": color}
        colors.append(Line2D([], [], **square, label=_short([role])[0]))
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    # b²/(c·n) = (b/n)²/(c/n), so the lines have the slope ½.
    for level in np.geomspace(bottom**2 / high, top**2 / low, 7)[1:-1]:
        axes.plot([low, high], [math.sqrt(level * low), math.sqrt(level * high)], color="0.8", linewidth=0.8, zorder=0)
    axes.set(xlim=(low, high), ylim=(bottom, top))
    columns = 1 if len(roles) <= 16 else 2
    figure.legend(handles=colors, fontsize=6, loc="outside right upper", frameon=False, ncols=columns)
    point: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 4.5, "markeredgecolor": "0.3"}
    meanings = [
        Line2D([], [], **point, markerfacecolor="0.3", label="trains"),
        Line2D([], [], **point, markerfacecolor="none", label="does not train"),
        Line2D([], [], color="0.75", linewidth=0.8, label="equal b²/(c·n), more above"),
    ]
    # Below all, where no point can be.
    figure.legend(handles=meanings, fontsize=7, loc="outside lower center", frameon=False, ncols=len(meanings))
    return figure


def _layers_by_role(values: Mapping[str, float], selected: Collection[str], *, title: str, label: str) -> Figure:
    cells: dict[tuple[str, int | None], list[str]] = {}
    for name in values:
        depth, role = depth_and_role(name)
        cells.setdefault((role, depth), []).append(name)
    roles = list(dict.fromkeys(role for role, _ in cells))
    depths = sorted({depth for _, depth in cells if depth is not None})
    columns: list[int | None] = [*([None] if any(depth is None for _, depth in cells) else []), *depths]
    grid = np.full((len(roles), len(columns)), np.nan)
    for (role, depth), names in cells.items():
        middle = float(np.median([values[name] for name in names]))
        grid[roles.index(role), columns.index(depth)] = np.log10(middle) if middle > 0 else np.nan
    finite = grid[np.isfinite(grid)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)

    labels = _short(roles)
    width = 2.4 + 0.075 * max(map(len, labels)) + max(2.5, 0.3 * len(columns))
    figure = Figure(figsize=(width, 1.5 + 0.28 * len(roles)), dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        np.where(np.isinf(grid), np.nan, grid), cmap="viridis", vmin=low, vmax=max(high, low + 1e-6), aspect="auto"
    )
    for row_index, column in zip(*np.nonzero(np.isinf(grid)), strict=True):
        corner = (column - 0.5, row_index - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, facecolor="0.9", edgecolor="0.5", hatch="///", linewidth=0))
    chosen = set(selected)
    dots = [
        (columns.index(depth), roles.index(role))
        for (role, depth), names in cells.items()
        if chosen.intersection(names)
    ]
    if dots:
        x, y = zip(*dots, strict=True)
        axes.scatter(x, y, s=26, c="white", edgecolors="black", linewidths=0.9, label="trains")
        # Beside the label of the axis, where it costs no room of its own.
        below = (1.0, 0.0)
        axes.legend(loc="upper right", bbox_to_anchor=below, borderaxespad=2.2, fontsize=7, frameon=False)
    axes.set_yticks(range(len(roles)), labels, fontsize=7)
    ticks = list(range(0, len(columns), max(1, len(columns) // 16)))
    axes.set_xticks(ticks, ["–" if columns[t] is None else str(columns[t]) for t in ticks], fontsize=7)
    axes.set_xlabel("layer", fontsize=8)
    axes.set_title(_literal(title), fontsize=9)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _short(roles: Sequence[str]) -> list[str]:
    """Roles without the ending that nearly all share."""
    return [_literal(role.removesuffix(".weight")) for role in roles]


def _literal(name: str) -> str:
    """A name that Matplotlib draws as it is, and does not take for a formula."""
    return printable(name).replace("$", r"\$")

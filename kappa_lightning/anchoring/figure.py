"""The way back as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from kappa_lightning.anchoring.choice import Goal, Point, on_the_line

Reports = Mapping[str, Mapping[str, float]]


def walk_figure(points: Sequence[Point], best: Point, reports: Reports, goal: Goal, *, monitor: str) -> Figure:
    """Retention against the new task's figure along the way, and both over α.

    Args:
        points: all that were measured.
        best: the chosen one.
        reports: the retention of each probe on the half that reports, at ``"chosen"`` and ``"trained"``.
        goal: what was demanded.
        monitor: the name of the new task's figure.

    Returns:
        A figure with two panels, not attached to pyplot.
    """
    figure = Figure(figsize=(10.5, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    line = on_the_line(points)
    apart = [point for point in points if point not in line]
    left.plot([p.monitor for p in line], [p.lowest_retention for p in line], "o-", color="0.55", markersize=4)
    if apart:
        left.plot([p.monitor for p in apart], [p.lowest_retention for p in apart], ".", color="0.75", label="by group")
    for point, label in ((line[0], "pretrained"), (line[-1], "trained")):
        left.annotate(
            label, (point.monitor, point.lowest_retention), xytext=(6, 6), textcoords="offset points", fontsize=8
        )
    left.plot(
        best.monitor, best.lowest_retention, "*", color="C3", markersize=15, label=f"chosen, α = {best.alpha:.2g}"
    )
    reported = min(reports["chosen"].values())
    left.plot(best.monitor, reported, "D", color="C0", markersize=5, label="chosen, on the other half")
    if goal.min_retention is not None:
        left.axhline(goal.min_retention, color="C3", linewidth=0.8, linestyle=":")
    if goal.monitor_limit is not None:
        left.axvline(goal.monitor_limit, color="C3", linewidth=0.8, linestyle=":")
    left.margins(0.12)
    left.set(xlabel=monitor, ylabel="lowest retention of a probe")
    left.legend(fontsize=8, frameon=False)

    alphas = [point.alpha for point in line]
    for number, name in enumerate(best.retention):
        right.plot(alphas, [p.retention[name] for p in line], "o-", color=f"C{number}", markersize=3, label=name)
    right.axvline(best.alpha, color="C3", linewidth=0.8, label="chosen α")
    right.set(xlabel="α (0 is pretrained, 1 is trained)", ylabel="retention")
    other = right.twinx()
    other.plot(alphas, [point.monitor for point in line], "s--", color="0.4", markersize=3, label=monitor)
    other.set_ylabel(monitor, color="0.4")
    figure.legend(handles=[*right.lines, *other.lines], loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure

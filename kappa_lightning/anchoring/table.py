"""The way back as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from kappa_lightning.anchoring.choice import Goal, Point, on_the_line
from kappa_lightning.tables import render

Reports = Mapping[str, Mapping[str, float]]


def walk_table(points: Sequence[Point], best: Point, reports: Reports, goal: Goal, *, monitor: str) -> str:
    """What was measured along the way, the chosen point marked.

    Args:
        points: all that were measured.
        best: the chosen one.
        reports: the retention of each probe on the half that reports, at ``"chosen"`` and ``"trained"``.
        goal: what was demanded.
        monitor: the name of the new task's figure.
    """
    table = Table(title=f"WalkBack({goal})", box=box.SIMPLE, title_justify="left")
    table.add_column("α", justify="right")
    table.add_column(monitor, justify="right")
    for name in best.retention:
        table.add_column(f"{name}", justify="right")
    table.add_column("")
    line = on_the_line(points)
    for point in line if best in line else [*line, best]:
        mark = "chosen" if point is best else ""
        kept = [f"{value:.4f}" for value in point.retention.values()]
        table.add_row(f"{point.alpha:.6g}", f"{point.monitor:.5g}", *kept, mark)
    for label, retention in reports.items():
        kept = [f"{value:.4f}" for value in retention.values()]
        table.add_row("", "", *kept, f"{label}, on the other half")
    text = render(table)
    if len(best.factors) > 1:
        text += "\n" + ", ".join(f"{group}: {factor:.6g}" for group, factor in best.factors.items())
    return text

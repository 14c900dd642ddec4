"""What a profile and a selection look like as text: a table for the console, Markdown for TensorBoard."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from kappa_lightning.profile import KappaRow
from kappa_lightning.text import counted, printable

if TYPE_CHECKING:
    from kappa_lightning.sensitivity import SensitivityProfile


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that share a fate: their number, their parameters and, where known, the figures that chose them."""

    label: str
    num_tensors: int
    num_parameters: int
    figures: tuple[float, ...]

    @classmethod
    def of(
        cls, label: str, names: Iterable[str], sizes: Mapping[str, int], figures: Mapping[str, float] | None = None
    ) -> Group:
        """The group of some names, with their sizes and those of their figures, such as κ, that are known."""
        names = list(names)
        known = () if figures is None else tuple(figures[name] for name in names if name in figures)
        return cls(label, len(names), sum(sizes[name] for name in names), known)


def training_table(groups: Sequence[Group], *, title: str, figure: str = "κ") -> str:
    """A table of what trains and what does not, for the console, without empty groups.

    Args:
        groups: the rows.
        title: what stands over it.
        figure: what the groups' figures are, whose range is a column where there are any.
    """
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("")
    headers = ["tensors", "parameters", "share"]
    if any(group.figures for group in groups):
        headers.append(f"{figure} range")
    for header in headers:
        table.add_column(header, justify="right")
    total = sum(group.num_parameters for group in groups)
    for group in groups:
        if group.num_tensors:
            share = f"{group.num_parameters / total:.1%}"
            cells = (f"{group.num_tensors:,}", f"{group.num_parameters:,}", share, figure_range(group.figures))
            table.add_row(group.label, *cells[: len(headers)])
    return render(table)


def ranking_markdown(ranking: Sequence[KappaRow], selected: Iterable[str]) -> str:
    """The ranking as a Markdown table, the first to train first."""
    selected = set(selected)
    lines = ["| rank | tensor | shape | κ | log-volume (nats) | trains |", "|---:|---|---|---:|---:|:---:|"]
    for position, row in enumerate(ranking, start=1):
        shape = "×".join(map(str, row.shape))
        mark = "yes" if row.name in selected else ""
        lines.append(
            f"| {position} | {_cell(row.name)} | {shape} | {format_kappa(row.kappa)} | {row.log_volume:.1f} | {mark} |"
        )
    return "\n".join(lines)


def sensitivity_markdown(
    profile: SensitivityProfile, selected: Iterable[str], rates: Mapping[str, float] | None = None
) -> str:
    """The ranking by b²/(c·n) as a Markdown table, the first to train first.

    Args:
        profile: the signals and sensitivities.
        selected: the names that train.
        rates: factors of learning rates by name, if tensors train at rates of their own.
    """
    chosen = set(selected)
    names = list(profile.select()) if len(profile) else []
    least = f"The set of least predicted forgetting has {counted(len(names), 'tensor')}."
    header = ["rank", "tensor", "shape", "signal b", "sensitivity c", "b²/(c·n)", *([] if rates is None else ["rate"])]
    marks = ["---:", "---", "---", "---:", "---:", "---:", *([] if rates is None else ["---:"])]
    lines = [least, "", f"| {' | '.join([*header, 'trains'])} |", f"|{'|'.join([*marks, ':---:'])}|"]
    for position, row in enumerate(profile.rank(), start=1):
        cells = [
            str(position),
            _cell(row.name),
            "×".join(map(str, row.shape)),
            f"{row.signal:.3g}",
            f"{row.sensitivity:.3g}",
            f"{profile.value(row.name):.3g}",
            *([] if rates is None else [f"{rates[row.name]:.3g}" if row.name in rates else ""]),
            "yes" if row.name in chosen else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_kappa(kappa: float) -> str:
    """κ with four significant digits, ∞ as a sign."""
    return "∞" if math.isinf(kappa) else f"{kappa:,.0f}" if kappa >= 1000 else f"{kappa:.4g}"


def figure_range(figures: Sequence[float]) -> str:
    """The smallest and the largest of some figures, such as κ."""
    if not figures:
        return ""
    low, high = format_kappa(min(figures)), format_kappa(max(figures))
    return low if low == high else f"{low} – {high}"


def render(table: Table, width: int = 110) -> str:
    """A rich table as plain text, the same on every terminal and in every log file."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n" + "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _cell(name: str) -> str:
    """A name as Markdown shows it in one cell of a table."""
    return printable(name).replace("|", "\\|")

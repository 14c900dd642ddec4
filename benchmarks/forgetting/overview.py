"""What the comparisons found, as one picture: nats lost of what the model knew, by method and task.

``python -m benchmarks.forgetting.overview docs/images/evidence.png`` draws it from the committed CSVs in a few seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.forgetting.comparison import Comparison, compare, looking_up
from benchmarks.forgetting.page import values_of
from benchmarks.forgetting.protocol import Protocol
from benchmarks.forgetting.table import read_runs
from kappa_lightning.files import replacing
from kappa_lightning.pilot.adaptation import Reading, nats_of
from kappa_lightning.pilot.statistics import Interval, t_interval

EVIDENCE = Path(__file__).parent / "evidence"

METHODS = (
    "everything trains", "random quarter", "lowest κ, quarter", "highest κ, quarter", "gate and up projections",
    "LoRA, its best", "sensitivity, gradient", "sensitivity, path", "everything + anchor", "sensitivity + anchor",
)  # fmt: skip
"""The rows of the picture."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A task of the picture.

    Attributes:
        name: of the protocol.
        title: of the panel.
        methods: of each row the protocol's name for it, where it was run.
        probes: those that count; all if empty.
    """

    name: str
    title: str
    methods: dict[str, str]
    probes: tuple[str, ...] = field(default=())


_SAME = {
    "everything trains": "full",
    "random quarter": "random 0.25",
    "lowest κ, quarter": "kappa 0.25",
    "highest κ, quarter": "reversed:kappa 0.25",
    "gate and up projections": "@gate_up",
    "sensitivity, gradient": "sensitivity 0.25",
    "sensitivity, path": "sensitivity 0.25 along",
}

PANELS = (
    # A classifier's choice is along its first steps by default.
    Panel(
        "digits_together",
        "digits, inverted",
        {
            **{row: name for row, name in _SAME.items() if not row.startswith(("sensitivity", "gate"))},
            "sensitivity, path": "sensitivity 0.25",
            "LoRA, its best": "lora r64 a256",
        },
    ),
    Panel(
        "scenes",
        "MiniLM learns scenes",
        {
            **{row: name for row, name in _SAME.items() if not row.startswith("sensitivity")},
            "sensitivity, gradient": "sensitivity 0.25 on sentences",
            "LoRA, its best": "lora r16",
        },
    ),
    Panel(
        "captions",
        "a small LLaVA\nlearns captions",
        {
            **_SAME,
            "LoRA, its best": "lora r16 a16",
            "everything + anchor": "full + light anchor 1",
            "sensitivity + anchor": "sensitivity 0.25 + light anchor 1",
        },
    ),
    Panel(
        "language",
        "SmolLM2 learns\nword problems",
        {
            **_SAME,
            "LoRA, its best": "lora r4",
            "everything + anchor": "full + light anchor 10",
            "sensitivity + anchor": "sensitivity 0.25 + light anchor 10",
        },
    ),
    Panel(
        "sight",
        "SmolLM2 learns to see:\nits text",
        {**_SAME, "LoRA, its best": "lora r16", "everything + anchor": "full + light anchor 10"},
        probes=("own", "wikitext"),
    ),
)


def lost(panel: Panel, found: Comparison) -> dict[str, tuple[Interval, bool]]:
    """Of each row that was run the nats lost, and whether all seeds arrived."""

    def nats(reading: Reading) -> float:
        kept = [value for name, value in reading.retention.items() if not panel.probes or name in panel.probes]
        return sum(map(nats_of, kept)) / len(kept)

    rows = {}
    for row, method in panel.methods.items():
        values = list(values_of(found, method, nats).values())
        known = [value for value in values if value is not None]
        rows[row] = t_interval(known), len(known) == len(values)
    return rows


def comparison_of(panel: Panel) -> Comparison:
    """What the committed runs of a panel's protocol give."""
    protocol = Protocol.read(EVIDENCE / f"{panel.name}.toml")
    return compare(protocol, looking_up(read_runs(EVIDENCE / f"{panel.name}-runs.csv")))


def overview() -> Figure:
    """A panel for each task, on a logarithmic scale of its own; hollow where not all seeds arrive."""
    figure = Figure(figsize=(13, 4.6), dpi=110, layout="constrained")
    for panel, axes in zip(PANELS, figure.subplots(1, len(PANELS), sharey=True), strict=True):
        rows = lost(panel, comparison_of(panel))
        for place, row in enumerate(METHODS):
            if row not in rows:
                continue
            interval, arrived = rows[row]
            color = "C3" if "κ" in row else "C0" if row.startswith("sensitivity") else "0.35"
            axes.plot([interval.low, interval.high], [place, place], color=color, linewidth=1.6)
            axes.plot(
                interval.mean, place, "o", color=color, markerfacecolor=color if arrived else "white", markersize=6
            )
        axes.axvline(rows["everything trains"][0].mean, color="0.35", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", title=panel.title, yticks=range(len(METHODS)))
        axes.title.set_fontsize(10)
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 3), numticks=20))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.25)
        axes.set_yticklabels(METHODS)
        axes.set_ylim(len(METHODS) - 0.5, -0.5)
    figure.supxlabel(
        "nats lost of what the model knew, with 95 % intervals; less is better. Dotted: where everything trains. "
        "Hollow: not all seeds arrive",
        fontsize=9,
    )
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting.overview", description="Draw what all comparisons found."
    )
    parser.add_argument("out", type=Path, help="where the picture goes")
    args = parser.parse_args(argv)
    with replacing(args.out) as file:
        overview().savefig(file, format="png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

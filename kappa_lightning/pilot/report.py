"""The page of a pilot: the table, the picture of loss against retention with the front, and a YAML of the callbacks."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from kappa_lightning.files import write_bytes, write_text
from kappa_lightning.pilot.adaptation import Point
from kappa_lightning.pilot.entry import Entry, FrontPoint
from kappa_lightning.pilot.statistics import Interval
from kappa_lightning.tables import render

HEADERS = (
    "", "candidate", "arrived", "retention", "nats lost", "p", "trains", "rate ×", "seconds a run"
)  # fmt: skip


UNLIKE = 0.02
"""The difference in retention between the halves of the probes' data that is mentioned."""


class Result(Protocol):
    """What the page needs of a result."""

    @property
    def entries(self) -> Sequence[Entry]: ...  # noqa: D102
    @property
    def level(self) -> float: ...  # noqa: D102
    @property
    def start_loss(self) -> float: ...  # noqa: D102
    @property
    def min_retention(self) -> float: ...  # noqa: D102
    @property
    def margin(self) -> float: ...  # noqa: D102
    @property
    def runs(self) -> int: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102
    @property
    def unfinished(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def paths(self) -> Mapping[str, Sequence[Sequence[Point]]]: ...  # noqa: D102
    @property
    def front(self) -> list[FrontPoint]: ...  # noqa: D102
    @property
    def chosen(self) -> list[Entry]: ...  # noqa: D102
    @property
    def undecided(self) -> list[Entry]: ...  # noqa: D102


def rows_of(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """The cells of the table, under :data:`HEADERS`; a star marks what keeps as much as the best, ``?`` what may."""
    rows: list[tuple[str, ...]] = []
    for entry in entries:
        arrived = f"{entry.arrived}/{entry.seeds}" if entry.arrived else _not_arrived(entry)
        stage = f" ({entry.stage})" if entry.stage in ("raced", "searched") else ""
        rows.append(
            (
                "*" if entry.near else "?" if entry.in_set else "",
                entry.label,
                arrived + stage,
                shown(entry.retention),
                shown(entry.nats),
                shown_p(entry.p),
                f"{entry.trainable:,}" if entry.trainable else "",
                "" if math.isnan(entry.factor) else f"{entry.factor:.3g}",
                "" if math.isnan(entry.seconds) else f"{entry.seconds:.0f}",
            )
        )
    return rows


def _not_arrived(entry: Entry) -> str:
    if entry.stage == "failed":
        return "failed"
    lowest = "" if math.isnan(entry.lowest_loss) else f", lowest loss {entry.lowest_loss:.4g}"
    return f"{'no time' if entry.stage == 'cut off' else 'no'}{lowest}"


def table_of(entries: Sequence[Entry]) -> str:
    """The table as text."""
    table = Table(box=box.SIMPLE_HEAD)
    for header in HEADERS:
        table.add_column(header, justify="left" if header in ("", "candidate", "arrived") else "right")
    for row in rows_of(entries):
        table.add_row(*row)
    return "\n".join([render(table, width=150).rstrip("\n"), *_errors(entries), ""])


def _errors(entries: Sequence[Entry]) -> list[str]:
    return [f"{entry.name}: {entry.error}" for entry in entries if entry.error and not entry.walked]


def shown(interval: Interval) -> str:
    """A mean with its interval, as far as there is one."""
    if math.isnan(interval.mean):
        return ""
    if math.isnan(interval.low):
        return f"{interval.mean:.4f}"
    return f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def shown_p(p: float) -> str:
    """A p-value, if there is one."""
    if math.isnan(p):
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def answer_of(result: Result) -> str:
    """The answer in a sentence or two."""
    chosen = result.chosen
    if not chosen and any(entry.stage == "confirmed" for entry in result.entries):
        return (
            f"No candidate came down to a loss of {result.level:.4g} with any seed of the confirmation: give more "
            "steps, or a smaller target."
        )
    if not chosen:
        return "Nothing was confirmed: the time did not suffice. Give more hours, or fewer candidates or steps."
    first = chosen[0]
    kept = f"It keeps {first.retention.mean:.4f} of what the module could do ({first.nats.mean:.4f} nats lost)" + (
        "."
        if first.keeps
        else f", less than the {result.min_retention:g} that was asked for, as do all that keep as much as the best."
    )
    # One seed has no interval.
    outside = first.searched < first.retention.low or first.searched > first.retention.high
    if outside and abs(first.searched - first.retention.mean) > UNLIKE:
        kept += (
            f" On the half of the probes' data that the search saw, {first.searched:.4f} were kept: the halves are not "
            "alike. Every other item is in each, so shuffle the probes' items once before they are put into batches."
        )
    more = [entry.label for entry in result.undecided]
    undecided = f" These seeds do not decide of: {'; '.join(more)}." if more else ""
    if len(chosen) == 1:
        rivals = any(entry.stage == "confirmed" and entry.name != first.name for entry in result.entries)
        compared = "it keeps more than the others that were confirmed" if rivals else "no other one was confirmed"
        if more:
            compared = "it keeps most of those that were confirmed"
        return f"Use {first.label}: {compared}. {kept}{undecided}"
    others = "; ".join(entry.label for entry in chosen[1:])
    return (
        f"Use {first.label}, the cheapest of those that keep as much as the best. {kept} As good: {others}.{undecided}"
    )


def page_of(result: Result) -> str:
    """The page as Markdown, without its picture."""
    lines = ["# Pilot", "", answer_of(result), ""]
    lines.append(
        f"Everything is read where the held-out loss first comes down to {result.level:.4g} (before training: "
        f"{result.start_loss:.4g}). {result.runs} runs took {result.seconds / 60:.1f} minutes."
    )
    lines.append(
        "What is kept holds at that loss: whoever trains further forgets more. To stop there, give your Trainer "
        f"`EarlyStopping(<monitor>, stopping_threshold={result.level:.6g})`."
    )
    if result.unfinished:
        lines.append(
            f"The time did not suffice for the whole of: {', '.join(result.unfinished)}. Where a search was cut off, "
            "its rate is the slowest that arrived so far."
        )
    lines += _errors(result.entries)
    lines += ["", f"|{'|'.join(f' {header} ' for header in HEADERS)}|", f"|{'---|' * len(HEADERS)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows_of(result.entries)]
    lines += [
        "",
        f"\\* keeps as much as the best: its mean is within {result.margin:g}, and it cannot be told from it. "
        "? keeps less in the mean, which these seeds do not tell from the best (Student's paired t test over the seeds "
        "of the confirmation, adjusted after Holm). Intervals are Student's, of 95 %; "
        "*nats lost* is −ln retention: nats a token for a perplexity, the "
        "divergence for an agreement. *rate ×* is the factor on the module's own learning rates: the slowest that "
        "arrives, to √2. Rows without an interval were not confirmed; their figures come from the search and are "
        "chosen by their own noise.",
        "",
    ]
    return "\n".join(lines)


def figure_of(result: Result) -> Figure:
    """Loss against retention: a line for each run, dotted on the way back from its end, and the front in black."""
    figure = Figure(figsize=(9.5, 5.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(label.removesuffix(", walked back") for label in result.paths))
    color = {name: colormaps["tab10"](place % 10) for place, name in enumerate(names)}
    for label, runs in result.paths.items():
        walked = label.endswith(", walked back")
        name = label.removesuffix(", walked back")
        for number, run in enumerate(runs):
            finite = [point for point in run if math.isfinite(point.loss)]
            axes.plot(
                [point.loss for point in finite],
                [sum(point.retention.values()) / len(point.retention) for point in finite],
                ":" if walked else "-",
                color=color[name],
                linewidth=1.1,
                alpha=0.7,
                label=name if number == 0 and not walked else None,
            )
    front = result.front
    if front:
        axes.plot(
            [p.loss for p in front],
            [p.retention for p in front],
            color="black",
            linewidth=1.6,
            alpha=0.9,
            label="front",
        )
    axes.axvline(result.level, color="0.4", linewidth=1, linestyle="--")
    axes.set(xlabel="held-out loss of the new task (dashed: where all are read)", ylabel="retention")
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def callbacks_yaml(entry: Entry) -> str:
    """The callbacks of an entry as the ``trainer.callbacks`` of a LightningCLI configuration."""
    head = [f"# {entry.label}: {shown(entry.retention)} kept, {entry.trainable:,} parameters train"]
    if entry.walked:
        head.append(f"# a ForgettingEval beside it gives the probes; {entry.share:.3g} of the movement was kept")
    if entry.init is None:
        back = ", and before a WalkBack" if entry.walked else ""
        head.append(
            f"# {entry.name!r} is a function of yours: its callbacks go behind RateFactor({entry.factor:.6g}){back}"
        )
        return "\n".join([*head, ""])
    lines = [*head, "trainer:", "  callbacks:"]
    for spec in entry.init:
        lines.append(f"    - class_path: {spec['class_path']}")
        if spec["init_args"]:
            lines.append("      init_args:")
            # JSON is YAML, and quotes what YAML would read otherwise.
            lines += [f"        {name}: {json.dumps(value)}" for name, value in spec["init_args"].items()]
    return "\n".join([*lines, ""])


def write_report(result: Result, folder: Path, yaml: str | None) -> Path:
    """Write ``index.html``, ``report.md``, ``pilot.png`` and ``callbacks.yaml``; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    figure_of(result).savefig(stream, format="png")
    picture = stream.getvalue()
    write_bytes(folder / "pilot.png", picture)
    markdown = page_of(result)
    code = "" if yaml is None else f"\n## Its callbacks\n\n```yaml\n{yaml}```\n"
    write_text(folder / "report.md", f"{markdown}\n![Loss against retention](pilot.png)\n{code}")
    if yaml is not None:
        write_text(folder / "callbacks.yaml", yaml)
    page = folder / "index.html"
    write_text(page, _html(result, picture, yaml))
    return page


def _html(result: Result, picture: bytes, yaml: str | None) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    body = [f"<tr{' class=in' if row[0] == '*' else ''}>{cells('td', row)}</tr>" for row in rows_of(result.entries)]
    paragraphs = [p for p in page_of(result).split("\n\n")[1:] if not p.startswith("|")]
    text = "".join(f"<p>{html.escape(p.replace(chr(92), ''))}</p>" for p in paragraphs if p.strip())
    shown_yaml = "" if yaml is None else f"<h2>Its callbacks</h2><pre>{html.escape(yaml)}</pre>"
    image = base64.b64encode(picture).decode()
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Pilot</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "div{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
        "td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}"
        "td:nth-child(2),th:nth-child(2),td:nth-child(3),th:nth-child(3){text-align:left}"
        "tr.in{background:#eef7ee;font-weight:600}img{max-width:100%}pre{background:#f6f6f6;padding:1rem;overflow-x:auto}"
        "</style><h1>Pilot</h1>"
        f"{text}<div><table><tr>{cells('th', HEADERS)}</tr>{''.join(body)}</table></div>"
        f'<p><img alt="Loss against retention" src="data:image/png;base64,{image}"></p>{shown_yaml}</html>\n'
    )

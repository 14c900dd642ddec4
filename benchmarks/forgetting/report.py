"""What a comparison found: a CSV of every run, a table, and a picture of retention over adaptation."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.forgetting.run import Run
from benchmarks.forgetting.settings import Settings
from benchmarks.forgetting.statistics import (
    Interval,
    bootstrap,
    holm,
    loss_level,
    paired_difference,
    retention_at,
    sign_flip,
)
from benchmarks.forgetting.sweep import Sweep, tuning_loss
from kappa_lightning.files import write_text


@dataclass(frozen=True)
class Reading:
    """Retention of a method at a level of adaptation.

    Attributes:
        method: the method.
        level: the share of full fine-tuning's adaptation, by seed.
        retention: by seed; NaN where the run never reached the level.
        interval: of the mean over the seeds that reached it.
        to_full: of the difference to full fine-tuning, paired by seed.
        to_random: of the difference to the random choice, paired by seed.
        p_random: of no difference to the random choice, by the exact sign-flip test; NaN for that choice itself.
        seeds: how many runs there are.
    """

    method: str
    level: float
    retention: dict[int, float]
    interval: Interval
    to_full: Interval
    to_random: Interval
    p_random: float
    seeds: int


def read_off(sweep: Sweep, level: float) -> list[Reading]:
    """Every method's retention at the same held-out loss, seed by seed that at which ``full`` is at the level."""
    losses = {seed: loss_level(run.path, level) for seed, run in sweep.runs["full"].items()}
    retention = {
        method: {seed: retention_at(run.path, losses[seed]) for seed, run in runs.items() if seed in losses}
        for method, runs in sweep.runs.items()
    }
    reached = {
        method: {seed: value for seed, value in values.items() if not math.isnan(value)}
        for method, values in retention.items()
    }
    return [
        Reading(
            method=method,
            level=level,
            retention=values,
            interval=bootstrap(list(values.values())),
            to_full=paired_difference(reached[method], reached["full"]),
            to_random=paired_difference(reached[method], reached.get("random", {})),
            p_random=sign_flip(reached[method], {} if method == "random" else reached.get("random", {})),
            seeds=len(values),
        )
        for method, values in retention.items()
    ]


def write_report(sweep: Sweep, settings: Settings, folder: Path, name: str) -> str:
    """Write ``<name>-paths.csv``, ``<name>-retention.csv``, ``<name>.md`` and ``<name>.png``; return the table."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_paths(sweep, folder / f"{name}-paths.csv")
    readings = [reading for level in settings.levels for reading in read_off(sweep, level)]
    _write_readings(readings, folder / f"{name}-retention.csv")
    levels = [markdown(sweep, read_off(sweep, level)) for level in settings.levels]
    table = "\n\n".join([baselines(sweep), *levels, learning_rates(sweep, settings.level)])
    write_text(folder / f"{name}.md", table + "\n")
    curves_figure(sweep, title=f"{settings.task}, budget {settings.budget:g}").savefig(folder / f"{name}.png")
    return table


def baselines(sweep: Sweep) -> str:
    """What each probe measured before the first step, from the runs of full fine-tuning."""
    runs = list(sweep.runs["full"].values()) or sweep.tuning["full"]
    found = {name: bootstrap([run.probes[name][0] for run in runs]) for name in runs[0].probes}
    figures = ", ".join(f"{name} {_shown(interval)}" for name, interval in found.items())
    return f"Before the first step: {figures}; task loss {_shown(bootstrap([run.path[0][0] for run in runs]))}."


def markdown(sweep: Sweep, readings: Sequence[Reading]) -> str:
    """One level's table: the methods that reached it in most seeds and retain most first."""
    ordered = sorted(readings, key=lambda r: (-r.interval.count, -r.interval.mean if r.interval.count else 0, r.method))
    adjusted = holm({reading.method: reading.p_random for reading in readings})
    lines = [
        f"Retention at {readings[0].level:.0%} of full fine-tuning's adaptation "
        "(mean, 95 % bootstrap interval; differences paired by seed; p: sign-flip test against random, Holm-adjusted)",
        "",
        "| method | reached | retention | minus full | minus random | p | trainable | learning rate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for reading in ordered:
        runs = list(sweep.runs[reading.method].values())
        if not runs:
            continue
        plan = runs[0].plan
        strength = f", strength {plan.strength:g}" if plan.strength else ""
        lines.append(
            f"| {reading.method} | {reading.interval.count}/{reading.seeds} | {_shown(reading.interval)} | "
            f"{_shown(reading.to_full, sign=True)} | {_shown(reading.to_random, sign=True)} | "
            f"{_p_value(adjusted[reading.method])} | "
            f"{runs[0].trainable:,} | {plan.lr:g}{strength} |"
        )
    return "\n".join(lines)


def learning_rates(sweep: Sweep, level: float) -> str:
    """The table of what each learning rate keeps at the level, with the tuning seed."""
    loss = tuning_loss(sweep.tuning["full"], level)
    lrs = sorted({run.plan.lr for runs in sweep.tuning.values() for run in runs})
    lines = [
        f"Retention with the tuning seed where the loss is {loss:.3g}, {level:.0%} of the way of the best run of full "
        "fine-tuning, by learning rate (×: never there; empty: not tried)",
        "",
        f"| method | {' | '.join(f'{lr:g}' for lr in lrs)} |",
        f"|---|{'---:|' * len(lrs)}",
    ]
    for method, runs in sweep.tuning.items():
        kept: dict[float, float] = {}
        for run in runs:
            retention = retention_at(run.path, loss)
            kept[run.plan.lr] = float(np.fmax(kept.get(run.plan.lr, math.nan), retention))
        cells = ("" if lr not in kept else "×" if math.isnan(kept[lr]) else f"{kept[lr]:.3f}" for lr in lrs)
        if runs:
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves_figure(sweep: Sweep, *, title: str = "") -> Figure:
    """Retention over the share of full fine-tuning's adaptation, the mean over seeds with its bootstrap interval.

    A curve ends where a run of its method got no further. The tuned learning rates differ between methods; the axis
    is the loss reached, not the time it took.
    """
    shares = np.linspace(0, 0.99, 67)
    figure = Figure(figsize=(11, 6), dpi=110, layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab10"]
    curves = [read_off(sweep, float(share)) for share in shares]
    for index, method in enumerate(sweep.runs):
        points = [next(r for r in readings if r.method == method) for readings in curves]
        whole = [p.seeds > 0 and p.interval.count == p.seeds for p in points]
        x = shares[whole]
        mean, low, high = (
            np.array([getattr(p.interval, end) for p, keep in zip(points, whole, strict=True) if keep])
            for end in ("mean", "low", "high")
        )
        color = colors(index % 10)
        axes.plot(x, mean, color=color, label=method, linewidth=1.6, linestyle=("-", "--", ":")[index // 10 % 3])
        axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="share of full fine-tuning's reduction of the held-out loss", ylabel="retention", title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _write_paths(sweep: Sweep, file: Path) -> None:
    rows = [(kind, run) for method in sweep.tuning for kind, run in _runs_of(sweep, method)]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            ["method", "kind", "budget", "lr", "strength", "seed", "trainable", "point", "loss", "retention"]
        )
        for kind, run in rows:
            plan = run.plan
            for point, (loss, retention) in enumerate(run.path):
                writer.writerow(
                    [plan.method, kind, plan.budget, plan.lr, plan.strength, plan.seed, run.trainable, point,
                     f"{loss:.6g}", f"{retention:.6g}"]
                )  # fmt: skip


def _runs_of(sweep: Sweep, method: str) -> list[tuple[str, Run]]:
    reported = sweep.runs.get(method, {}).values()
    return [("tuning", run) for run in sweep.tuning[method]] + [("reported", run) for run in reported]


def _write_readings(readings: Sequence[Reading], file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["method", "level", "seed", "retention"])
        for reading in readings:
            for seed, retention in sorted(reading.retention.items()):
                writer.writerow([reading.method, reading.level, seed, f"{retention:.6g}"])


def _shown(interval: Interval, *, sign: bool = False) -> str:
    if not interval.count:
        return "–"
    form = "+.3f" if sign else ".3f"
    if math.isnan(interval.low):
        return f"{interval.mean:{form}}"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _p_value(p: float) -> str:
    return "–" if math.isnan(p) else f"{p:.3f}"

"""The page of a comparison, from finished runs alone: what is kept at equal adaptation, contrasts, and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.forgetting.comparison import Comparison, rate_so_far
from benchmarks.forgetting.protocol import LINE, Protocol
from kappa_lightning.files import write_text
from kappa_lightning.pilot.adaptation import Reading, factor_of, lowest_loss, read_at
from kappa_lightning.pilot.search import Outcome
from kappa_lightning.pilot.statistics import Contrast, Interval, contrast, holm, t_interval

Values = Mapping[int, float | None]
"""By seed; ``None`` where the level was not reached."""


def write_page(protocol: Protocol, found: Comparison, folder: Path, name: str) -> str:
    """Write <name>.md and <name>.png; returns the page."""
    page = page_of(protocol, found, name)
    write_text(folder / f"{name}.md", page)
    picture(protocol, found).savefig(folder / f"{name}.png")
    return page


def page_of(protocol: Protocol, found: Comparison, name: str) -> str:
    """The page as Markdown."""
    parts = [f"# {name}: what is kept at equal adaptation", ""]
    if found.level is None:
        return "\n".join([*parts, "The runs that set the level are not finished.", ""])
    source = "given" if protocol.level is not None else f"{protocol.target:.0%} of the way of the best full run"
    parts += [
        f"Read where the held-out loss first is {found.level:.4g} ({source}), the same for all methods, rates and "
        "seeds. Each method at the slowest rate that arrives, to a factor of √2, found with seed "
        f"{protocol.tuning_seed}, and up to {protocol.climbs} steps of √2 faster at a seed with which it does not. "
        "Means with Student's 95 % intervals.",
        "",
        *rate_lines(protocol, found),
        "",
        *kept_lines(protocol, found),
        "",
        *probe_lines(found),
    ]
    for title, pairs in (("Primary contrasts", protocol.primary), ("Secondary contrasts", protocol.secondary)):
        parts += contrast_lines(title, pairs, protocol, found)
    parts += [f"![Loss and retention]({name}.png)", ""]
    return "\n".join(parts)


def values_of(found: Comparison, method: str, figure: Callable[[Reading], float]) -> Values:
    """A figure of a method at the level, by seed."""
    outcomes = found.outcomes.get(method.removesuffix(LINE), {})

    def value(outcome: Outcome) -> float | None:
        reading = outcome.walked if method.endswith(LINE) else outcome.along
        return None if reading is None else figure(reading)

    return {seed: value(outcome) for seed, outcome in outcomes.items()}


def kept(reading: Reading) -> float:
    """The retention."""
    return reading.kept


def lost(reading: Reading) -> float:
    """The nats, negated so that higher is better."""
    return -reading.nats


def rate_lines(protocol: Protocol, found: Comparison) -> list[str]:
    """The table of the searches: the lowest loss at each rate, and what is kept at the level."""
    assert found.level is not None
    lines = [
        f"Rates, with seed {protocol.tuning_seed}: what is kept at the level along the run and walked back from its "
        "end; × where the loss stays above it (the lowest loss behind it)",
        "",
        "| method | rate: along, walked back | slowest that arrives |",
        "|---|---|---:|",
    ]
    for method, runs in found.tuning.items():
        cells = []
        for step in sorted(runs):
            along, back = read_at(runs[step].path, found.level), read_at(runs[step].line, found.level)
            shown = f"× {lowest_loss(runs[step].path):.3g}" if along is None else f"{along.kept:.4f}"
            cells.append(
                f"{protocol.lr * factor_of(step):.3g}: {shown}" + ("" if back is None else f", {back.kept:.4f}")
            )
        if method in found.rates:
            step_found = found.rates[method]
            rate = "none" if step_found is None else f"{protocol.lr * factor_of(step_found):.3g}"
        else:
            so_far = rate_so_far(runs, found.level)
            rate = "search not finished" if so_far is None else f"≤ {protocol.lr * factor_of(so_far):.3g}, not finished"
        lines.append(f"| {method} | {'; '.join(cells) or 'not run'} | {rate} |")
    return lines


def kept_lines(protocol: Protocol, found: Comparison) -> list[str]:
    """The table of what each method keeps, the most first."""
    lines = [
        "| method | arrived | retention | nats lost | walked back: retention | nats lost | trainable | rate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = []
    for method, outcomes in found.outcomes.items():
        along = _known(values_of(found, method, kept))
        back = _known(values_of(found, method + LINE, kept))
        nats = _known(values_of(found, method, lost))
        nats_back = _known(values_of(found, method + LINE, lost))
        run = next(iter(outcomes.values())).run
        rates = sorted({outcome.run.spec.step for outcome in outcomes.values()})
        shown = "–".join(f"{protocol.lr * factor_of(step):.3g}" for step in dict.fromkeys((rates[0], rates[-1])))
        mean = sum(along) / len(along) if along else -math.inf
        cells = (
            f"{len(along)}/{len(outcomes)}", _shown(t_interval(along)), _shown(t_interval([-n for n in nats])),
            _shown(t_interval(back)), _shown(t_interval([-n for n in nats_back])), f"{run.trainable:,}", shown,
        )  # fmt: skip
        rows.append((-(len(along) / len(outcomes)), -mean, f"| {method} | {' | '.join(cells)} |"))
    return [*lines, *(row for _, _, row in sorted(rows))]


def probe_lines(found: Comparison) -> list[str]:
    """The table of what each method loses of each probe, which a mean over them hides; nothing for a single probe."""
    runs = [outcome.run for outcomes in found.outcomes.values() for outcome in outcomes.values()]
    names = sorted({name for run in runs for name in run.metrics})
    if len(names) < 2:
        return []
    lines = [
        "Nats lost of each probe, −ln of what is kept of it, where the loss comes down to the level; below 0 is a gain",
        "",
        f"| method | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for method in found.outcomes:
        cells = []
        for name in names:
            known = _known(values_of(found, method, lambda reading, name=name: reading.retention[name]))  # type: ignore[misc]
            cells.append(_shown(t_interval([-math.log(value) for value in known])))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]


def contrast_lines(title: str, pairs: Sequence[tuple[str, str]], protocol: Protocol, found: Comparison) -> list[str]:
    """The table of some contrasts, which are one family."""
    if not pairs:
        return []
    names = {f"{one} − {other}": (one, other) for one, other in pairs}
    compared = {
        label: contrast(values_of(found, one, kept), values_of(found, other, kept))
        for label, (one, other) in names.items()
    }
    adjusted = holm({k: c.p_exact for k, c in compared.items()}, {k: c.smallest_p for k, c in compared.items()})
    adjusted_t = holm({label: c.p_t for label, c in compared.items()})
    lines = [
        f"{title}: differences over paired seeds; p by Student's t and by exact sign flips, each behind it adjusted "
        f"after Holm over the {len(pairs)} (the exact ones over those that can reach significance with their seeds)",
        "",
        "| contrast | seeds | retention | nats lost | p (t) | adjusted | p (exact) | adjusted |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label, (one, other) in names.items():
        found_here = compared[label]
        nats = contrast(values_of(found, one, lost), values_of(found, other, lost)).difference
        nats = Interval(-nats.mean, -nats.high, -nats.low, nats.count)
        difference = _shown(found_here.difference, sign=True)
        lines.append(
            f"| {label} | {_seeds(found_here)} | {difference} | {_shown(nats, sign=True)} | "
            f"{_p(found_here.p_t)} | {_p(adjusted_t[label])} | {_p(found_here.p_exact)} | {_p(adjusted[label])} |"
        )
    return [*lines, ""]


def picture(protocol: Protocol, found: Comparison) -> Figure:
    """The held-out loss against what is kept: a line for each run that is reported, dashed on the way back from its
    end.

    The level is the upright line; what stands higher there forgets less.
    """
    figure = Figure(figsize=(10, 5.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab10"]
    shown = found.outcomes or {
        method: {protocol.tuning_seed: Outcome.of(runs[min(runs)], found.level or 0.0)}
        for method, runs in found.tuning.items()
        if runs
    }
    for index, (method, outcomes) in enumerate(shown.items()):
        for number, outcome in enumerate(outcomes.values()):
            for points, style in ((outcome.run.path, "-"), (outcome.run.line, ":")):
                finite = [point for point in points if math.isfinite(point.loss)]
                axes.plot(
                    [point.loss for point in finite],
                    [sum(point.retention.values()) / len(point.retention) for point in finite],
                    style, color=colors(index % 10), linewidth=1.2, alpha=0.75,
                    label=method if number == 0 and style == "-" else None,
                )  # fmt: skip
    if found.level is not None:
        axes.axvline(found.level, color="0.4", linewidth=1)
    axes.set(xlabel="held-out loss of the new task", ylabel="retention")
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    if shown:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _known(values: Values) -> list[float]:
    return [value for value in values.values() if value is not None]


def _seeds(found: Contrast) -> str:
    missing = [
        f"{count} without {which}"
        for count, which in ((found.missing, "the first"), (found.missing_other, "the second"))
        if count
    ]
    return f"{found.difference.count}{', ' if missing else ''}{', '.join(missing)}"


def _shown(interval: Interval, *, sign: bool = False) -> str:
    if math.isnan(interval.mean):
        return "–"
    form = "+.4f" if sign else ".4f"
    if math.isnan(interval.low):
        return f"{interval.mean:{form}}"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _p(p: float) -> str:
    return "–" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"

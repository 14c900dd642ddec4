"""The page of the random subsets, from the CSV alone: rank correlations of predicted with measured forgetting."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from kappa_lightning.files import write_text

DRAWS = 1000
_MEASURED = ("seed", "number", "kind", "parameters", "rate", "nats", "kept", "tensors")
_SHOWN = ("gradient, inputs", "path signal, diagonal, synthesized", "path, synthesized", "path, unlabeled digits")
Row = dict[str, str]


def write_page(file: Path) -> str:
    """Write <name>.md and <name>.png beside <name>.csv; returns the page."""
    rows = read(file)
    page = page_of(rows, file.stem)
    write_text(file.with_suffix(".md"), page)
    picture(rows).savefig(file.with_suffix(".png"))
    return page


def read(file: Path) -> list[Row]:
    """The lines of the CSV."""
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def page_of(rows: list[Row], name: str) -> str:
    """The page as Markdown."""
    seeds = sorted({int(row["seed"]) for row in rows})
    arrived = sum(math.isfinite(float(row["nats"])) for row in rows)
    quarters = [row for row in rows if row["kind"] == "quarter"]
    lines = [
        f"# {name}: predicted against measured forgetting",
        "",
        f"{len(rows)} random subsets of the matrices of {len(seeds)} networks (seeds {', '.join(map(str, seeds))}), "
        f"{len(quarters)} of which fill a quarter of the parameters; {arrived} reach the level. Spearman's rank "
        "correlation of the predicted Σc/(Σb)² with the nats a digit that are measured, the mean of the networks', "
        f"with the middle 95 % over {DRAWS:,} bootstraps of each network's subsets. 1 is a perfect ranking.",
        "",
        "| estimator (method, reference) | all subsets | a quarter of the parameters |",
        "|---|---:|---:|",
    ]
    found = {label: (correlation(rows, label), correlation(quarters, label)) for label in labels_of(rows)}
    for label, cells in sorted(found.items(), key=lambda entry: -entry[1][0][0]):
        shown = [f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" for mean, low, high in cells]
        lines.append(f"| {label} | {shown[0]} | {shown[1]} |")
    return "\n".join([*lines, "", f"![Predicted against measured forgetting]({name}.png)", ""])


def labels_of(rows: list[Row]) -> list[str]:
    """The estimators that predicted."""
    return [column for column in rows[0] if column not in _MEASURED]


def correlation(rows: list[Row], label: str) -> tuple[float, float, float]:
    """Spearman's over each network's subsets, its mean, and the middle 95 % of resampled ones.

    What does not arrive ranks last, tied.
    """
    networks = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in rows if row["seed"] == seed]
        networks.append(np.array([[_finite(row[label]), _finite(row["nats"])] for row in mine]))
    numbers = np.random.default_rng(0)
    drawn = [
        np.mean([_spearman(pairs[numbers.integers(0, len(pairs), len(pairs))]) for pairs in networks])
        for _ in range(DRAWS)
    ]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(np.mean([_spearman(pairs) for pairs in networks])), float(low), float(high)


def picture(rows: list[Row]) -> Figure:
    """Measured against predicted forgetting, a color a network; squares fill a quarter of the parameters."""
    shown = [label for label in _SHOWN if label in labels_of(rows)]
    figure = Figure(figsize=(4 * len(shown), 4.2), dpi=110, layout="constrained")
    for axes, label in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        for color, seed in enumerate(sorted({row["seed"] for row in rows})):
            for kind, marker in (("any", "o"), ("quarter", "s")):
                mine = [row for row in rows if row["seed"] == seed and row["kind"] == kind]
                # Only ratios of one network's predictions mean something.
                unit = np.median([float(row[label]) for row in rows if row["seed"] == seed])
                axes.plot(
                    [float(row[label]) / unit for row in mine], [float(row["nats"]) for row in mine], marker,
                    color=f"C{color}", markersize=4, alpha=0.75, label=f"seed {seed}" if kind == "any" else None,
                )  # fmt: skip
        axes.set(xscale="log", yscale="log", title=label, xlabel="predicted, over the network's median")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("nats a digit at the level")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def _finite(text: str) -> float:
    # A rank correlation takes no infinity; any number above all others is the same rank.
    return min(float(text), 1e30)


def _spearman(pairs: np.ndarray) -> float:
    # Of a handful of subsets a bootstrap may draw one alone, which has no rank correlation.
    if (pairs == pairs[0]).all(0).any():
        return math.nan
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)

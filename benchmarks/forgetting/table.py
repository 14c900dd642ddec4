"""Finished runs as a CSV file, one line a point, from which everything on a page is computed again."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from benchmarks.forgetting.protocol import Protocol
from kappa_lightning.files import write_text
from kappa_lightning.pilot.adaptation import Point, factor_of
from kappa_lightning.pilot.trial import Run, Spec

_SPEC = ("method", "step", "seed")
_KEPT = "kept/"
"""Before the name of a probe in the column of its retention."""
_FIRST = "before/"
"""Before the name of a probe in the column of its metric before the first step."""


def write_runs(runs: Iterable[Run], protocol: Protocol, file: Path) -> None:
    """Write runs, in the order of the protocol's methods; ``way`` is ``path`` or the ``line`` back from the end."""
    order = {name: place for place, name in enumerate(protocol.methods)}
    chosen = sorted(
        (run for run in runs if run.spec.candidate in order),
        key=lambda run: (order[run.spec.candidate], run.spec.seed, run.spec.step),
    )
    probes = sorted({name for run in chosen for name in run.metrics})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = ["settings", "rate", "trainable", "total", "seconds", "way", "position", "loss"]
    writer.writerow([*_SPEC, *columns, *(f"{_KEPT}{name}" for name in probes), *(f"{_FIRST}{name}" for name in probes)])
    for run in chosen:
        spec = run.spec
        head = [
            spec.candidate,
            spec.step,
            spec.seed,
            protocol.mark(),
            f"{protocol.lr * factor_of(spec.step):.4g}",
            run.trainable,
        ]
        head += [run.total, f"{run.seconds:.0f}"]
        for way, points in (("path", run.path), ("line", run.line)):
            for point in points:
                kept = [f"{point.retention[name]:.7g}" for name in probes]
                first = [f"{run.metrics[name]:.7g}" for name in probes]
                writer.writerow([*head, way, f"{point.position:.7g}", f"{point.loss:.7g}", *kept, *first])
    write_text(file, stream.getvalue())


def read_runs(file: Path, mark: str | None = None) -> list[Run]:
    """The runs of a file that :func:`write_runs` wrote, with the digits that are there.

    Args:
        file: the CSV.
        mark: the settings that they must be of (:meth:`~benchmarks.forgetting.protocol.Protocol.mark`).

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a run is of other settings.
    """
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    runs = []
    for (name, step, seed), group in groupby(rows, key=lambda row: tuple(row[column] for column in _SPEC)):
        lines = list(group)
        first = lines[0]
        if mark is not None and first.get("settings") != mark:
            raise ValueError(f"{file} holds runs of other settings than the protocol's")
        metrics = {key.removeprefix(_FIRST): float(value) for key, value in first.items() if key.startswith(_FIRST)}
        ways: dict[str, list[Point]] = {"path": [], "line": []}
        for row in lines:
            kept = {key.removeprefix(_KEPT): float(value) for key, value in row.items() if key.startswith(_KEPT)}
            loss = float(row["loss"])
            ways[row["way"]].append(Point(float(row["position"]), math.inf if math.isnan(loss) else loss, kept))
        runs.append(
            Run(
                Spec(name, int(step), int(seed)), tuple(ways["path"]), tuple(ways["line"]), metrics,
                int(first["trainable"]), int(first["total"]), float(first["seconds"]),
            )
        )  # fmt: skip
    return runs

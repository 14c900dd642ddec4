"""How a run goes, epoch by epoch: lines that read well in a log file, and the points of a picture."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import lightning.pytorch as pl
from matplotlib.figure import Figure
from transformers.utils.logging import disable_progress_bar
from typing_extensions import override


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation.

    Attributes:
        learned: the figure of the new task.
        retention: the mean retention over all probes.
    """

    learned: float
    retention: float


class EpochLines(pl.Callback):
    """Keep the figures of every epoch, and print them as a line where no progress bar can be drawn.

    It must stand behind the callbacks whose figures it shows.

    Args:
        method: what the lines begin with.
        learned: the logged name of the new task's figure.
        stream: where to; by default standard output.

    Attributes:
        points: one for each epoch so far.
        seconds: from the start of the fit to the end of the last epoch.
    """

    def __init__(self, method: str, learned: str, stream: TextIO | None = None) -> None:
        self.method = method
        self.learned = learned
        self.stream = stream or sys.stdout
        self.points: list[Point] = []
        self.seconds = 0.0
        self._started = 0.0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the time."""
        self._started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the figures, and print the line."""
        point = Point(
            float(trainer.callback_metrics[self.learned]), float(trainer.callback_metrics["forgetting/retention"])
        )
        self.points.append(point)
        self.seconds = time.perf_counter() - self._started
        if not draws_bars(self.stream):
            print(
                f"{self.method}: epoch {trainer.current_epoch + 1} of {trainer.max_epochs}, "
                f"step {trainer.global_step}, "
                f"{self.learned} {point.learned:.3f}, retention {point.retention:.3f}, {self.seconds:.0f} s",
                file=self.stream,
                flush=True,
            )


def draws_bars(stream: TextIO | None = None) -> bool:
    """Whether a progress bar can be drawn: in a terminal, and not in a log file or a pipe."""
    return (stream or sys.stdout).isatty()


def keep_bars_out_of_logs() -> None:
    """Switch off the bars that transformers draws while it loads weights, where none can be drawn."""
    if not draws_bars():
        disable_progress_bar()  # type: ignore[no-untyped-call]


def save_picture(runs: Mapping[str, Sequence[Point]], title: str, learned: str, file: Path) -> None:
    """Draw what each method learned and kept, a point an epoch, and write it as a picture.

    Args:
        runs: the points of each method, in order.
        title: of the picture.
        learned: what the new task's figure is.
        file: where to; its folder is made.
    """
    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for method, points in runs.items():
        axes.plot([p.learned for p in points], [p.retention for p in points], marker="o", markersize=4, label=method)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel=learned, ylabel="retention of what it knew (1: nothing lost)", title=title)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)

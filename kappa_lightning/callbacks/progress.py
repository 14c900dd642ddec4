"""Progress of long work inside a callback, beside whichever progress bar the Trainer shows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from tqdm.auto import tqdm

from kappa_lightning.profile.distributed import Watch
from kappa_lightning.profile.row import KappaRow
from kappa_lightning.weights import Weight

Item = TypeVar("Item")


def track(
    trainer: pl.Trainer, items: Iterable[Item], *, total: int | None, description: str, unit: str
) -> Generator[Item, None, None]:
    """Iterate with a progress bar, on rank zero and only where the Trainer's own progress bar is on.

    Args:
        trainer: decides whether and where the bar is drawn.
        items: what is iterated over.
        total: number of items, or ``None`` if it is not known.
        description: what is being done.
        unit: what an item is.
    """
    bar = trainer.progress_bar_callback
    shown = isinstance(bar, TQDMProgressBar | RichProgressBar) and bar.is_enabled and trainer.is_global_zero
    if not shown:
        yield from items
    elif isinstance(bar, RichProgressBar) and bar.progress is not None and bar.progress.live.is_started:
        # Two live displays would overwrite each other, so the work becomes one more line of the Trainer's.
        task = bar.progress.add_task(description, total=float("inf") if total is None else total)
        try:
            for item in items:
                yield item
                bar.progress.update(task, advance=1)
                bar.refresh()
        finally:
            bar.progress.remove_task(task)
    else:
        with tqdm(items, total=total, desc=description, unit=unit, leave=False, dynamic_ncols=True) as lines:
            yield from lines


def watching(trainer: pl.Trainer) -> Watch:
    """Progress of a profile, as :func:`track` shows it."""

    def watch(weights: Sequence[Weight], rows: Iterator[KappaRow]) -> Iterator[KappaRow]:
        return track(trainer, rows, total=len(weights), description="Condition numbers", unit="tensor")

    return watch


@contextmanager
def ticking(trainer: pl.Trainer, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar as :func:`track` shows it; what it yields is called with the number of steps that are done."""
    steps = track(trainer, iter(int, 1), total=total, description=description, unit="step")
    next(steps)

    def tick(count: int = 1) -> None:
        for _ in range(count):
            next(steps)

    try:
        yield tick
    finally:
        steps.close()

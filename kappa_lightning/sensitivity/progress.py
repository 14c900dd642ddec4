"""The progress bar of a measurement outside of a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

Tick = Callable[[int], None]


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Tick]:
    """A progress bar on standard error; what it yields is called with the number of steps that are done."""
    with tqdm(desc=description, total=total, leave=False, dynamic_ncols=True) as bar:

        def tick(steps: int = 1) -> None:
            bar.update(steps)

        yield tick

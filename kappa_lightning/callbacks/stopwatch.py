"""How long a piece of work takes in each step, measured now and then so that no step waits for a device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch


class Stopwatch:
    """Seconds of the steps that were measured, and how many there were in all."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.steps = 0

    @contextmanager
    def measuring(self, trainer: pl.Trainer, timed: bool) -> Iterator[None]:
        """Count a step, and measure it if it is to be timed, which waits for the device."""
        self.steps += 1
        if not timed:
            yield
            return
        _wait(trainer.strategy.root_device)
        started = time.perf_counter()
        yield
        _wait(trainer.strategy.root_device)
        self.seconds.append(time.perf_counter() - started)

    def describe(self) -> str:
        """The median of what was measured; nothing without a step."""
        # The first step pays for what is set up once, such as kernels and memory.
        known = sorted(self.seconds[1:] or self.seconds)
        if not known:
            return ""
        return f"{1000 * known[len(known) // 2]:,.1f} ms for each of {self.steps} steps (median of {len(known)} timed)"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()

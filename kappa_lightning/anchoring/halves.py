"""Probes of which every other batch chooses a point and the others report on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch.utils.data import RandomSampler

from kappa_lightning.evaluation.intervals import retention
from kappa_lightning.probes import Probe, known_length

Evaluate = Callable[[str, Probe], float]


class HalvedProbes:
    """The retention of probes on the half of their batches that chooses, and on the half that reports.

    Args:
        probes: by name.
        have_begun: whether what they record of the pretrained model is there already.
        evaluate: ``evaluate(name, probe)`` returns a probe's metric on the model as it is now.

    Raises:
        ValueError: if a probe has fewer than two batches, or gives them in another order each time.
    """

    def __init__(self, probes: Mapping[str, Probe], have_begun: bool, evaluate: Evaluate) -> None:
        self.probes = dict(probes)
        self.have_begun = have_begun
        self.evaluate = evaluate
        self._baseline: list[dict[str, float]] = [{}, {}]
        for name, probe in self.probes.items():
            length = known_length(probe.dataloader)
            if length is not None and length < 2:
                raise ValueError(
                    f"the probe {name!r} has one batch, which cannot both choose a point and report on it: give it "
                    "smaller batches, at least two"
                )
            if isinstance(getattr(probe.dataloader, "sampler", None), RandomSampler):
                raise ValueError(
                    f"the probe {name!r} shuffles its data, so its two halves would mix: give a dataloader with "
                    "shuffle=False"
                )

    def begin_choice(self) -> None:
        """Measure what retention is relative to, with the pretrained weights in the model."""
        if not self.have_begun:
            for name, probe in self.probes.items():
                if type(probe).begin_baseline is not Probe.begin_baseline:
                    # It records in this pass, of both halves.
                    probe.begin_baseline()
                    self.evaluate(name, probe)
        self._baseline[0] = self._measured(0)

    def begin_report(self) -> None:
        """The same for the half that reports."""
        self._baseline[1] = self._measured(1)

    def choice(self) -> dict[str, float]:
        """The retention of each probe on the half that chooses."""
        return self._retention(0)

    def report(self) -> dict[str, float]:
        """The retention of each probe on the half that reports."""
        return self._retention(1)

    def _retention(self, half: int) -> dict[str, float]:
        return {
            name: retention(self._baseline[half][name], now, self.probes[name].higher_is_better)
            for name, now in self._measured(half).items()
        }

    def _measured(self, half: int) -> dict[str, float]:
        found = {}
        for name, probe in self.probes.items():
            with _half_of(probe, half):
                found[name] = self.evaluate(name, probe)
        return found


class _EverySecond(Iterable[Any]):
    """Every second batch of an iterable."""

    def __init__(self, batches: Iterable[Any], first: int) -> None:
        self.batches = batches
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.first, None, 2)

    def __len__(self) -> int:
        length = known_length(self.batches)
        if length is None:
            raise TypeError("the length is known only at the end")
        return len(range(self.first, length, 2))


@contextmanager
def _half_of(probe: Probe, half: int) -> Iterator[None]:
    whole = probe.dataloader
    probe.dataloader = _EverySecond(whole, half)
    try:
        yield
    finally:
        probe.dataloader = whole

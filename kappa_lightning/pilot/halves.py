"""Half of a probe's data: one to search with, the other to report on, so that no figure is chosen by its own noise."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from kappa_lightning.probes import Probe

Half = Literal["search", "confirm", "all"]
"""Which items of every probe a run sees."""


def half_of(probe: Probe, half: Half, name: str = "") -> Probe:
    """A copy of a probe that reads every other item of its data, and shares nothing that a run records.

    A ``DataLoader`` in sequential order over a dataset of known length is split by samples; anything else by batches.

    Args:
        probe: stays as it is.
        half: ``"search"`` takes the first, third, …, ``"confirm"`` the second, fourth, …; ``"all"`` is a copy of all.
        name: of the probe, for what is raised.

    Raises:
        ValueError: if there is only one sample, or one batch where batches are split, or a dataloader shuffles.

    Example:
        >>> from kappa_lightning import AccuracyProbe
        >>> probe = AccuracyProbe(["a", "b", "c"])
        >>> list(half_of(probe, "search").dataloader), list(half_of(probe, "confirm").dataloader)
        (['a', 'c'], ['b'])
    """
    dataloader = (
        probe.dataloader if half == "all" else _every_other(probe.dataloader, ("search", "confirm").index(half), name)
    )
    # The copy's own step is bound to the copy; its data is not copied.
    return copy.deepcopy(probe, {id(probe.dataloader): dataloader})


def _every_other(dataloader: Iterable[Any], first: int, name: str) -> Iterable[Any]:
    which = f"the probe {name!r}" if name else "the probe"
    if type(dataloader) is DataLoader and isinstance(dataloader.sampler, SequentialSampler):
        dataset = dataloader.dataset
        if not isinstance(dataset, IterableDataset) and dataloader.batch_size is not None:
            chosen = range(first, len(dataset), 2)  # type: ignore[arg-type]
            if not chosen:
                raise ValueError(f"{which} has one sample, which cannot be halved: give at least two")
            return DataLoader(
                Subset(dataset, chosen),
                batch_size=dataloader.batch_size,
                num_workers=dataloader.num_workers,
                collate_fn=dataloader.collate_fn,
                pin_memory=dataloader.pin_memory,
            )
    if isinstance(getattr(dataloader, "sampler", None), RandomSampler):
        raise ValueError(
            f"{which} has a DataLoader that shuffles, whose batches are others each time it is read: give it "
            "shuffle=False, so that the halves stay apart and all evaluations are on the same items"
        )
    if next(islice(iter(dataloader), 1, None), None) is None:
        raise ValueError(
            f"{which} has one batch, and a pilot searches with every other batch and reports on the rest: give it at "
            "least two batches (a smaller batch_size), or a DataLoader without shuffling, whose samples are halved"
        )
    return EveryOther(dataloader, first)


class EveryOther:
    """Every other batch of a dataloader, from the given one on."""

    def __init__(self, dataloader: Iterable[Any], first: int) -> None:
        self.dataloader = dataloader
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.dataloader), self.first, None, 2)

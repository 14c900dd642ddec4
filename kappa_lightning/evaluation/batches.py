"""The batches of an evaluation, each read by one of the processes that share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeGuard

from torch.utils.data import DataLoader, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from kappa_lightning.probes import known_length

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Share:
    """The batches of an evaluation that a process reads: number ``index``, ``index + count`` and so on.

    Attributes:
        index: the place of this process among those that share the batches.
        count: how many do.
        lockstep: whether a forward pass needs all processes, so that each must run as many of them.
        group: who adds up a metric; ``None`` is all processes.
    """

    index: int = 0
    count: int = 1
    lockstep: bool = False
    group: ProcessGroup | None = None


class SharedBatches(Iterable[tuple[Any, bool]]):
    """A dataloader's batches, numbered as one process would read them, of which this one reads its share.

    With fewer batches than processes every process reads all of them. Where a forward pass needs all processes, the
    ones that have a batch less read one once more, which does not count.

    Args:
        dataloader: gives every process the same batches in the same order, or takes its order from PyTorch's random
            numbers, which are the same on all.
        share: what this process reads.
        limit: how many batches each process reads at most.

    Attributes:
        split: whether the processes have read different batches, so that their metrics must be added up; known once
            the iteration has begun.
        length: how many batches this process will read, if that is known.

    Raises:
        ValueError: if the dataloader has a sampler that shares out the samples itself.

    Example:
        >>> [batch for batch, counts in SharedBatches("abcde", Share(index=1, count=2)) if counts]
        ['b', 'd']
        >>> list(SharedBatches("abc", Share(index=1, count=2, lockstep=True)))
        [('b', True), ('b', False)]
        >>> list(SharedBatches("a", Share(index=1, count=2)))
        [('a', True)]
    """

    def __init__(self, dataloader: Iterable[Any], share: Share, limit: int | None = None) -> None:
        if share.count > 1 and _is_dealt(dataloader):
            raise ValueError(
                "the dataloader has a DistributedSampler, which repeats samples so that all processes get as many: "
                "give one without, the callback shares the batches so that each counts once"
            )
        self.dataloader = dataloader
        self.share = share
        self.limit = None if limit is None else limit * share.count
        total = known_length(dataloader)
        self.total = total if total is None or self.limit is None else min(total, self.limit)
        self.split = share.count > 1 and (self.total is None or self.total >= share.count)
        self.length = self.total
        if self.total is not None and self.split:
            self.length = len(range(share.index, self.total, share.count))

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        if not self.split:
            yield from ((batch, True) for batch in islice(self.dataloader, self.limit))
            return
        index, count = self.share.index, self.share.count
        batch: Any = None
        if self.total is not None and _can_stride(self.dataloader):
            total = self.total
            for batch in islice(_strided(self.dataloader, self.share), self.length):
                yield batch, True
        else:
            every: Iterator[Any] = islice(self.dataloader, self.limit)
            if self.total is None:
                first = list(islice(every, count))
                every = chain(first, every)
                self.split = len(first) == count
            total = 0
            for total, candidate in enumerate(every, start=1):
                if not self.split or (total - 1) % count == index:
                    batch = candidate
                    yield batch, True
        if self.split and self.share.lockstep and index >= total % count > 0:
            yield batch, False


def _is_dealt(dataloader: Iterable[Any]) -> bool:
    samplers = [getattr(dataloader, "sampler", None), getattr(dataloader, "batch_sampler", None)]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def _can_stride(dataloader: Iterable[Any]) -> TypeGuard[DataLoader[Any]]:
    # A subclass may take other arguments or change its batches, so it is read as it is.
    return (
        type(dataloader) is DataLoader
        and not isinstance(dataloader.dataset, IterableDataset)
        and dataloader.batch_sampler is not None
    )


def _strided(dataloader: DataLoader[Any], share: Share) -> DataLoader[Any]:
    """A dataloader of the same samples that loads only the batches of one process."""
    batches = dataloader.batch_sampler
    assert batches is not None
    return DataLoader(
        dataloader.dataset,
        batch_sampler=_Strided(batches, share),
        num_workers=dataloader.num_workers,
        collate_fn=dataloader.collate_fn,
        pin_memory=dataloader.pin_memory,
        timeout=dataloader.timeout,
        worker_init_fn=dataloader.worker_init_fn,
        multiprocessing_context=dataloader.multiprocessing_context,
        generator=dataloader.generator,
        prefetch_factor=dataloader.prefetch_factor,
    )


class _Strided(Sampler[list[int]]):
    def __init__(self, batches: Iterable[list[int]], share: Share) -> None:
        self.batches = batches
        self.share = share

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self.batches), self.share.index, None, self.share.count)
